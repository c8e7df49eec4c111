"""/v1/models: bases, their aliases and the project's tuned models; and what a model's name stands for."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from service.api.auth import Caller, Cluster, Config, Db
from service.api.jobs import adapter_folder, not_callable
from service.api.quick import quickly
from service.settings import Settings
from service.store import Job, Project, Store
from trainers import vault
from trainers.catalogue import catalogue, find
from trainers.errors import UnknownModel, UserError
from trainers.records import ModelRecord, RunDir
from trainers.spec import JobSpec

router = APIRouter(prefix="/v1/models")

CHECKPOINT = re.compile(r"(ft:.+):ckpt-step-(\d+)")


@dataclass(frozen=True)
class Target:
    """What answers for a name: a base model's app, with an adapter or without, or the app of a whole tuned model."""

    app: str
    adapter: Path | None = None


def target(store: Store, settings: Settings, project: Project, name: str) -> Target:
    """Find what a name stands for; raises UnknownModel for names of other projects too."""
    if not name.startswith("ft:"):
        return Target(find(name).id)
    step = CHECKPOINT.fullmatch(name)
    job = store.job_by_model(project.id, step[1] if step else name)
    if job is not None:
        run = RunDir(settings.runs / job.id)
        if step:
            if any(row.step == int(step[2]) for row in store.checkpoints(job.id)):
                if why := not_callable(settings, job, int(step[2])):
                    raise UnknownModel(f"`{name}` cannot be called: {why}.", "Call the job's model, once it has succeeded.", "model")
                return Target(job.base, adapter_folder(settings, job, int(step[2])))
        elif (record := run.read("model.json", ModelRecord)) is not None:
            if record.served == "merged":
                if record.merged is None:
                    why = "only the whole model says it exactly, and the job wrote none"
                    raise UnknownModel(f"`{name}` cannot be called: {why}.", f"Make it with `tuneyard merge {job.id}`.", "model")
                return Target(job.id)
            if record.adapter is not None:
                return Target(job.base, run.path(record.adapter))
    raise UnknownModel(f"There is no model `{name}`.", "List what there is with GET /v1/models.", "model")


def _to_wire(id: str, created: float, owner: str, **tuneyard: Any) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": int(created), "owned_by": owner, "shutdown_date": None, "tuneyard": tuneyard}


def _base_to_wire(settings: Settings, id: str, base: str, created: float) -> dict[str, Any]:
    here = (settings.models / base / "config.json").exists()
    alias = {"alias_of": base} if id != base else {}  # nobody shall take one model for another
    return _to_wire(id, created, "tuneyard", kind="alias" if alias else "base", on_this_machine=here, **alias) | alias


def _tuned_to_wire(job: Job, name: str) -> dict[str, Any]:
    origin = {"base": job.base, "job_id": job.id}
    kind = "checkpoint" if CHECKPOINT.fullmatch(name) else "tuned"
    return _to_wire(name, job.finished_at or job.created_at, job.project_id, kind=kind, **origin) | origin


@router.get("")
async def list_models(settings: Config, store: Db, caller: Caller) -> dict[str, Any]:
    return await quickly(_list, settings, store, caller)


def _list(settings: Settings, store: Store, caller: Project) -> dict[str, Any]:
    bases = [_base_to_wire(settings, id, base.id, caller.created_at) for base in catalogue().values() for id in (base.id, *base.aliases)]
    tuned = [_tuned_to_wire(job, job.model_name) for job in store.tuned(caller.id)]
    return {"object": "list", "data": bases + tuned}


# `:path`, because clients send a "/" in a name as %2F, which arrives decoded.
@router.get("/{model:path}")
def retrieve(settings: Config, store: Db, caller: Caller, model: str) -> dict[str, Any]:
    found = target(store, settings, caller, model)
    if not model.startswith("ft:"):
        return _base_to_wire(settings, model, found.app, caller.created_at)
    step = CHECKPOINT.fullmatch(model)
    job = store.job_by_model(caller.id, step[1] if step else model)
    assert job is not None  # `target` found it
    return _tuned_to_wire(job, model)


@router.delete("/{model:path}")
def delete(settings: Config, store: Db, link: Cluster, caller: Caller, model: str) -> dict[str, Any]:
    """Forget a tuned model and remove its weights; the job and its records stay."""
    if not model.startswith("ft:"):
        target(store, settings, caller, model)
        raise UserError(f"`{model}` is a base model.", "Only tuned models can be deleted.", "model")
    job = store.job_by_model(caller.id, model)
    if job is None or job.status != "succeeded":
        raise UnknownModel(f"There is no tuned model `{model}`.", "List what there is with GET /v1/models.", "model")
    run, part = RunDir(settings.runs / job.id), JobSpec.parse(job.spec).checkpoint
    if part.to is not None:  # first: where that fails, the model is still there to be deleted again
        place = vault.at(run, part)
        for name in place.names():
            place.delete(name)
    store.change(job.id, model_deleted=True)  # from now on the runner unloads it
    store.forget_app(job.id)
    link.changed.set()
    for folder in ("adapters", "checkpoints", "model", "exports"):
        shutil.rmtree(run.path(folder), ignore_errors=True)
    return {"id": model, "object": "model", "deleted": True}
