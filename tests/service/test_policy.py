"""The policy as tables: what is seen -> what is done."""

import pytest

from service.policy import CheckFiles, Finish, GiveUp, Limits, Release, Retry, Seen, Start, StopAttempt, Submit, Wait, decide

LIMITS = Limits(slots=1, losses=3, backoff_s=2.0, exit_s=30.0)
NOW = 1000.0

RUNNING = {"status": "running", "attempt": 1}

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


def test_a_job_in_its_pause_lets_others_pass() -> None:
    jobs = [Seen(id="a", status="queued", attempt=1, not_before=NOW + 5), Seen(id="b", status="queued")]
    assert decide(jobs, True, NOW, LIMITS)[-1] == Start("b", 1)


def test_two_places() -> None:
    jobs = [Seen(id=name, status="queued") for name in "abc"]
    assert decide(jobs, True, NOW, Limits(slots=2))[:2] == [Start("a", 1), Start("b", 1)]
