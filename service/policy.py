"""What to do next, decided from what is seen. Pure: no clock, no database, no cluster.

One job is one `Seen`; `decide` looks at all of them, oldest first, and returns actions as data for the runner to carry
out. Carrying one out twice does no harm, so a runner that died half-way simply decides again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from service.states import FINAL, Status

Wanted = Literal["run", "pause", "resize"]


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
    pause_s: float = 600.0
    """How long a training attempt that was asked to stop may take to finish its step and write a checkpoint."""


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
    training: bool = False
    """The current attempt is in its train stage: the one that has something to save before it stops."""
    resized: bool = False
    """The number of workers was changed after the current attempt was begun."""
    told: Wanted = "run"
    """What the control file says to the current attempt."""
    told_at: float = 0.0
    """When the control file was written."""
    outcome: bool = False
    """The current attempt wrote how the job ended."""
    stopped: bool = False
    """The current attempt wrote that it stopped at a checkpoint, as it was told to."""
    losses: int = 0
    """Workers lost since the last new checkpoint."""
    not_before: float = 0.0
    """Earliest time of the next attempt."""
    ended_at: float = 0.0
    """When the job became final, or its attempt stopped."""


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
class Tell:
    """Say in the control file what is wanted of the current attempt."""

    job: str
    wanted: Wanted


@dataclass(frozen=True)
class Requeue:
    """The attempt stopped as it was told to: queue the job for the next one. No loss."""

    job: str


@dataclass(frozen=True)
class Rest:
    """A pausing job has left the cluster: it is paused."""

    job: str


@dataclass(frozen=True)
class StopAttempt:
    """An attempt that must not go on still runs on the cluster: take its lease and stop it."""

    job: str


@dataclass(frozen=True)
class Release:
    """A final job has left the cluster: its place is free."""

    job: str


Action = CheckFiles | Start | Submit | Wait | Retry | GiveUp | Finish | Tell | Requeue | Rest | StopAttempt | Release

ON_CLUSTER: frozenset[Status] = frozenset({"running", "pausing"})


def decide(jobs: Sequence[Seen], cluster: bool, now: float, limits: Limits) -> list[Action]:
    """Actions for all jobs, oldest first. `cluster`: Ray answers. `now` in seconds, as `not_before` and `ended_at`."""
    actions = [action for job in jobs for action in _settle(job, cluster, now, limits)]
    leaving = {action.job for action in actions if isinstance(action, Retry | GiveUp | Requeue | Rest | Release)}
    busy = [job.id for job in jobs if job.id not in leaving and (job.status in ON_CLUSTER or (job.status in FINAL and not job.released))]
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
    elif job.status == "pausing":
        yield from _pause(job, cluster, now, limits)
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
    wanted: Wanted = "resize" if job.resized else "run"
    if job.outcome:
        yield Finish(job.id)
    elif job.stopped:
        if _gone(job):
            yield Requeue(job.id)
        elif _lingers(job, now, limits):
            yield StopAttempt(job.id)
    elif not job.submitted:
        if cluster:
            yield Submit(job.id, job.attempt)
    elif _gone(job):
        losses = job.losses + 1
        if losses > limits.losses:
            yield GiveUp(job.id, losses)
        else:
            yield Retry(job.id, losses, now + limits.backoff_s * 4 ** (losses - 1))
    elif job.told != wanted:
        yield Tell(job.id, wanted)


def _pause(job: Seen, cluster: bool, now: float, limits: Limits) -> Iterator[Action]:
    if job.outcome:  # it was faster
        yield Finish(job.id)
    elif _gone(job):  # stopped as asked, never begun, or lost: the next attempt goes on from the newest checkpoint
        yield Rest(job.id)
    else:
        if job.told != "pause":
            yield Tell(job.id, "pause")
        # Only training has something to save; every other stage goes on from its own files.
        overdue = job.told == "pause" and now - job.told_at > limits.pause_s
        if cluster and (not job.training or overdue or _lingers(job, now, limits)):
            yield StopAttempt(job.id)


def _gone(job: Seen) -> bool:
    return job.ray in ("absent", "ended")


def _lingers(job: Seen, now: float, limits: Limits) -> bool:
    """It wrote that it stopped, but Ray still has it."""
    return job.stopped and job.ray == "alive" and now - job.ended_at > limits.exit_s
