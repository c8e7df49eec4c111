"""The database: migrations, the runner's lease, and changes of state of which exactly one wins."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from service import evaluations, studies
from service.store import Checkpoint, Job, JobEvent, Row, Store, new_id
from trainers.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'x.db'}")
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def job(store: Store) -> Job:
    project = store.project_of(store.create_key("acme"))
    assert project
    return store.add_job(
        Job(
            id=new_id("ftjob-"), project_id=project.id, status="queued", request={"metadata": None}, spec={}, base="b",
            model_name="ft:b:acme::x", created_at=time.time(), result_files=[],
        )
    )  # fmt: skip


def test_migrations_make_the_schema_that_the_code_uses(tmp_path: Path) -> None:
    assert studies.Study.metadata is evaluations.Evaluation.metadata is Row.metadata  # their tables count
    url = f"sqlite:///{tmp_path / 'x.db'}"
    store = Store(url)
    store.migrate()
    store.migrate()
    store.close()
    engine = create_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Row.metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


def test_one_owner_acts(store: Store) -> None:
    assert store.hold_lease("a", 10)
    assert not store.hold_lease("b", 10)
    assert store.hold_lease("a", 0.05)
    time.sleep(0.1)
    assert store.hold_lease("b", 10)
    assert not store.hold_lease("a", 10)


def test_of_many_that_end_a_job_one_wins(store: Store, job: Job) -> None:
    store.move(job.id, "running", "")
    won: list[str] = []
    barrier = threading.Barrier(8)

    def end(status: str) -> None:
        barrier.wait()
        if store.move(job.id, status, f"now {status}"):  # type: ignore[arg-type]
            won.append(status)

    threads = [threading.Thread(target=end, args=(s,)) for s in ("succeeded", "failed", "cancelled", "queued") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final = [s for s in won if s != "queued"]
    assert len(final) == 1
    events, _ = store.events(job.id, after=None, limit=100)
    assert next(e.message for e in events if e.message.startswith("now")) == f"now {final[0]}"


@pytest.mark.parametrize("status", ["succeeded", "validating_files"])
def test_a_queued_job_cannot_jump(store: Store, job: Job, status: str) -> None:
    assert not store.move(job.id, status, "")  # type: ignore[arg-type]


def test_a_segment_is_added_whole_or_not_at_all(store: Store, job: Job) -> None:
    def event(id: str) -> JobEvent:
        return JobEvent(id=id, job_id=job.id, segment="events/1", created_at=0.0, level="info", message=id, type="message", data=None)

    store.add_segment([event("a"), event("b")])
    with pytest.raises(Exception, match="UNIQUE"):
        store.add_segment([event("c"), event("a")])
    events, _ = store.events(job.id, after=None, limit=100)
    assert [e.id for e in events][:2] == ["b", "a"] and store.known_segments(job.id) == {"events/1"}


def test_a_new_checkpoint_forgives_losses(store: Store, job: Job) -> None:
    def checkpoint(sha256: str) -> Checkpoint:
        return Checkpoint(id=new_id("ftckpt_"), job_id=job.id, step=5, created_at=0.0, metrics={"by": sha256}, manifest_sha256=sha256)

    store.change(job.id, losses=2)
    store.add_checkpoint(checkpoint("x"))
    assert store.open_jobs()[0].losses == 0
    store.change(job.id, losses=2)
    store.add_checkpoint(checkpoint("y"))  # the same step again is no progress
    assert store.open_jobs()[0].losses == 2
    assert [c.metrics for c in store.checkpoints(job.id)] == [{"by": "y"}]


@pytest.mark.parametrize("name", ["", "Acme", "a b", "../x", "x" * 33, "a:b"])
def test_a_projects_name_fits_into_a_models_name(store: Store, name: str) -> None:
    with pytest.raises(UserError):
        store.create_key(name)
