"""/v1/tuneyard: what OpenAI's wire has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from service.api.auth import Caller, Cluster, Config, Db
from service.api.create import Create, spec_of
from service.api.errors import NotFound
from service.api.files import existing as existing_file
from service.api.jobs import existing, over
from service.link import Link
from service.runner import attempt_log
from service.settings import Settings
from service.states import ACTIVE, FINAL
from trainers.catalogue import find
from trainers.errors import Unavailable, UserError
from trainers.fetch import ensure
from trainers.preview import preview as look
from trainers.records import RunDir, StageProgress, TrainRecord, rank_log
from trainers.tokens import whole_tokenizer

router = APIRouter(prefix="/v1/tuneyard")

LOG_BYTES = 256 * 2**10


@router.get("/status")
def status(store: Db, link: Cluster, caller: Caller) -> dict[str, Any]:
    """Is the cluster there, what does it have, which models are loaded, how many jobs wait."""
    try:
        resources = {name: {"used": used, "total": total} for name, (used, total) in link.ray.resources().items()}
        cluster: dict[str, Any] = {"answers": True, "address": link.ray.address, "resources": resources}
    except Unavailable as error:
        cluster = {"answers": False, "address": link.ray.address, "message": str(error)}
    mine = [job for job in store.open_jobs() if job.project_id == caller.id]
    counts = {name: sum(job.status == name for job in mine) for name in sorted(ACTIVE)}
    names = {job.id: job.model_name for job in (*mine, *store.tuned(caller.id))}
    rows = [row for row in store.demand() if not row.app.startswith("ftjob-") or row.app in names]  # nobody sees another project's models
    apps = [{"model": names.get(row.app, row.app), "status": row.status, "message": row.message} for row in rows]
    return {"object": "tuneyard.status", "project": caller.name, "cluster": cluster, "apps": apps, "jobs": counts}


class PreviewRequest(Create):
    """A job as POST /v1/fine_tuning/jobs takes it; `job` alone is enough. And which of its rows."""

    model: str = ""
    training_file: str = ""
    limit: Annotated[int, Field(ge=1, le=20)] = 3
    skip: Annotated[int, Field(ge=0, le=10_000)] = 0


@router.post("/preview")
def preview(settings: Config, store: Db, caller: Caller, body: PreviewRequest) -> dict[str, Any]:
    """The first examples of a job as tokens with weights. No more of the data is read than is shown."""
    spec, base = spec_of(_named(body), settings, store, caller)

    def path_of(file_id: str) -> str:
        return file_id if settings.grants(file_id) else str(settings.home / existing_file(store, caller, file_id).path)

    return look(spec.with_paths(path_of), ensure(base, settings.models), body.limit, body.skip).model_dump(mode="json")


def _named(body: PreviewRequest) -> PreviewRequest:
    """The request with model and training file taken from `job`, where only that names them."""
    job = body.job or {}
    model, data = (part if isinstance(part := job.get(name), dict) else {} for name in ("model", "data"))
    train = data.get("train")
    first = train[0] if isinstance(train, list) and train and isinstance(train[0], dict) else {}
    names = {"model": body.model or model.get("base"), "training_file": body.training_file or first.get("path")}
    for name, value in names.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"`{name}` is missing.", "Give it, or a whole `job`.", name)
    return body.model_copy(update=names)


@router.get("/jobs/{job_id}")
def job(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    """What the job does now: stage, numbers of its progress, why it waits, which attempt, where its files lie."""
    row = existing(store, caller, job_id)
    run = RunDir(settings.runs / row.id)
    progress = run.read("progress.json", StageProgress)
    return {
        "object": "tuneyard.job",
        "id": row.id,
        "status": row.status,
        "stage": progress.message if progress else None,
        "progress": progress.model_dump(mode="json") if progress else None,
        "queue_reason": row.reason,
        "attempt": row.attempt,
        "losses": row.losses,
        "workers": row.workers,
        "timing": _json(settings, row.id, "timing.json"),
        "run_dir": str(run.root),
        "model": row.model_name,
        "spec": row.spec,
        "resolved": _json(settings, row.id, "resolved.json"),
    }


class Resize(BaseModel):
    workers: Annotated[int, Field(ge=1, le=1024)]
    """Training workers of all attempts from the next on, whatever `scale.workers` says."""


@router.post("/jobs/{job_id}/resize")
def resize(settings: Config, store: Db, link: Cluster, caller: Caller, job_id: str, body: Resize) -> dict[str, Any]:
    """Go on with another number of workers: a running job stops at its next checkpoint and starts again; it computes the same."""
    row = existing(store, caller, job_id)
    if row.status in FINAL:
        raise over(row, "resize")
    trained = RunDir(settings.runs / row.id).read("train.json", TrainRecord)
    if trained is not None and trained.status == "finished":
        raise UserError(f"The training of job `{job_id}` is over.", "There is nothing left to resize.", "fine_tuning_job_id")
    resolved = _json(settings, row.id, "resolved.json") or {"scale": {}}
    if row.status == "running" and body.workers == (row.workers or resolved["scale"].get("workers")):
        raise UserError(f"Job `{job_id}` has {body.workers} workers already.", "Ask for another number.", "workers")
    _check_room(link, body.workers)
    store.change(row.id, workers=body.workers)
    store.add_event(row.id, f"Asked to train with {body.workers} worker(s).")
    link.changed.set()
    return job(settings, store, caller, job_id)


def _check_room(link: Link, workers: int) -> None:
    """Refuse what a cluster without GPUs can never place. GPUs may still come: an autoscaler starts them when they are asked for."""
    try:
        resources = link.ray.resources()
    except Unavailable:
        return
    cpus = int(resources.get("CPU", (0, 0))[1])
    if "GPU" not in resources and 0 < cpus < workers:
        raise UserError(f"`workers` is {workers}, but the cluster has {cpus} CPUs.", f"Ask for {cpus} or less.", "workers")


@router.get("/jobs/{job_id}/samples")
def samples(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    """What the model answered at each validation, oldest first: text with every control token in it, as the model sees and writes it."""
    row = existing(store, caller, job_id)
    found = RunDir(settings.runs / row.id).samples()
    if not found:
        return {"object": "list", "data": []}
    tokenizer = whole_tokenizer((ensure(find(row.base), settings.models) / "tokenizer.json").read_text(encoding="utf-8"))

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    data = [
        {
            "object": "tuneyard.sample",
            "step": sample.step,
            "example": sample.example,
            "prompt": text(sample.prompt_ids),
            "answer": text(sample.answer_ids),
            "reference": text(sample.reference_ids),
        }
        for sample in found
    ]
    return {"object": "list", "data": data}


@router.get("/jobs/{job_id}/metrics")
def metrics(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    """Every step's record."""
    run = RunDir(settings.runs / existing(store, caller, job_id).id)
    return {"object": "list", "data": [step.model_dump(mode="json") for step in run.steps()]}


