"""The policy as tables: what is seen -> what is done."""

from typing import Any

import pytest

from service.policy import (
    CheckFiles,
    Finish,
    GiveUp,
    Limits,
    Release,
    Requeue,
    Rest,
    Retry,
    Seen,
    Start,
    StopAttempt,
    Submit,
    Tell,
    Wait,
    decide,
)

LIMITS = Limits(slots=1, losses=3, backoff_s=2.0, exit_s=30.0, pause_s=600.0)
NOW = 1000.0

RUNNING: dict[str, Any] = {"status": "running", "attempt": 1}
ALIVE: dict[str, Any] = RUNNING | {"submitted": True, "ray": "alive"}
PAUSING: dict[str, Any] = ALIVE | {"status": "pausing", "training": True}
TOLD: dict[str, Any] = PAUSING | {"told": "pause", "told_at": NOW - 1}
LEFT: dict[str, Any] = TOLD | {"ray": "ended"}
STOPPED: dict[str, Any] = {"stopped": True, "ended_at": NOW - 1}

ONE = [
    ("files first", {"status": "validating_files"}, [CheckFiles("j")]),
    ("a free place", {"status": "queued"}, [Start("j", 1)]),
    ("the next attempt", {"status": "queued", "attempt": 2}, [Start("j", 3)]),
    ("after a loss", {"status": "queued", "attempt": 1, "not_before": NOW + 1}, [Wait("j", "a pause after the lost worker")]),
    ("begun, not submitted", RUNNING, [Submit("j", 1)]),
    ("at work", RUNNING | {"submitted": True, "ray": "alive"}, []),
    ("Ray does not say", RUNNING | {"submitted": True, "ray": "unknown"}, []),
    ("done, still leaving", RUNNING | {"submitted": True, "ray": "alive", "outcome": True}, [Finish("j")]),
    ("done, Ray says failed", RUNNING | {"submitted": True, "ray": "ended", "outcome": True}, [Finish("j")]),
    ("done, Ray has forgotten", RUNNING | {"submitted": True, "ray": "absent", "outcome": True}, [Finish("j")]),
    ("done before it was noted as submitted", RUNNING | {"outcome": True}, [Finish("j")]),
    ("lost", RUNNING | {"submitted": True, "ray": "ended"}, [Retry("j", 1, NOW + 2)]),
    ("lost with the cluster", RUNNING | {"submitted": True, "ray": "absent"}, [Retry("j", 1, NOW + 2)]),
    ("lost again", RUNNING | {"submitted": True, "ray": "ended", "losses": 2}, [Retry("j", 3, NOW + 32)]),
    ("lost too often", RUNNING | {"submitted": True, "ray": "ended", "losses": 3}, [GiveUp("j", 4)]),
    ("cancelled at work", {"status": "cancelled", "attempt": 1, "submitted": True, "ray": "alive"}, [StopAttempt("j")]),
    ("cancelled as it was submitted", {"status": "cancelled", "attempt": 1, "ray": "alive"}, [StopAttempt("j")]),
    ("cancelled and gone", {"status": "cancelled", "attempt": 1, "submitted": True, "ray": "ended"}, [Release("j")]),
    ("cancelled in the queue", {"status": "cancelled"}, [Release("j")]),
    ("finished, leaving", {"status": "succeeded", "attempt": 1, "submitted": True, "ray": "alive", "ended_at": NOW - 1}, []),
    (
        "finished, lingering",
        {"status": "failed", "attempt": 1, "submitted": True, "ray": "alive", "ended_at": NOW - 31},
        [StopAttempt("j")],
    ),
    ("finished and gone", {"status": "succeeded", "attempt": 1, "submitted": True, "ray": "absent"}, [Release("j")]),
    ("resized", ALIVE | {"resized": True}, [Tell("j", "resize")]),
    ("resized and told", ALIVE | {"resized": True, "told": "resize"}, []),
    ("a pause taken back", ALIVE | {"told": "pause"}, [Tell("j", "run")]),
    ("stopped as told, still leaving", ALIVE | STOPPED, []),
    ("stopped as told, lingering", ALIVE | STOPPED | {"ended_at": NOW - 31}, [StopAttempt("j")]),
    ("stopped as told and gone", ALIVE | STOPPED | {"ray": "ended"}, [Requeue("j")]),
    ("asked to pause", PAUSING, [Tell("j", "pause")]),
    ("asked to pause where a resize was told", PAUSING | {"told": "resize"}, [Tell("j", "pause")]),
    ("told to pause", TOLD, []),
    ("told to pause, long ago", TOLD | {"told_at": NOW - 601}, [StopAttempt("j")]),
    ("nothing to save", PAUSING | {"training": False}, [Tell("j", "pause"), StopAttempt("j")]),
    ("nothing to save, told", TOLD | {"training": False}, [StopAttempt("j")]),
    ("paused at a checkpoint, still leaving", TOLD | STOPPED, []),
    ("paused at a checkpoint, lingering", TOLD | STOPPED | {"ended_at": NOW - 31}, [StopAttempt("j")]),
    ("paused at a checkpoint and gone", TOLD | STOPPED | {"ray": "ended"}, [Rest("j")]),
    ("lost while pausing", LEFT, [Rest("j")]),
    ("pausing before it was submitted", RUNNING | {"status": "pausing", "ray": "absent"}, [Rest("j")]),
    ("done before the pause", TOLD | {"outcome": True}, [Finish("j")]),
    ("paused", {"status": "paused", "attempt": 1}, []),
    ("cancelled while paused", {"status": "cancelled", "attempt": 1, "ray": "ended"}, [Release("j")]),
    ("over", {"status": "succeeded", "attempt": 1, "submitted": True, "released": True}, []),
]


