from __future__ import annotations

from pathlib import Path

import pytest

from trainers.errors import Fenced
from trainers.records import Event, OutcomeRecord, RunDir, StepRecord, checkpoint_name, parse_checkpoint_name


def step(number: int, loss: float) -> StepRecord:
    return StepRecord(
        step=number,
        num_steps=9,
        epoch=0.1,
        train_loss=loss,
        train_accuracy=0.5,
        learning_rate=1e-3,
        grad_norm=1,
        tokens=8,
        supervised_tokens=4,
        seconds=1,
    )


def test_a_record_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunDir(tmp_path, 1, "driver")
    assert run.read("outcome.json", OutcomeRecord) is None
    run.write("outcome.json", OutcomeRecord(status="succeeded"))
    read = run.read("outcome.json", OutcomeRecord)
    assert read is not None
    assert (read.status, read.attempt) == ("succeeded", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["outcome.json"]  # no temporary file is left


def test_readers_keep_keys_they_do_not_know(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text('{"status": "succeeded", "of_the_future": 1}')
    read = RunDir(tmp_path).read("outcome.json", OutcomeRecord)
    assert read is not None
    assert read.model_dump()["of_the_future"] == 1


def test_a_replaced_attempt_cannot_write(tmp_path: Path) -> None:
    old, new = RunDir(tmp_path, 1, "driver"), RunDir(tmp_path, 2, "driver")
    old.grant()
    old.event("one")
    new.grant()
    for write in (
        lambda: old.event("two"),
        lambda: old.write("outcome.json", OutcomeRecord(status="failed")),
        lambda: old.append("metrics", [step(1, 1.0)]),
        lambda: old.progress("train"),
        old.grant,
    ):
        with pytest.raises(Fenced, match="replaced by attempt 2"):
            write()
    new.event("three")
    assert [e.message for _, events in new.events() for e in events] == ["one", "three"]
    assert new.read("outcome.json", OutcomeRecord) is None


def test_events_come_once_each_with_unique_ids(tmp_path: Path) -> None:
    driver, worker = RunDir(tmp_path, 1, "driver"), RunDir(tmp_path, 1, "train")
    driver.event("a", number=1)
    worker.event("b", "warn")
    driver.append("events", [Event(message="c"), Event(message="d")])
    segments = dict(driver.events())
    events = [e for part in segments.values() for e in part]
    assert sorted(e.message for e in events) == ["a", "b", "c", "d"]
    assert len({e.id for e in events}) == 4
    assert all(e.attempt == 1 for e in events)
    driver.event("e")
    assert [e.message for _, part in driver.events(after=set(segments)) for e in part] == ["e"]


def test_a_step_made_again_counts_once(tmp_path: Path) -> None:
    RunDir(tmp_path, 1, "train").append("metrics", [step(1, 3.0), step(2, 2.0), step(3, 1.5)])
    RunDir(tmp_path, 2, "train").append("metrics", [step(3, 1.4), step(4, 1.0)])
    assert [(s.step, s.train_loss) for s in RunDir(tmp_path).steps()] == [(1, 3.0), (2, 2.0), (3, 1.4), (4, 1.0)]


def test_checkpoint_names() -> None:
    assert parse_checkpoint_name(checkpoint_name(100, 2)) == (100, 2)
    for other in ("step-000100", ".step-000100-a1.tmp", "step-x-a1", "../step-000100-a1"):
        assert parse_checkpoint_name(other) is None
