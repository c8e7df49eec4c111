"""The one error tree.

Every error a user can meet says what was found (the value), which rule it breaks, and what to do about it (the remedy).
All are picklable, because they cross process boundaries (Ray tasks, worker groups, the run directory).
"""

from __future__ import annotations

from typing import Any, ClassVar


class TuneyardError(Exception):
    """Base of the tree: one line of cause, one line of remedy.

    `code` and `param` become the fields of the same name in the OpenAI error object.
    `retry` says whether running the same job again can help: a user error never heals by itself.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retry: ClassVar[bool] = True

    def __init__(self, message: str, remedy: str = "", param: str | None = None) -> None:
        super().__init__(message, remedy, param)  # all arguments positional: pickle rebuilds the error from `args`
        self.message = message
        self.remedy = remedy
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def to_dict(self) -> dict[str, Any]:
        """The form kept in records and sent on the wire (`error` of a fine-tuning job)."""
        return {"code": self.code, "message": str(self), "param": self.param}


class UserError(TuneyardError):
    """The request, the data or the spec is wrong; only its owner can mend it."""

    code = "invalid_request"
    status = 400
    retry = False


class SpecError(UserError):
    """A job spec breaks a rule: unknown key, wrong type, value out of range."""

    code = "invalid_job"


class DataError(UserError):
    """A row of the data breaks a rule. The message names file, line and, where it applies, turn and token."""

    code = "invalid_training_file"


class RowError(DataError):
    """One row that cannot be used: `{where} {what}.`, and the remedy.

    `kind` is the reason without this row's own values ("is not JSON"), so that rows of one kind can be counted together.
    """

    def __init__(self, where: str, what: str, remedy: str, kind: str = "") -> None:
        super().__init__(f"{where} {what}.", remedy)
        self.args = (where, what, remedy, kind)
        self.where = where
        self.what = what
        self.kind = kind or what


class TemplateError(UserError):
    """A chat template cannot be rendered, or does not render the way training needs it to."""

    code = "invalid_template"


class UnknownModel(UserError):
    """No catalogue entry, alias, folder or tuned model goes by this name."""

    code = "model_not_found"
    status = 404


class ModelError(UserError):
    """A base model's folder cannot be used: missing shard, unknown architecture, remote code."""

    code = "invalid_model"


class OutOfMemory(UserError):
    """A training worker needs more memory than its device or its machine has."""

    code = "out_of_memory"


class WorkerLost(TuneyardError):
    """Training workers kept dying without a new checkpoint in between: trying again as before does not help."""

    code = "worker_lost"
    retry = False


class Unavailable(TuneyardError):
    """Something outside us does not answer: storage, the cluster, a package index, the serving app."""

    code = "unavailable"
    status = 503


class ServingDiffers(Unavailable):
    """The serving app is there, but does not read or compute what training did: trying again changes nothing."""

    code = "serving_differs"
    retry = False


class CheckpointError(TuneyardError):
    """A checkpoint is incomplete or damaged: its manifest does not match its files."""

    code = "damaged_checkpoint"


class StoreError(TuneyardError):
    """A token store is incomplete or damaged: its manifest does not match its files."""

    code = "damaged_store"


class Fenced(TuneyardError):
    """A later attempt of the same job holds the lease; this writer must stop without writing."""

    code = "fenced"
    retry = False