@pytest.mark.parametrize(("seen", "actions"), [row[1:] for row in ONE], ids=[row[0] for row in ONE])
def test_one_job(seen: dict, actions: list) -> None:
    assert decide([Seen(id="j", **seen)], True, NOW, LIMITS) == actions


NO_CLUSTER = [
    ("queued", {"status": "queued"}, [Wait("j", "the Ray cluster does not answer")]),
    ("begun", RUNNING, []),
    ("at work", RUNNING | {"submitted": True}, []),
    ("done", RUNNING | {"submitted": True, "outcome": True}, [Finish("j")]),
    ("cancelled", {"status": "cancelled", "attempt": 1, "submitted": True}, []),
    ("files", {"status": "validating_files"}, [CheckFiles("j")]),
    ("pausing", TOLD | {"ray": "unknown", "training": False}, []),
]


@pytest.mark.parametrize(("seen", "actions"), [row[1:] for row in NO_CLUSTER], ids=[row[0] for row in NO_CLUSTER])
def test_without_a_cluster(seen: dict, actions: list) -> None:
    assert decide([Seen(id="j", **seen)], False, NOW, LIMITS) == actions


def test_the_oldest_first_and_the_others_know_their_place() -> None:
    jobs = [Seen(id=name, status="queued") for name in "abc"]
    waits = [Wait("b", "waiting for the job before it: 1 ahead"), Wait("c", "waiting for the job before it: 2 ahead")]
    assert decide(jobs, True, NOW, LIMITS) == [Start("a", 1), *waits]


def test_a_final_job_holds_its_place_until_it_has_left() -> None:
    leaving = Seen(id="a", status="succeeded", attempt=1, submitted=True, ray="alive", ended_at=NOW)
    assert decide([leaving, Seen(id="b", status="queued")], True, NOW, LIMITS) == [Wait("b", "waiting for the job before it: 1 ahead")]
    gone = Seen(id="a", status="succeeded", attempt=1, submitted=True, ray="ended", ended_at=NOW)
    assert decide([gone, Seen(id="b", status="queued")], True, NOW, LIMITS) == [Release("a"), Start("b", 1)]


def test_a_pausing_job_holds_its_place_until_it_has_left() -> None:
    waiting = Seen(id="b", status="queued")
    assert decide([Seen(id="a", **TOLD), waiting], True, NOW, LIMITS) == [Wait("b", "waiting for the job before it: 1 ahead")]
    assert decide([Seen(id="a", **LEFT), waiting], True, NOW, LIMITS) == [Rest("a"), Start("b", 1)]
    assert decide([Seen(id="a", status="paused", attempt=1), waiting], True, NOW, LIMITS) == [Start("b", 1)]


def test_a_job_in_its_pause_lets_others_pass() -> None:
    jobs = [Seen(id="a", status="queued", attempt=1, not_before=NOW + 5), Seen(id="b", status="queued")]
    assert decide(jobs, True, NOW, LIMITS)[-1] == Start("b", 1)


def test_two_places() -> None:
    jobs = [Seen(id=name, status="queued") for name in "abc"]
    assert decide(jobs, True, NOW, Limits(slots=2))[:2] == [Start("a", 1), Start("b", 1)]
