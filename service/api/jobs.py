"""/v1/fine_tuning/jobs: create, watch, pause and cancel jobs, in OpenAI's shapes."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request

from serve.plain import beyond_plain
from service.api import create
from service.api.auth import Caller, Cluster, Config, Db, RequestedBy
from service.api.errors import NotFound
from service.api.quick import quickly
from service.settings import Settings
from service.states import FINAL
from service.store import Checkpoint, Job, JobEvent, Once, Project, Store
from trainers.catalogue import find
from trainers.errors import UserError
from trainers.records import RunDir, StageProgress
from trainers.spec import JobSpec

router = APIRouter(prefix="/v1/fine_tuning/jobs")

METADATA_KEY = re.compile(r"metadata\[(.*)\]")


def to_wire(job: Job, settings: Settings) -> dict[str, Any]:
    spec = JobSpec.parse(job.spec)
    hyperparameters = create.echo_hyperparameters(spec, find(job.base))
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "estimated_finish": _estimate(job, settings),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "model": job.request["model"],
        "fine_tuned_model": job.model_name if job.status == "succeeded" else None,
        "organization_id": job.project_id,
        "status": job.status,
        "error": job.error,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "training_file": job.request["training_file"],
        "validation_file": job.request["validation_file"],
        "result_files": job.result_files,
        "seed": spec.optim.seed,
        "trained_tokens": job.trained_tokens,
        "metadata": job.request["metadata"],
        "integrations": None,
        "queue_reason": job.reason,
    }


def _estimate(job: Job, settings: Settings) -> int | None:
    """When the job should be done, by what the train stage says is left."""
    if job.status != "running":
        return None
    progress = RunDir(settings.runs / job.id).read("progress.json", StageProgress)
    left = (progress.data or {}).get("left_s") if progress and progress.attempt == job.attempt else None
    return int(progress.time + left) if progress and left is not None else None


def existing(store: Store, project: Project, job_id: str) -> Job:
    """The project's job of this id, or NotFound."""
    job = store.job(project.id, job_id)
    if job is None:
        raise NotFound(f"There is no fine-tuning job `{job_id}`.", "List yours with GET /v1/fine_tuning/jobs.", "fine_tuning_job_id")
    return job


