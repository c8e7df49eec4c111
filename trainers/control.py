"""What asks a running attempt to stop at its next checkpoint: the service's control file, and a notice that machines will be taken away.

The service writes `control.json` into the run directory. Only the leader reads it: its answer travels to all workers in the sum that
every step makes anyway, so all of them stop after the same step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from pydantic import ValidationError

from trainers.records import Record, RunDir

CONTROL_FILE = "control.json"
READ_EVERY_S = 1.0


class ControlRecord(Record):
    """What the service wants of the attempt that the record names; to any other attempt it says nothing."""

    wanted: Literal["run", "pause", "resize"] = "run"
    workers: int | None = None
    """With `resize`: how many the next attempt gets."""


def wanted(run: RunDir) -> ControlRecord:
    """What is wanted of this attempt now."""
    try:
        record = run.read(CONTROL_FILE, ControlRecord)
    except (ValidationError, OSError):  # a stop that cannot be read must not cost the training
        record = None
    return record if record is not None and record.attempt == run.attempt else ControlRecord()


def should_stop(run: RunDir, leader: bool, noticed: Callable[[], bool] = lambda: False) -> Callable[[], bool]:
    """The loop's `should_stop` of one worker: true once `noticed` is, or once the leader reads a pause or a resize.

    The file is looked at only every READ_EVERY_S: it may lie on a network.
    """
    stop = False
    read_at = -READ_EVERY_S

    def ask() -> bool:
        nonlocal stop, read_at
        if not stop:
            stop = noticed()
        if not stop and leader and time.monotonic() - read_at >= READ_EVERY_S:
            stop = wanted(run).wanted != "run"
            read_at = time.monotonic()
        return stop

    return ask


def preempted() -> bool:
    """Whether Ray has told this Ray Train worker that the machine of one of the workers will be taken away.

    `ray.train.get_preemption_info()` gives the leader's view to all workers, at the price of a round trip between them. Our vote travels
    in the step's own sum, so each worker's own view is enough.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None
