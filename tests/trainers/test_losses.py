"""Why workers were lost, told from Ray's own exceptions, and how often is too often."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo  # type: ignore[attr-defined]
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from trainers.errors import OutOfMemory
from trainers.losses import Loss, Losses, why

GONE = "The actor died unexpectedly. Worker exit type: SYSTEM_ERROR Worker exit detail: connection error code 2. End of file."
HUNGRY = "The actor died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node running low on memory."


def dead(words: str, reason: int = NodeDeathInfo.UNSPECIFIED) -> Exception:
    context = ActorDiedErrorContext(error_message=words, actor_id=b"0" * 16, node_death_info=NodeDeathInfo(reason=reason))
    return WorkerHealthCheckFailedError("Worker 0 is not healthy", ActorDiedError(context))


WHY = [
    ("vanished", WorkerGroupError("", {0: dead(GONE)}), "killed"),
    ("out of memory by Ray's monitor", WorkerGroupError("", {1: dead(HUNGRY)}), "memory"),
    ("a task out of memory", WorkerGroupError("", {0: OutOfMemoryError("killed")}), "memory"),
    ("a bug", WorkerGroupError("", {0: ValueError("first\nsecond")}), "failed"),
    ("the owner's to mend", WorkerGroupError("", {0: RuntimeError("collective"), 1: OutOfMemory("too much", "use less")}), "user"),
    ("a notice", PreemptionError(PreemptionInfo(None, {"node": [1]})), "preempted"),
    ("no room in time", ControllerError(WorkerGroupStartupTimeoutError(2)), "no room"),
    ("Ray's own trouble", ControllerError(RuntimeError("odd")), "failed"),
]


@pytest.mark.parametrize(("error", "kind"), [row[1:] for row in WHY], ids=[row[0] for row in WHY])
def test_why(error: Exception, kind: str) -> None:
    loss = why(error)
    assert loss.kind == kind and "\n" not in loss.words
    assert (loss.error is not None) == (kind == "user")


def test_a_machine_taken_away_without_notice() -> None:
    """The others fail with it, for other reasons."""
    gone = dead(GONE, NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    assert why(WorkerGroupError("", {0: ConnectionError("reset"), 1: gone})).kind == "preempted"


def test_losses_count_until_a_new_checkpoint() -> None:
    failed = Loss("failed", "")
    losses = Losses()
    for count, checkpoint in ((1, 0), (2, 0), (1, 4), (2, 4), (3, 4), (4, 4)):
        losses = losses.after(failed, 6, checkpoint)
        assert (losses.count, losses.too_many, losses.memory) == (count, count > 3, False)


def test_killed_twice_in_one_step_is_most_likely_memory() -> None:
    killed = Loss("killed", "")
    assert not Losses().after(killed, 5, 4).after(killed, 7, 4).memory
    assert Losses().after(killed, 5, 4).after(Loss("failed", ""), 6, 4).after(killed, 5, 4).memory
    assert Losses().after(Loss("memory", ""), 5, 4).memory