@router.post("")
def create_job(
    settings: Config,
    store: Db,
    link: Cluster,
    caller: Caller,
    requested_by: RequestedBy,
    body: create.Create,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> dict[str, Any]:
    job = create.build(body, settings, store, caller, requested_by)
    once = None
    if idempotency_key:
        digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        once = Once(project_id=caller.id, key=idempotency_key, body_sha256=digest, job_id=job.id, created_at=time.time())
    made = store.add_job(job, once)
    if body.integrations and made is job:
        store.add_event(job.id, "Integrations are not sent from here; `WandbLogger.sync` reads the result files as ever.", "warn")
    link.changed.set()
    return to_wire(made, settings)


@router.get("")
def list_jobs(
    request: Request,
    settings: Config,
    store: Db,
    caller: Caller,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    pairs = {match[1]: value for name, value in request.query_params.items() if (match := METADATA_KEY.fullmatch(name))}
    none = request.query_params.get("metadata") == "null"
    jobs, more = store.jobs(caller.id, after=after, limit=limit, metadata=pairs, no_metadata=none)
    return _page([to_wire(job, settings) for job in jobs], more)


@router.get("/{job_id}")
async def retrieve(settings: Config, store: Db, caller: Caller, job_id: str) -> dict[str, Any]:
    return await quickly(lambda: to_wire(existing(store, caller, job_id), settings))


@router.post("/{job_id}/cancel")
def cancel(settings: Config, store: Db, link: Cluster, caller: Caller, job_id: str) -> dict[str, Any]:
    job = existing(store, caller, job_id)
    if not store.move(job.id, "cancelled", "The job was cancelled."):
        raise over(existing(store, caller, job_id), "cancel")
    link.changed.set()
    return to_wire(existing(store, caller, job_id), settings)


@router.post("/{job_id}/pause")
def pause(settings: Config, store: Db, link: Cluster, caller: Caller, job_id: str) -> dict[str, Any]:
    """Stop at the next checkpoint and leave the cluster; a job that does not run yet is paused at once. Asked again, it changes nothing."""
    job = existing(store, caller, job_id)
    paused = (
        store.move(job.id, "paused", "The job was paused before it began to run.", since="validating_files")
        or store.move(job.id, "paused", "The job was paused while it waited.", since="queued")
        or store.move(job.id, "pausing", "The job is asked to pause.")
    )
    now = existing(store, caller, job_id)
    if not paused and now.status in FINAL:
        raise over(now, "pause")
    link.changed.set()
    return to_wire(now, settings)


@router.post("/{job_id}/resume")
def resume(settings: Config, store: Db, link: Cluster, caller: Caller, job_id: str) -> dict[str, Any]:
    """Go on from the newest checkpoint. A job that was never paused, or that goes on already, is left as it is."""
    job = existing(store, caller, job_id)
    resumed = store.move(job.id, "queued", "The job was resumed.", since="paused", not_before=0.0) or store.move(
        job.id, "running", "The pause was taken back.", since="pausing"
    )
    now = existing(store, caller, job_id)
    if not resumed and now.status in FINAL:
        raise over(now, "resume")
    link.changed.set()
    return to_wire(now, settings)


def over(job: Job, verb: str) -> UserError:
    """400, not 409: clients repeat a 409."""
    return UserError(f"Job `{job.id}` is already {job.status}.", f"There is nothing left to {verb}.", "fine_tuning_job_id")


@router.get("/{job_id}/events")
def events(
    store: Db, caller: Caller, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    rows, more = store.events(existing(store, caller, job_id).id, after=after, limit=limit)
    return _page([event_to_wire(row) for row in rows], more)


@router.get("/{job_id}/checkpoints")
def checkpoints(
    settings: Config, store: Db, caller: Caller, job_id: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> dict[str, Any]:
    job = existing(store, caller, job_id)
    rows = callable_checkpoints(store, settings, job)
    if after is not None:
        place = next((i for i, row in enumerate(rows) if row.id == after), None)
        if place is None:
            raise UserError(
                f"`after` names `{after}`, which is not in this list.", "Pass the id of the last item of the page before.", "after"
            )
        rows = rows[place + 1 :]
    page = _page([checkpoint_to_wire(row, job) for row in rows[:limit]], len(rows) > limit)
    return page | {"first_id": rows[0].id if rows else None, "last_id": rows[:limit][-1].id if rows else None}


def callable_checkpoints(store: Store, settings: Settings, job: Job) -> list[Checkpoint]:
    """The job's checkpoints that can be called now, newest first."""
    return [row for row in store.checkpoints(job.id) if not not_callable(settings, job, row.step)]


def not_callable(settings: Settings, job: Job, step: int) -> str | None:
    """Why a checkpoint cannot be called; None where the base answers with its adapter as training had them."""
    if job.model_deleted:
        return "the model was deleted"
    if job.spec["method"]["type"] == "full":
        return "every weight was trained, and only the job's chosen step becomes a model"
    if job.spec["method"]["type"] == "qlora":
        # Not close either: NF4 moves the bare 135M base by 1.3 nats per token, and every other first choice.
        return "its adapter was trained on the base in four bits, which the served base is not, and only the chosen step becomes a model"
    try:
        config = json.loads((adapter_folder(settings, job, step) / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return "its adapter is gone"
    if more := beyond_plain(config):
        return f"its adapter is more than the shared base can answer with (`{more}`), and only the job's chosen step becomes a model"
    return None


def adapter_folder(settings: Settings, job: Job, step: int) -> Path:
    return settings.runs / job.id / "adapters" / f"step-{step:06d}"


def checkpoint_to_wire(row: Checkpoint, job: Job) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(row.created_at),
        "fine_tuned_model_checkpoint": f"{job.model_name}:ckpt-step-{row.step}",
        "fine_tuning_job_id": job.id,
        "metrics": row.metrics,
        "step_number": row.step,
    }


def event_to_wire(row: JobEvent) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "created_at": int(row.created_at),
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data,
    }


def _page(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": more}
