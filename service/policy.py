"""What to do next, decided from what is seen. Pure: no clock, no database, no cluster.

One job is one `Seen`; `decide` looks at all of them, oldest first, and returns actions as data for the runner to carry
out. Carrying one out twice does no harm, so a runner that died half-way simply decides again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from service.states import FINAL, Status


@dataclass(frozen=True)
class Limits:
    """What the runner may use."""

    slots: int = 1
    """Jobs that train at a time."""
    losses: int = 3
    """Workers lost without a new checkpoint in between before a job is given up."""
    backoff_s: float = 2.0
    """Pause after the first loss; four times longer after each further one."""
    exit_s: float = 30.0
    """How long a finished attempt may take to leave the cluster."""


@dataclass(frozen=True)
class Seen:
    """One job as the runner sees it now."""

    id: str
    status: Status
    attempt: int = 0
    """The current attempt; 0 before the first."""
    submitted: bool = False
    """The current attempt was handed to Ray."""
    released: bool = False
    """Nothing of the job is left on the cluster."""
    ray: Literal["unknown", "absent", "alive", "ended"] = "unknown"
    """What Ray says about the current attempt."""
    outcome: bool = False
    """The current attempt wrote its outcome."""
    losses: int = 0
    """Workers lost since the last new checkpoint."""
    not_before: float = 0.0
    """Earliest time of the next attempt."""
    ended_at: float = 0.0
    """When the job became final."""


@dataclass(frozen=True)
class CheckFiles:
    """Look whether the job's files can be read at all, then queue it."""

    job: str


@dataclass(frozen=True)
class Start:
    """Begin an attempt: number it, then submit it."""

    job: str
    attempt: int


@dataclass(frozen=True)
class Submit:
    """Hand an attempt that was begun to Ray (again, if a runner died in between)."""

    job: str
    attempt: int


@dataclass(frozen=True)
class Wait:
    """Leave the job queued and say why."""

    job: str
    reason: str


@dataclass(frozen=True)
class Retry:
    """The worker is gone: queue the job for a new attempt."""

    job: str
    losses: int
    not_before: float


@dataclass(frozen=True)
class GiveUp:
    """Too many workers are gone: the job failed."""

    job: str
    losses: int


@dataclass(frozen=True)
class Finish:
    """The attempt told how it ended: so did the job."""

    job: str


@dataclass(frozen=True)
class StopAttempt:
    """A final job still runs on the cluster: take its lease and stop it."""

    job: str


@dataclass(frozen=True)
class Release:
    """A final job has left the cluster: its place is free."""

    job: str


Action = CheckFiles | Start | Submit | Wait | Retry | GiveUp | Finish | StopAttempt | Release


def decide(jobs: Sequence[Seen], cluster: bool, now: float, limits: Limits) -> list[Action]:
    """Actions for all jobs, oldest first. `cluster`: Ray answers. `now` in seconds, as `not_before` and `ended_at`."""
    actions = [action for job in jobs for action in _settle(job, cluster, now, limits)]
    leaving = {action.job for action in actions if isinstance(action, Retry | GiveUp | Release)}
    busy = [job.id for job in jobs if job.id not in leaving and (job.status == "running" or (job.status in FINAL and not job.released))]
    ahead = len(busy)
    for job in jobs:
        if job.status != "queued":
            continue
        if not cluster:
            actions.append(Wait(job.id, "the Ray cluster does not answer"))
        elif now < job.not_before:
            actions.append(Wait(job.id, "a pause after the lost worker"))
        elif ahead < limits.slots:
            actions.append(Start(job.id, job.attempt + 1))
            ahead += 1
        else:
            actions.append(Wait(job.id, f"waiting for the job before it: {ahead} ahead"))
            ahead += 1
    return actions


def _settle(job: Seen, cluster: bool, now: float, limits: Limits) -> Iterator[Action]:
    """What one job needs, apart from a place on the cluster."""
    if job.status == "validating_files":
        yield CheckFiles(job.id)
    elif job.status == "running":
        yield from _watch(job, cluster, now, limits)
    elif job.status in FINAL and not job.released:
        # `submitted` is no proof here: the runner may have died between telling Ray and noting it.
        gone = job.attempt == 0 or job.ray in ("absent", "ended")
        # A finished attempt may leave by itself; a cancelled one, and one that lingers, is stopped.
        overdue = job.status == "cancelled" or now - job.ended_at > limits.exit_s
        if gone:
            yield Release(job.id)
        elif cluster and overdue:
            yield StopAttempt(job.id)


def _watch(job: Seen, cluster: bool, now: float, limits: Limits) -> Iterator[Action]:
    # The outcome decides, not Ray: its job table forgets, and is sometimes wrong.
    if job.outcome:
        yield Finish(job.id)
    elif not job.submitted:
        if cluster:
            yield Submit(job.id, job.attempt)
    elif job.ray in ("absent", "ended"):
        losses = job.losses + 1
        if losses > limits.losses:
            yield GiveUp(job.id, losses)
        else:
            yield Retry(job.id, losses, now + limits.backoff_s * 4 ** (losses - 1))
