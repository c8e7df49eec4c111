"""Evaluations that are asked for by themselves: their rows, and the runner's part, which hands them to Ray and sees how they end.

One Ray job per attempt, like a training job's. Its answers are kept as they come, so a lost attempt costs nothing but its last second.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ForeignKey, select, update
from sqlalchemy.orm import Mapped, mapped_column

from service.link import Link
from service.order import EvaluationOrder
from service.settings import Settings
from service.store import Listed, Store
from trainers.errors import TuneyardError, Unavailable
from trainers.records import OutcomeRecord, RunDir

log = logging.getLogger("tuneyard.runner")

OPEN = ("queued", "running")
MOST_ATTEMPTS = 8
AT_ONCE = 2
"""Evaluations that run at a time: more would only make each slower."""


class Evaluation(Listed):
    """A comparison of two models: `queued`, `running`, then `succeeded`, `failed` or `cancelled`."""

    __tablename__ = "evaluations"
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    status: Mapped[str] = mapped_column(index=True)
    model: Mapped[str]
    against: Mapped[str]
    order: Mapped[dict[str, Any]]
    """An EvaluationOrder; where apps answer is filled in for each attempt."""
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    attempt: Mapped[int] = mapped_column(default=0)
    submitted: Mapped[bool] = mapped_column(default=False)
    """The newest attempt was handed to Ray, and may still be there."""


def add(store: Store, row: Evaluation) -> None:
    with store.session() as session:
        session.add(row)


def get(store: Store, project_id: str, id: str) -> Evaluation | None:
    with store.reading() as session:
        return session.scalar(select(Evaluation).where(Evaluation.project_id == project_id, Evaluation.id == id))


def page(store: Store, project_id: str, after: str | None, limit: int) -> tuple[list[Evaluation], bool]:
    """(evaluations, more follow), newest first."""
    return store.page(Evaluation, select(Evaluation).where(Evaluation.project_id == project_id), after, limit, True)


def move(store: Store, id: str, since: tuple[str, ...], **values: Any) -> bool:
    """Change a row whose status is one of `since`; False when it is not: of two writers exactly one wins."""
    if values.get("status") in ("succeeded", "failed", "cancelled"):
        values.setdefault("finished_at", time.time())
    with store.session() as session:
        query = update(Evaluation).where(Evaluation.id == id, Evaluation.status.in_(since)).values(**values)
        return session.execute(query).rowcount == 1  # type: ignore[attr-defined]


def folder(settings: Settings, id: str) -> Path:
    return settings.home / "evaluations" / id


class Evaluations:
    """What the runner does for evaluations in each of its steps. Each act can be done twice."""

    def __init__(self, settings: Settings, store: Store, link: Link) -> None:
        self.settings, self.store, self.link = settings, store, link

    def step(self) -> None:
        with self.store.reading() as session:
            unfinished = Evaluation.status.in_(OPEN) | Evaluation.submitted.is_(True)
            rows = list(session.scalars(select(Evaluation).where(unfinished).order_by(Evaluation.seq)))
        running = sum(row.status == "running" for row in rows)
        for row in rows:
            try:
                if row.status == "queued" and running < AT_ONCE:
                    running += move(self.store, row.id, ("queued",), status="running", attempt=1)
                    row.status, row.attempt = "running", 1
                if row.status == "running":
                    self._advance(row)
                elif row.status not in OPEN:
                    self._release(row)
            except Unavailable as error:
                log.warning("evaluation %s: %s", row.id, error)

    def _advance(self, row: Evaluation) -> None:
        order = EvaluationOrder.model_validate(row.order)
        for side in order.sides:
            self.store.ask_for(side.app)
        if not row.submitted:
            self._submit(row, order)
            return
        state, words = self.link.ray.state(_submission(row))
        outcome = self._outcome(row)  # only now: read before Ray's answer, it could miss one that was written in between
        if outcome is not None:
            status = "succeeded" if outcome.status == "succeeded" else "failed"
            move(self.store, row.id, ("running",), status=status, error=outcome.error, submitted=False)
        elif state != "alive":
            if row.attempt >= MOST_ATTEMPTS:
                error = {
                    "code": "worker_lost",
                    "message": f"It was lost {row.attempt} times: {self._last_words(row) or words}",
                    "param": None,
                }
                move(self.store, row.id, ("running",), status="failed", error=error, submitted=False)
            else:
                move(self.store, row.id, ("running",), attempt=row.attempt + 1, submitted=False)

    def _submit(self, row: Evaluation, order: EvaluationOrder) -> None:
        run = RunDir(folder(self.settings, row.id), row.attempt, "runner")
        run.grant()
        order.urls = {side.app: self.link.serve_url(side.app) for side in order.sides}
        order.serve_token_file = str(self.settings.serve_token_file)
        run.write("order.json", order)
        log_file = run.path("logs", f"attempt-{row.attempt:04d}.log")
        log_file.parent.mkdir(parents=True, exist_ok=True)
        command = f"exec {shlex.quote(sys.executable)} -m service.evaluating {shlex.quote(str(run.root))} --attempt {row.attempt}"
        self.link.ray.submit(_submission(row), f"{command} >> {shlex.quote(str(log_file))} 2>&1")
        move(self.store, row.id, ("running",), submitted=True)

    def _last_words(self, row: Evaluation) -> str:
        """The last line of what the attempt printed."""
        try:
            text = (folder(self.settings, row.id) / "logs" / f"attempt-{row.attempt:04d}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return next((line.strip()[:300] for line in reversed(text.splitlines()) if line.strip()), "")

    def _release(self, row: Evaluation) -> None:
        """It was cancelled: a later attempt's lease keeps the old one from writing while it dies."""
        RunDir(folder(self.settings, row.id), row.attempt + 1, "runner").grant()
        self.link.ray.stop(_submission(row))
        move(self.store, row.id, (row.status,), submitted=False)

    def _outcome(self, row: Evaluation) -> OutcomeRecord | None:
        try:
            record = RunDir(folder(self.settings, row.id)).read("outcome.json", OutcomeRecord)
        except ValidationError as error:
            raise TuneyardError(f"The outcome of {row.id} cannot be read: {error}.") from None
        return record if record is not None and record.attempt == row.attempt else None


def _submission(row: Evaluation) -> str:
    return f"{row.id}-{row.attempt}"
