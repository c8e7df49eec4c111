"""What the runner tells the driver of an attempt beyond the job itself."""

from __future__ import annotations

from pydantic import Field

from trainers.records import Record
from trainers.spec import EvalTask, Judge


class LaunchOrder(Record):
    """`launch.json` in the run directory; written by the runner, read by `python -m service.launch`."""

    job_id: str
    model_name: str
    """The name that must answer when the job has succeeded (`ft:{base}:{org}:{suffix}:{id}`)."""
    requested_by: str | None = None
    """Who asked for the job: project and key, as the service knows them."""
    models: str
    """Folder where base models are cached."""
    stores: str
    """Folder of the project's token stores."""
    workers: int | None = None
    """Training workers, where a resize asked for a number; None leaves it to the spec."""
    asked_at: float = 0.0
    """When the job was asked for (a later attempt: when it was handed over), in seconds since the epoch."""
    serve_url: str | None = None
    """Where the serving app of the base answers, for example http://127.0.0.1:8000/smollm2-135m-instruct."""
    model_url: str | None = None
    """Where the tuned model's own app answers, if no adapter on the base says it exactly."""
    serve_token_file: str | None = None
    """File with the bearer token that the serving app asks for."""


class Side(Record):
    """A model that is evaluated."""

    name: str
    app: str
    """The serving app that answers for it."""
    adapter: str | None = None
    """PEFT folder that the app answers with; None = the app's model as it is."""
    folder: str
    """Hugging Face folder of the app's model: its tokenizer and chat template."""


class EvaluationOrder(Record):
    """`order.json` in an evaluation's folder; written by the runner, read by `python -m service.evaluating`."""

    base: Side
    tuned: Side
    tasks: list[EvalTask]
    """Their paths can be read on the cluster."""
    slice_by: str | None = None
    judge: Judge | None = None
    judging: Side | None = None
    """The service's own model that judges, where `judge` has no URL."""
    store: str | None = None
    """Token store of the job that made the tuned model: its validation split is what the loss is measured on."""
    urls: dict[str, str] = Field(default_factory=dict)
    """App -> where it answers now."""
    serve_token_file: str = ""

    @property
    def sides(self) -> list[Side]:
        """All models that are asked."""
        return [self.base, self.tuned, *([self.judging] if self.judging else [])]
