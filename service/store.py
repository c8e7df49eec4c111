"""The database: the truth about projects, keys, files, jobs, their events and checkpoints.

Every row belongs to a project, and every question is asked in a project's name. A change of a job's status is one
`UPDATE ... WHERE status IN (allowed)`, so of two writers (the API cancels, the runner finishes) exactly one wins.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, BigInteger, ForeignKey, Select, UniqueConstraint, create_engine, delete, event, make_url, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from service.states import ACTIVE, FINAL, Status, sources_of
from trainers.errors import UserError

ALPHABET = string.ascii_letters + string.digits
READS = "tuneyard_reads"
"""Marks a connection whose transaction changes nothing."""
PROJECT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


class Row(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON}  # noqa: RUF012 (SQLAlchemy's own form)


class Listed(Row):
    """A row that lists page through, by `seq`, with the wire's `id` as the cursor."""

    __abstract__ = True
    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)


class Project(Row):
    __tablename__ = "projects"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]


class Key(Row):
    """An API key. Only its hash is kept; keys are long and random, so a plain SHA-256 is enough."""

    __tablename__ = "keys"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    created_at: Mapped[float]


class File(Listed):
    __tablename__ = "files"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    filename: Mapped[str]
    path: Mapped[str]
    """Relative to the home."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]


class Job(Listed):
    __tablename__ = "jobs"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    status: Mapped[str] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    """What is echoed as asked (model, files, metadata), and `requested_by`: the project and the name of the key."""
    spec: Mapped[dict[str, Any]]
    """The whole JobSpec; its data paths are file ids."""
    base: Mapped[str]
    """Catalogue id of the base model."""
    model_name: Mapped[str] = mapped_column(unique=True)
    """The tuned model's name, on the wire once the job has succeeded."""
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    result_files: Mapped[list[str]]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    model_deleted: Mapped[bool] = mapped_column(default=False)
    reason: Mapped[str | None]
    """Why a queued job waits."""
    attempt: Mapped[int] = mapped_column(default=0)
    submitted: Mapped[bool] = mapped_column(default=False)
    released: Mapped[bool] = mapped_column(default=False)
    losses: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[float] = mapped_column(default=0.0)
    workers: Mapped[int | None]
    """Training workers that the last resize asked for; None leaves it to the spec."""


class JobEvent(Listed):
    """Ids of the run directory's events are kept, so that reading a segment twice adds nothing."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    segment: Mapped[str | None]
    """The run directory's file it came from; None for the service's own."""
    created_at: Mapped[float]
    level: Mapped[str]
    message: Mapped[str]
    type: Mapped[str]
    data: Mapped[dict[str, Any] | None]


class Checkpoint(Listed):
    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("job_id", "step"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    step: Mapped[int]
    created_at: Mapped[float]
    metrics: Mapped[dict[str, Any]]
    manifest_sha256: Mapped[str]


class Demand(Row):
    """A serving app that chat requests asked for, and what the cluster says about it."""

    __tablename__ = "demand"
    app: Mapped[str] = mapped_column("base", primary_key=True)
    """A base's catalogue id, or the id of the job whose whole tuned model it answers with."""
    asked_at: Mapped[float] = mapped_column(default=0.0)
    status: Mapped[str] = mapped_column(default="")
    message: Mapped[str] = mapped_column(default="")
    addresses: Mapped[list[str]] = mapped_column(JSON, default=list)
    """Its replicas, each host:port; none where requests go through Serve's proxy."""


class Once(Row):
    """A create request that carried an Idempotency-Key."""

    __tablename__ = "once"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str]
    created_at: Mapped[float]


class RunnerLease(Row):
    """Which runner acts; one row."""

    __tablename__ = "runner_lease"
    name: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    expires_at: Mapped[float]


R = TypeVar("R", bound=Listed)


def new_id(prefix: str) -> str:
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(24))


