"""/v1/tuneyard: what OpenAI's wire has no place for."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter

from service.api.auth import Caller, Cluster, Config, Db
from service.api.errors import NotFound
from service.api.jobs import existing
from service.runner import attempt_log
from service.settings import Settings
from trainers.errors import Unavailable
from trainers.records import RunDir, StageProgress

router = APIRouter(prefix="/v1/tuneyard")

LOG_BYTES = 256 * 2**10


@router.get("/status")
def status(store: Db, link: Cluster, caller: Caller) -> dict[str, Any]:
    """Is the cluster there, what does it have, which base models are loaded, how many jobs wait."""
    try:
        resources = {name: {"used": used, "total": total} for name, (used, total) in link.ray.resources().items()}
        cluster: dict[str, Any] = {"answers": True, "address": link.ray.address, "resources": resources}
    except Unavailable as error:
        cluster = {"answers": False, "address": link.ray.address, "message": str(error)}
    mine = [job for job in store.open_jobs() if job.project_id == caller.id]
    counts = {name: sum(job.status == name for job in mine) for name in ("validating_files", "queued", "running")}
    apps = [{"base": row.base, "status": row.status, "message": row.message} for row in store.demand()]
    return {"object": "tuneyard.status", "project": caller.name, "cluster": cluster, "apps": apps, "jobs": counts}


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
        "run_dir": str(run.root),
        "model": row.model_name,
        "spec": row.spec,
        "resolved": _json(settings, row.id, "resolved.json"),
    }


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
def logs(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    """The end of what the newest attempt printed."""
    row = existing(store, caller, job_id)
    try:
        with attempt_log(RunDir(settings.runs / row.id), row.attempt).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        text = ""
    return {"object": "tuneyard.logs", "attempt": row.attempt, "text": text}


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
