"""/v1/tuneyard/evaluations: compare a tuned model with another one, beside the service."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from service import evaluations
from service.api.auth import Caller, Cluster, Config, Db
from service.api.create import check_judge
from service.api.errors import NotFound
from service.api.models import CHECKPOINT, target
from service.evaluations import Evaluation
from service.order import EvaluationOrder, Side
from service.settings import Settings
from service.store import Project, Store, new_id
from trainers.catalogue import find
from trainers.errors import UserError
from trainers.records import ModelRecord, PrepareRecord, RunDir, StageProgress
from trainers.spec import EvalTask, Judge

router = APIRouter(prefix="/v1/tuneyard/evaluations")


class CreateEvaluation(BaseModel):
    """What to compare, and on what. Code of one's own has no place here: it runs on the command line only."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1)]
    against: str | None = None
    """The model to compare with; the tuned model's own base by default."""
    tasks: Annotated[list[EvalTask], Field(max_length=100)] = []
    """As in a job's `evaluate.tasks`; their paths are ids of uploaded files. Without any, only the loss on held-out answers is measured."""
    slice_by: str | None = None
    judge: Judge | None = None


@router.post("")
def create(settings: Config, store: Db, link: Cluster, caller: Caller, body: CreateEvaluation) -> dict[str, Any]:
    tuned = _side(settings, store, caller, body.model)
    job = store.job_by_model(caller.id, step[1] if (step := CHECKPOINT.fullmatch(body.model)) else body.model)
    against = body.against or (job.base if job else None)
    if against is None:
        raise UserError(f"`{body.model}` is a base model.", "Name the model to compare it with.", "against")
    prepared = RunDir(settings.runs / job.id).read("prepare.json", PrepareRecord) if job else None
    if not body.tasks and prepared is None:
        raise UserError("There is nothing to evaluate on.", "Give `tasks`: held-out conversations.", "tasks")
    check_judge(body.judge, settings)
    judging = _side(settings, store, caller, body.judge.model) if body.judge and body.judge.url is None else None
    order = EvaluationOrder(
        base=_side(settings, store, caller, against),
        tuned=tuned,
        tasks=[_task(task, i, settings, store, caller) for i, task in enumerate(body.tasks)],
        slice_by=body.slice_by,
        judge=body.judge,
        judging=judging,
        store=prepared.store if prepared else None,
    )
    row = Evaluation(
        id=new_id("eval_"),
        project_id=caller.id,
        status="queued",
        model=body.model,
        against=against,
        order=order.model_dump(mode="json"),
        created_at=time.time(),
    )
    evaluations.add(store, row)
    link.changed.set()
    return to_wire(settings, row)


def _side(settings: Settings, store: Store, caller: Project, name: str) -> Side:
    found = target(store, settings, caller, name)
    if found.app.startswith("ftjob-"):
        run = RunDir(settings.runs / found.app)
        record = run.read("model.json", ModelRecord)
        assert record is not None and record.merged is not None  # `target` found it
        folder = run.path(record.merged)
    else:
        folder = settings.models / find(found.app).id
    return Side(name=name, app=found.app, adapter=str(found.adapter) if found.adapter else None, folder=str(folder))


def _task(task: EvalTask, number: int, settings: Settings, store: Store, caller: Project) -> EvalTask:
    if settings.grants(task.path):
        return task.model_copy(update={"name": task.shown})
    file = store.file(caller.id, task.path)
    if file is None:
        remedy = "Upload the file and put its id here; of URLs, only those are read that TUNEYARD_DATA_URLS grants."
        raise UserError(f"`{task.path}` is not a file of this project.", remedy, f"tasks[{number}].path")
    return task.model_copy(update={"path": str(settings.home / file.path), "name": task.name or file.filename})


@router.get("")
def list_evaluations(
    settings: Config, store: Db, caller: Caller, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    rows, more = evaluations.page(store, caller.id, after, limit)
    return {"object": "list", "data": [to_wire(settings, row) for row in rows], "has_more": more}


@router.get("/{id}")
def retrieve(settings: Config, store: Db, caller: Caller, id: str) -> dict[str, Any]:
    """One evaluation, with its result once it has succeeded."""
    row = _existing(store, caller, id)
    result = _read(settings, row, "evaluation.json") if row.status == "succeeded" else None
    return to_wire(settings, row) | {"result": json.loads(result) if result else None}


@router.post("/{id}/cancel")
def cancel(settings: Config, store: Db, link: Cluster, caller: Caller, id: str) -> dict[str, Any]:
    _existing(store, caller, id)
    if not evaluations.move(store, id, evaluations.OPEN, status="cancelled"):
        raise UserError(f"Evaluation `{id}` is over.", "There is nothing left to cancel.", "id")
    link.changed.set()
    return to_wire(settings, _existing(store, caller, id))


@router.get("/{id}/answers")
def answers(settings: Config, store: Db, caller: Caller, id: str) -> Response:
    """Every case with both models' answers, as JSONL."""
    return FileResponse(_file(settings, _existing(store, caller, id), "answers.jsonl"), media_type="application/jsonl")


@router.get("/{id}/report")
def report(settings: Config, store: Db, caller: Caller, id: str) -> Response:
    """The result as one HTML page."""
    return FileResponse(_file(settings, _existing(store, caller, id), "evaluation.html"), media_type="text/html")


def to_wire(settings: Settings, row: Evaluation) -> dict[str, Any]:
    progress = RunDir(evaluations.folder(settings, row.id)).read("progress.json", StageProgress)
    return {
        "id": row.id,
        "object": "tuneyard.evaluation",
        "created_at": int(row.created_at),
        "finished_at": int(row.finished_at) if row.finished_at else None,
        "status": row.status,
        "model": row.model,
        "against": row.against,
        "tasks": [task["name"] for task in row.order["tasks"]],
        "progress": progress.data if progress else None,
        "error": row.error,
    }


def _existing(store: Store, caller: Project, id: str) -> Evaluation:
    row = evaluations.get(store, caller.id, id)
    if row is None:
        raise NotFound(f"There is no evaluation `{id}`.", "List yours with GET /v1/tuneyard/evaluations.", "id")
    return row


def _file(settings: Settings, row: Evaluation, name: str) -> Path:
    path = evaluations.folder(settings, row.id) / name
    if not path.exists():
        raise NotFound(f"Evaluation `{row.id}` has no {name} yet.", "Look again when it has succeeded.", "id")
    return path


def _read(settings: Settings, row: Evaluation, name: str) -> bytes | None:
    try:
        return (evaluations.folder(settings, row.id) / name).read_bytes()
    except FileNotFoundError:
        return None