class Store:
    """All questions and changes. Safe to share between threads; each call is one transaction."""

    def __init__(self, url: str) -> None:
        if make_url(url).get_backend_name() == "sqlite":
            # Connections are open files and cost nothing: as many as the API has threads, or requests would wait for each other.
            self._engine = create_engine(url, pool_size=40)
            event.listen(self._engine, "connect", _sqlite_connect)
            event.listen(self._engine, "begin", _sqlite_begin)
        else:
            self._engine = create_engine(url, pool_pre_ping=True)
        self._reader = self._engine.execution_options(**{READS: True})

    def close(self) -> None:
        self._engine.dispose()

    def migrate(self) -> None:
        """Bring the schema to the newest revision."""
        config = Config()
        config.set_main_option("script_location", "service:migrations")
        config.set_main_option("path_separator", "os")
        with self._engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One transaction that changes nothing: in SQLite it waits for no writer, and none for it."""
        with Session(self._reader, expire_on_commit=False, autoflush=False) as session, session.begin():
            yield session
            assert not (session.new or session.dirty or session.deleted), "changed in a transaction that only reads"

    # -- projects and keys -------------------------------------------------------------------------------------------

    def create_key(self, project: str) -> str:
        """A new key for the project of this name, which is made if need be. The key is shown once and kept as a hash."""
        if not PROJECT_NAME.fullmatch(project):
            raise UserError(f"`{project}` cannot name a project.", "Use 1 to 32 lower-case letters, digits and hyphens.", "project")
        key = "ty-" + secrets.token_urlsafe(32)
        with self.session() as session:
            row = session.scalar(select(Project).where(Project.name == project))
            if row is None:
                row = Project(id=new_id("proj_"), name=project, created_at=time.time())
                session.add(row)
                session.flush()
            session.add(Key(sha256=_sha256(key), project_id=row.id, created_at=time.time()))
        return key

    def project_of(self, key: str) -> Project | None:
        with self.reading() as session:
            return session.scalar(select(Project).join(Key, Key.project_id == Project.id).where(Key.sha256 == _sha256(key)))

    def lend_key(self, project_id: str) -> str:
        """A key for work that the service does in this project's name; forget it when the work is done."""
        key = "ty-" + secrets.token_urlsafe(32)
        with self.session() as session:
            session.add(Key(sha256=_sha256(key), project_id=project_id, created_at=time.time()))
        return key

    def forget_key(self, key: str) -> None:
        with self.session() as session:
            session.execute(delete(Key).where(Key.sha256 == _sha256(key)))

    # -- files -------------------------------------------------------------------------------------------------------

    def add_file(self, file: File) -> None:
        """Add a file; one of the same id is left as it is."""
        with self.session() as session:
            if session.scalar(select(File.seq).where(File.id == file.id)) is None:
                session.add(file)

    def file(self, project_id: str, file_id: str) -> File | None:
        with self.reading() as session:
            return session.scalar(_live_files().where(File.project_id == project_id, File.id == file_id))

    def files(self, project_id: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool) -> tuple[list[File], bool]:
        """(files, more follow) after the file with id `after`."""
        query = _live_files().where(File.project_id == project_id)
        if purpose:
            query = query.where(File.purpose == purpose)
        return self.page(File, query, after, limit, newest_first)

    def delete_file(self, project_id: str, file_id: str) -> None:
        """Forget a file; refused while a job needs it."""
        with self.session() as session:
            for job in session.scalars(select(Job).where(Job.project_id == project_id, Job.status.in_(ACTIVE))):
                if file_id in json.dumps(job.spec):
                    raise UserError(f"File `{file_id}` is in use by job `{job.id}`.", "Wait for the job's end or cancel it.", "file_id")
            row = session.scalar(select(File).where(File.project_id == project_id, File.id == file_id))
            if row is not None:
                session.delete(row)

    def expired_files(self) -> list[File]:
        """Files whose time is over and that no job needs."""
        with self.reading() as session:
            needed = " ".join(json.dumps(job.spec) for job in session.scalars(select(Job).where(Job.status.in_(ACTIVE))))
            return [f for f in session.scalars(select(File).where(File.expires_at <= time.time())) if f.id not in needed]

    # -- jobs --------------------------------------------------------------------------------------------------------

    def add_job(self, job: Job, once: Once | None = None) -> Job:
        """Add a job. With `once`: a job that the same key made before, from the same body, is returned instead."""
        try:
            with self.session() as session:
                session.add(job)
                session.flush()
                session.add(_own_event(job.id, f"Created fine-tuning job: {job.id}", "info"))
                if once is not None:
                    session.execute(delete(Once).where(Once.created_at < time.time() - 600))
                    session.add(once)
        except IntegrityError:
            if once is None:
                raise
            with self.session() as session:
                first = session.get_one(Once, (once.project_id, once.key))
                if first.body_sha256 != once.body_sha256:
                    raise UserError("This Idempotency-Key came with another body before.", "Use a new key for a new job.") from None
                return session.scalars(select(Job).where(Job.id == first.job_id)).one()
        return job

    def job(self, project_id: str, job_id: str) -> Job | None:
        with self.reading() as session:
            return session.scalar(select(Job).where(Job.project_id == project_id, Job.id == job_id))

    def jobs(
        self, project_id: str, *, after: str | None, limit: int, metadata: dict[str, str] | None = None, no_metadata: bool = False
    ) -> tuple[list[Job], bool]:
        """(jobs, more follow), newest first, whose metadata holds all pairs of `metadata` (or which have none at all)."""
        query = select(Job).where(Job.project_id == project_id)
        if not metadata and not no_metadata:
            return self.page(Job, query, after, limit, True)
        # Databases disagree on JSON paths with odd keys, and a project has thousands of jobs, not millions.
        found: list[Job] = []
        more = True
        while more and len(found) <= limit:
            rows, more = self.page(Job, query, after, 1000, True)
            after = rows[-1].id if rows else None
            for job in rows:
                pairs = job.request.get("metadata")
                if (not pairs) if no_metadata else (metadata or {}).items() <= (pairs or {}).items():
                    found.append(job)
        return found[:limit], len(found) > limit

    def job_by_model(self, project_id: str, model_name: str) -> Job | None:
        with self.reading() as session:
            query = select(Job).where(Job.project_id == project_id, Job.model_name == model_name, Job.model_deleted.is_(False))
            return session.scalar(query)

    def tuned(self, project_id: str | None = None) -> list[Job]:
        """Jobs whose model answers, of one project or of all."""
        query = select(Job).where(Job.status == "succeeded", Job.model_deleted.is_(False)).order_by(Job.seq)
        with self.reading() as session:
            return list(session.scalars(query if project_id is None else query.where(Job.project_id == project_id)))

    def open_jobs(self) -> list[Job]:
        """Jobs of all projects that the runner must look at, oldest first."""
        with self.reading() as session:
            return list(session.scalars(select(Job).where((Job.status.in_(ACTIVE)) | (Job.released.is_(False))).order_by(Job.seq)))

    def change(self, job_id: str, **values: Any) -> None:
        """Set columns other than the status."""
        with self.session() as session:
            session.execute(update(Job).where(Job.id == job_id).values(**values))

    def move(self, job_id: str, to: Status, message: str, level: str = "info", since: Status | None = None, **values: Any) -> bool:
        """Change a job's status, with an event, if its present one allows it (with `since`: if it is that one); False when it does not."""
        if to in FINAL:
            values.setdefault("finished_at", time.time())
        with self.session() as session:
            allowed = sources_of(to) if since is None else sources_of(to) & {since}
            query = update(Job).where(Job.id == job_id, Job.status.in_(allowed))
            moved = session.execute(query.values(status=to, reason=None, **values)).rowcount == 1  # type: ignore[attr-defined]
            if moved:
                session.add(_own_event(job_id, message, level))
            return moved

    # -- events and checkpoints --------------------------------------------------------------------------------------

    def add_event(self, job_id: str, message: str, level: str = "info", data: dict[str, Any] | None = None) -> None:
        with self.session() as session:
            session.add(_own_event(job_id, message, level, data))

    def known_segments(self, job_id: str) -> set[str]:
        with self.reading() as session:
            return {s for s in session.scalars(select(JobEvent.segment).where(JobEvent.job_id == job_id).distinct()) if s}

    def add_segment(self, events: Sequence[JobEvent]) -> None:
        """Add a segment's events, all or none."""
        with self.session() as session:
            session.add_all(events)

    def events(self, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
        """(events, more follow), newest first."""
        return self.page(JobEvent, select(JobEvent).where(JobEvent.job_id == job_id), after, limit, True)

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Add a checkpoint, or replace the record of one that a later attempt wrote again."""
        with self.session() as session:
            found = session.scalar(select(Checkpoint).where(Checkpoint.job_id == checkpoint.job_id, Checkpoint.step == checkpoint.step))
            if found is None:
                session.add(checkpoint)
                # Progress: workers lost before it no longer count.
                session.execute(update(Job).where(Job.id == checkpoint.job_id).values(losses=0))
            elif found.manifest_sha256 != checkpoint.manifest_sha256:
                found.metrics, found.manifest_sha256 = checkpoint.metrics, checkpoint.manifest_sha256

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """All checkpoints of a job, newest first."""
        with self.reading() as session:
            return list(session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())))

    # -- serving -----------------------------------------------------------------------------------------------------

    def ask_for(self, app: str, every_s: float = 30.0) -> list[str]:
        """Note that a chat request needs this app; a note that is younger than `every_s` stands, which spares a write per request. Returns
        the addresses of its replicas."""
        with self.reading() as session:
            row = session.get(Demand, app)
        if row is None or time.time() - row.asked_at > every_s:
            with self.session() as session:
                row = session.get(Demand, app) or Demand(app=app, addresses=[])
                row.asked_at = time.time()
                session.add(row)
        return row.addresses

    def demand(self, since: float = 0.0) -> list[Demand]:
        with self.reading() as session:
            return list(session.scalars(select(Demand).where(Demand.asked_at >= since).order_by(Demand.app)))

    def app_status(self, app: str) -> tuple[str, str, list[str]]:
        """(status, message, addresses) of an app as last seen; empty when nothing is known."""
        with self.reading() as session:
            row = session.get(Demand, app)
            return (row.status, row.message, row.addresses) if row else ("", "", [])

    def note_app(self, app: str, status: str, message: str, addresses: Sequence[str] = ()) -> None:
        with self.reading() as session:
            row = session.get(Demand, app)
        if row is not None and (row.status, row.message, row.addresses) == (status, message, [*addresses]):
            return
        with self.session() as session:
            row = session.get(Demand, app) or Demand(app=app)
            row.status, row.message, row.addresses = status, message, [*addresses]
            session.add(row)

    def forget_app(self, app: str) -> None:
        """Its model is gone: nobody can ask for it any more."""
        with self.session() as session:
            session.execute(delete(Demand).where(Demand.app == app))

    # -- the runner's lease ------------------------------------------------------------------------------------------

    def hold_lease(self, owner: str, seconds: float) -> bool:
        """Take or renew the right to act; False while another owner holds it."""
        now = time.time()
        with self.session() as session:
            taken = session.execute(
                update(RunnerLease)
                .where(RunnerLease.name == "runner", (RunnerLease.owner == owner) | (RunnerLease.expires_at < now))
                .values(owner=owner, expires_at=now + seconds)
            )
            if taken.rowcount == 1:  # type: ignore[attr-defined]
                return True
            if session.get(RunnerLease, "runner") is not None:
                return False
        try:
            with self.session() as session:
                session.add(RunnerLease(name="runner", owner=owner, expires_at=now + seconds))
            return True
        except IntegrityError:
            return False

    def page(self, kind: type[R], query: Select[R], after: str | None, limit: int, newest_first: bool) -> tuple[list[R], bool]:
        """(rows, more follow) of a list, after the row with id `after`."""
        with self.reading() as session:
            if after is not None:
                cursor = session.scalar(select(kind.seq).where(kind.id == after))
                if cursor is None:
                    raise UserError(
                        f"`after` names `{after}`, which is not in this list.", "Pass the id of the last item of the page before.", "after"
                    )
                query = query.where(kind.seq < cursor if newest_first else kind.seq > cursor)
            rows = list(session.scalars(query.order_by(kind.seq.desc() if newest_first else kind.seq).limit(limit + 1)))
            return rows[:limit], len(rows) > limit


def _live_files() -> Select[File]:
    return select(File).where((File.expires_at.is_(None)) | (File.expires_at > time.time()))


def _own_event(job_id: str, message: str, level: str, data: dict[str, Any] | None = None) -> JobEvent:
    return JobEvent(
        id=new_id("ftevent-"), job_id=job_id, segment=None, created_at=time.time(), level=level, message=message, type="message", data=data
    )


def key_name(key: str) -> str:
    """What a key is called where it must not be shown: the beginning of its hash, enough to tell which one it was."""
    return f"key_{_sha256(key)[:12]}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sqlite_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where we say so, below
    connection.execute("PRAGMA busy_timeout=30000")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _sqlite_begin(connection: Any) -> None:
    if connection.get_execution_options().get(READS):
        connection.exec_driver_sql("BEGIN")
        return
    # A transaction that reads first and writes later can lose to another writer without waiting; one that starts as a
    # writer waits its turn.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
