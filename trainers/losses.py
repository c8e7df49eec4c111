"""What became of a lost training worker, and how often one may be lost. Pure but for Ray's exception types, which are told apart by what
they carry.

Budgets are separate: what the job's owner must mend is never tried again, a machine that was taken away costs nothing, and a worker
that died counts until a new checkpoint shows that there is progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainers.errors import UserError

MAX_LOSSES = 3
"""Workers lost without a new checkpoint in between before training is given up."""

Kind = Literal["user", "preempted", "no room", "memory", "killed", "failed"]


@dataclass(frozen=True)
class Loss:
    """Why a start of the training workers ended."""

    kind: Kind
    """`memory`: Ray's own monitor killed it; `killed`: it vanished, as one that the kernel kills for its memory does."""
    words: str
    """The innermost message, in one line."""
    error: UserError | None = None
    """Of the kind `user`."""


def why(error: BaseException) -> Loss:
    """The cause of what `fit()` raised."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, UserError):
            return Loss("user", str(cause), cause)
    names = {type(cause).__name__ for cause in causes}
    words = _last_line(causes[-1])
    if "PreemptionError" in names or any(getattr(cause, "preempted", False) is True for cause in causes):
        return Loss("preempted", words)
    if names & {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}:
        return Loss("no room", words)
    text = " ".join(str(cause) for cause in causes)
    if "OutOfMemoryError" in names or "OUT_OF_MEMORY" in text or "low on memory" in text:
        return Loss("memory", "Ray's memory monitor killed it")
    if names & {"ActorDiedError", "RayActorError", "WorkerCrashedError"}:
        return Loss("killed", "its process vanished" if "connection error" in text or "SYSTEM_ERROR" in text else words)
    return Loss("failed", words)


@dataclass(frozen=True)
class Losses:
    """Workers lost since the last new checkpoint."""

    count: int = 0
    checkpoint: int = 0
    """Step of the newest checkpoint at the last loss."""
    killed_at: tuple[int, ...] = ()
    """Steps in which a worker was killed."""
    memory: bool = False
    """One was killed for its memory, or twice in the same step, which is what a lack of memory looks like from outside."""

    @property
    def too_many(self) -> bool:
        return self.count > MAX_LOSSES

    def after(self, loss: Loss, step: int, checkpoint: int) -> Losses:
        """With one more, lost in `step`, the newest checkpoint being that of step `checkpoint`."""
        before = self if checkpoint <= self.checkpoint else Losses()
        killed = loss.kind in ("memory", "killed")
        return Losses(
            count=before.count + 1,
            checkpoint=checkpoint,
            killed_at=(*before.killed_at, step) if killed else before.killed_at,
            memory=loss.kind == "memory" or (killed and step in self.killed_at),
        )


def _causes(error: BaseException) -> list[BaseException]:
    """The error and all that it wraps, outermost first; of several workers' errors, each."""
    found = [error]
    for name in ("worker_failures", "controller_failure", "health_check_failure", "cause", "__cause__"):
        inner = getattr(error, name, None)
        for cause in inner.values() if isinstance(inner, dict) else [inner]:
            if isinstance(cause, BaseException) and cause not in found:
                found += _causes(cause)
    return found


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