@router.get("/jobs/{job_id}/report")
def report(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    """The data report."""
    return _record(settings, existing(store, caller, job_id).id, "data_report.json")


@router.get("/jobs/{job_id}/evaluation")
def evaluation(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    """Base against tuned."""
    return _record(settings, existing(store, caller, job_id).id, "evaluation.json")


@router.get("/jobs/{job_id}/logs")
def logs(settings: Config, store: Db, caller: Caller, job_id: str, rank: Annotated[int | None, Query(ge=0)] = None) -> dict[str, Any]:
    """The end of what the newest attempt printed: the driver, then each training worker; or one worker alone."""
    row = existing(store, caller, job_id)
    run = RunDir(settings.runs / row.id, row.attempt)
    ranks = []
    while rank_log(run, len(ranks)).exists():
        ranks.append(len(ranks))
    if rank is not None:
        if rank not in ranks:
            raise NotFound(f"Attempt {row.attempt} of job `{job_id}` has no worker {rank}.", f"Its workers: {ranks or 'none yet'}.", "rank")
        text = _end_of(rank_log(run, rank), LOG_BYTES)
    else:
        share = LOG_BYTES // (1 + len(ranks))
        parts = [_end_of(attempt_log(run, row.attempt), share)]
        parts += [f"== worker {rank} ==\n{_end_of(rank_log(run, rank), share)}" for rank in ranks]
        text = "\n".join(parts)
    return {"object": "tuneyard.logs", "attempt": row.attempt, "ranks": ranks, "text": text}


def _end_of(path: Path, limit: int) -> str:
    """The last `limit` bytes of a file as text; nothing where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - limit))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _json(settings: Settings, job_id: str, name: str) -> Any:
    try:
        return json.loads((settings.runs / job_id / name).read_bytes())
    except FileNotFoundError:
        return None


def _record(settings: Settings, job_id: str, name: str) -> dict[str, Any]:
    record = _json(settings, job_id, name)
    if record is None:
        raise NotFound(f"Job `{job_id}` has no {name} yet.", "Look again when that stage is done.")
    return record
