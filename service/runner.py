"""The runner: observe, decide (policy.py), act; again and again.

Kill it anywhere and start it again: every act can be done twice, the database says what was begun, and the run directory
says what was reached. It speaks to Ray over HTTP only.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from service import policy, results
from service.evaluations import Evaluations
from service.link import Link
from service.order import LaunchOrder
from service.policy import Limits, Seen
from service.serving import REDEPLOY_S, Serving, whole_folder
from service.settings import Settings
from service.states import FINAL, Status
from service.store import Checkpoint, Job, JobEvent, Store, new_id
from trainers import control, manifest, vault
from trainers.control import CONTROL_FILE, ControlRecord
from trainers.errors import DataError, Unavailable, WorkerLost
from trainers.records import CheckpointRecord, OutcomeRecord, RunDir, StageProgress, StepRecord, write_atomic
from trainers.spec import JobSpec

log = logging.getLogger("tuneyard.runner")

LEASE_S = 90.0  # longer than the slowest single act (starting Serve)
PURGE_S = 60.0
REMOTE_S = 15.0  # between two looks at checkpoints that do not lie in the run directory


class Runner:
    """Moves all jobs of one database. `owner` names who acts: a second runner with another owner only watches."""

    def __init__(self, settings: Settings, store: Store, link: Link, owner: str = "home") -> None:
        self.settings = settings
        self.store = store
        self.link = link
        self.owner = owner
        self.limits = Limits(backoff_s=settings.backoff_s)
        self.serving = Serving(settings, store, link)
        self.evaluations = Evaluations(settings, store, link)
        self._serve_after = 0.0
        self._purged_at = 0.0
        self._known_checkpoints: dict[str, set[str]] = {}
        self._look_after: dict[str, float] = {}

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop. Nothing that goes wrong in a step ends the loop."""
        while not stop.is_set():
            try:
                self.step()
            except Exception:
                log.exception("A step of the runner failed; the next one tries again.")
            if self.link.changed.wait(self.settings.poll_s):
                self.link.changed.clear()

    def step(self) -> None:
        """Look at everything once and do what is due."""
        if not self.store.hold_lease(self.owner, LEASE_S):
            return
        cluster = self._cluster_answers()
        if any(isinstance(action, policy.CheckFiles) for action in self._advance(cluster)):
            self._advance(cluster)  # a job that was just queued may start at once: serving, below, can take seconds
        if cluster:
            self._guard("evaluations", self.evaluations.step)
        if cluster and time.time() >= self._serve_after:
            self._serve_after = time.time() + REDEPLOY_S  # holds if it fails: fetching and deploying cost too much to repeat at once
            self._guard("serving", self._serve)
        if time.time() - self._purged_at > PURGE_S:
            self._guard("purging files", self._purge)

    def _advance(self, cluster: bool) -> list[policy.Action]:
        """Move every job as far as it can go now; what was done."""
        jobs = {job.id: job for job in self.store.open_jobs()}
        for job in jobs.values():
            if job.attempt:
                self._guard(f"reading the run directory of {job.id}", lambda job=job: self._ingest(job))
        seen = [self._observe(job, cluster) for job in jobs.values()]
        actions = policy.decide(seen, cluster, time.time(), self.limits)
        for action in actions:
            self._guard(f"{type(action).__name__} {action.job}", lambda action=action: self._act(action, jobs[action.job]))
        return actions

    def pause(self) -> None:
        """The local cluster is about to stop: queue running jobs for a new attempt, which is no loss of theirs."""
        stopping = []
        for job in self.store.open_jobs():
            outcome = self._outcome(job)
            if job.status in policy.ON_CLUSTER and (outcome is None or outcome.status == "stopped"):
                to: Status = "queued" if job.status == "running" else "paused"
                told = "The service was stopped; the job goes on at its next start." if to == "queued" else "The job is paused."
                self.store.move(job.id, to, told, submitted=False, not_before=0.0)
                stopping.append(_submission(job.id, job.attempt))
        with suppress(Unavailable):
            for submission in stopping:
                self.link.ray.stop(submission)
            deadline = time.time() + 5
            while time.time() < deadline and any(self.link.ray.state(s)[0] == "alive" for s in stopping):
                time.sleep(0.1)

    @staticmethod
    def _guard(what: str, act: Callable[[], None]) -> None:
        """One job's trouble must not stop the others."""
        try:
            act()
        except Unavailable as error:
            log.warning("%s: %s", what, error)
        except Exception:
            log.exception("%s failed; the next step tries again.", what)

    # -- observe -----------------------------------------------------------------------------------------------------

    def _cluster_answers(self) -> bool:
        try:
            self.link.ray.state("none")
        except Unavailable as error:
            log.warning("%s", error)
            return False
        return True

    def _observe(self, job: Job, cluster: bool) -> Seen:
        ray = "unknown"
        on_cluster = job.status in policy.ON_CLUSTER
        if cluster and job.attempt and not job.released and (on_cluster or job.status in FINAL):
            with suppress(Unavailable):
                ray = self.link.ray.state(_submission(job.id, job.attempt))[0]
        # Only now the outcome: read before Ray's answer, it could miss one that was written in between.
        outcome = self._outcome(job) if on_cluster else None
        stopped = outcome is not None and outcome.status == "stopped"
        run = self._run(job.id, job.attempt)
        told = control.wanted(run) if on_cluster else ControlRecord()
        order = run.read("launch.json", LaunchOrder) if on_cluster else None
        stage = run.read("progress.json", StageProgress) if job.status == "pausing" else None
        return Seen(
            id=job.id,
            status=job.status,  # type: ignore[arg-type]
            attempt=job.attempt,
            submitted=job.submitted,
            released=job.released,
            ray=ray,  # type: ignore[arg-type]
            training=stage is not None and stage.attempt == job.attempt and stage.message == "train",
            resized=order is not None and order.attempt == job.attempt and order.workers != job.workers,
            told=told.wanted,
            told_at=told.time,
            outcome=outcome is not None and not stopped,
            stopped=stopped,
            losses=job.losses,
            not_before=job.not_before,
            ended_at=outcome.time if outcome is not None else job.finished_at or 0.0,
        )

    def _outcome(self, job: Job) -> OutcomeRecord | None:
        """How the current attempt ended, if it says so."""
        try:
            record = self._run(job.id).read("outcome.json", OutcomeRecord)
        except ValidationError:
            log.exception("The outcome of %s cannot be read; the attempt counts as lost.", job.id)
            return None
        return record if record is not None and record.attempt == job.attempt else None

    def _run(self, job_id: str, attempt: int = 0) -> RunDir:
        return RunDir(self.settings.runs / job_id, attempt, "runner")

    def _ingest(self, job: Job) -> None:
        """Copy what the run directory tells since the last look into the database."""
        self._ingest_events(job)
        self._ingest_checkpoints(job)

    def _ingest_events(self, job: Job) -> None:
        run = self._run(job.id)
        known = self.store.known_segments(job.id)
        rows = []
        for kind, segments in (("events", run.events), ("metrics", run.step_segments)):
            for name, records in segments({s.removeprefix(f"{kind}/") for s in known}):
                for number, record in enumerate(records):
                    told = _step_event(record) if isinstance(record, StepRecord) else (record.level, record.message, "message", record.data)
                    level, message, type, data = told
                    rows.append(
                        JobEvent(
                            id=f"ftevent-{job.id.removeprefix('ftjob-')}-{kind[0]}{name.removesuffix('.jsonl')}-{number}",
                            job_id=job.id,
                            segment=f"{kind}/{name}",
                            created_at=record.time,
                            level=level,
                            message=message,
                            type=type,
                            data=data,
                        )
                    )
        if rows:
            self.store.add_segment(sorted(rows, key=lambda row: row.created_at))

    def _ingest_checkpoints(self, job: Job) -> None:
        part = JobSpec.parse(job.spec).checkpoint
        if part.to is not None:  # elsewhere, where each look costs time and money
            if time.time() < self._look_after.get(job.id, 0.0) and self._outcome(job) is None:
                return
            self._look_after[job.id] = time.time() + REMOTE_S
        place = vault.at(self._run(job.id), part)
        known = self._known_checkpoints.setdefault(job.id, set())
        for name in manifest.ordered(place.names()):
            if name in known:
                continue
            try:
                content = vault.read(place, name, vault.MANIFEST)
                record = CheckpointRecord.model_validate_json(content)
            except (OSError, ValueError):  # not whole yet, pruned while we looked, or damaged: no checkpoint
                continue
            metrics = {"step": record.step, "train_loss": record.train_loss, "train_mean_token_accuracy": record.train_accuracy}
            if record.valid_loss is not None:
                metrics |= {"valid_loss": record.valid_loss, "valid_mean_token_accuracy": record.valid_accuracy}
            checkpoint = Checkpoint(
                id=new_id("ftckpt_"),
                job_id=job.id,
                step=record.step,
                created_at=record.time,
                metrics=metrics,
                manifest_sha256=hashlib.sha256(content).hexdigest(),
            )
            self.store.add_checkpoint(checkpoint)
            known.add(name)

    # -- act ---------------------------------------------------------------------------------------------------------

    def _act(self, action: policy.Action, job: Job) -> None:
        """Carry out one action. `job` is as it was seen: its status may have changed since, which `Store.move` finds out."""
        match action:
            case policy.CheckFiles():
                self._check_files(job)
            case policy.Start(attempt=attempt):
                message = "Fine-tuning job started." if attempt == 1 else f"Attempt {attempt} started."
                if self.store.move(job.id, "running", message, since="queued", attempt=attempt, submitted=False):
                    self._submit(job, attempt)
            case policy.Submit(attempt=attempt):
                self._submit(job, attempt)
            case policy.Wait(reason=reason):
                if job.reason != reason:
                    self.store.change(job.id, reason=reason)
                    self.store.add_event(job.id, f"Queued: {reason}.")
            case policy.Retry(losses=losses, not_before=not_before):
                what = f"Attempt {job.attempt} was lost ({self._last_words(job)}); loss {losses} of {self.limits.losses}."
                message = f"{what} Trying again in {max(0.0, not_before - time.time()):.0f} s."
                self.store.move(job.id, "queued", message, "warn", since="running", losses=losses, not_before=not_before, submitted=False)
            case policy.GiveUp(losses=losses):
                self._fail(job, self._given_up(job, losses).to_dict())
            case policy.Finish():
                self._finish(job)
            case policy.Tell(wanted=wanted):
                record = ControlRecord(wanted=wanted, workers=job.workers if wanted == "resize" else None)
                self._run(job.id, job.attempt).write(CONTROL_FILE, record)
            case policy.Requeue():
                self.store.move(
                    job.id, "queued", f"Attempt {job.attempt} stopped at a checkpoint; the next one goes on from it.",
                    since="running", submitted=False, not_before=0.0,
                )  # fmt: skip
            case policy.Rest():
                self.store.move(job.id, "paused", "The job is paused and has left the cluster.", since="pausing", submitted=False)
            case policy.StopAttempt():
                # A later attempt number in the lease keeps the driver from writing while it dies.
                self._run(job.id, job.attempt + 1).grant()
                self.link.ray.stop(_submission(job.id, job.attempt))
            case policy.Release():
                self.store.change(job.id, released=True)

    def _check_files(self, job: Job) -> None:
        """The cheap half of validation; the prepare stage reads and proves every line."""
        try:
            self._resolved(job)
        except DataError as error:
            self._fail(job, error.to_dict())
        else:
            self.store.move(job.id, "queued", "Files are there; the job is queued.", since="validating_files")

    def _resolved(self, job: Job) -> JobSpec:
        """The spec with stored files in place of file ids. Raises DataError naming the field of a file that is gone or empty."""

        def path_of(file_id: str) -> str:
            if self.settings.grants(file_id):
                return file_id
            file = self.store.file(job.project_id, file_id)
            path = self.settings.home / file.path if file else None
            param = "validation_file" if file_id == job.request.get("validation_file") else "training_file"
            if file is None or path is None or not path.is_file():
                raise DataError(f"File `{file_id}` does not exist any more.", "Upload it again and create a new job.", param)
            if path.stat().st_size == 0:
                raise DataError(f"{file.filename} is empty.", "Upload a file with at least one example.", param)
            return str(path)

        return JobSpec.parse(job.spec).with_paths(path_of)

    def _submit(self, job: Job, attempt: int) -> None:
        """Write what the driver needs, take the lease for the attempt, hand it to Ray. Each part can be done again."""
        try:
            spec = self._resolved(job)
        except DataError as error:
            self._fail(job, error.to_dict())
            return
        run = self._run(job.id, attempt)
        run.grant()
        write_atomic(run.path("spec.json"), spec.to_json())
        order = LaunchOrder(
            job_id=job.id,
            model_name=job.model_name,
            requested_by=job.request.get("requested_by"),
            workers=job.workers,
            asked_at=job.created_at if attempt == 1 else time.time(),
            models=str(self.settings.models),
            stores=str(self.settings.stores(job.project_id)),
            serve_url=self.link.serve_url(job.base),
            model_url=self.link.serve_url(job.id),
            serve_token_file=str(self.settings.serve_token_file),
        )
        run.write("launch.json", order)
        output = attempt_log(run, attempt)
        output.parent.mkdir(exist_ok=True)
        # The output goes to the run directory: Ray forgets its own logs with the cluster.
        command = f"exec {shlex.quote(sys.executable)} {self.settings.driver} {shlex.quote(str(run.root))} --attempt {attempt}"
        self.link.ray.submit(_submission(job.id, attempt), f"{command} >> {shlex.quote(str(output))} 2>&1")
        self.store.change(job.id, submitted=True)

    def _finish(self, job: Job) -> None:
        outcome = self._outcome(job)
        assert outcome is not None  # the policy saw it; an outcome is never taken back
        self._ingest(job)  # what was written since this step's look, and before the outcome, is told before the end
        if outcome.status == "failed":
            self._fail(job, outcome.error or {"code": "internal_error", "message": "The job failed.", "param": None})
            return
        steps = self._run(job.id).steps()
        files = results.write(self.settings, self.store, job, steps)
        tokens = sum(step.tokens for step in steps)
        if job.spec["deploy"]["serve"] and whole_folder(self.settings, job):
            self.store.ask_for(job.id)  # it stays loaded for whoever has waited for this job
        if self.store.move(job.id, "succeeded", "The job has successfully completed.", result_files=files, trained_tokens=tokens):
            self.store.add_event(job.id, f"New fine-tuned model created: {job.model_name}")

    def _fail(self, job: Job, error: dict) -> None:
        error = {
            "code": error.get("code") or "internal_error",
            "message": error.get("message") or "The job failed.",
            "param": error.get("param"),
        }
        self.store.move(job.id, "failed", str(error["message"]), "error", error=error)

    def _last_words(self, job: Job) -> str:
        """What is known about why the current attempt is gone."""
        with suppress(OSError):
            lines = attempt_log(self._run(job.id), job.attempt).read_text(encoding="utf-8", errors="replace").splitlines()
            if words := next((line.strip() for line in reversed(lines) if line.strip()), None):
                return words[:200]
        with suppress(Unavailable):
            return self.link.ray.state(_submission(job.id, job.attempt))[1][:200]
        return "it left no message"

    def _given_up(self, job: Job, losses: int) -> WorkerLost:
        return WorkerLost(
            f"The training process was lost {losses} times without progress in between; its last words: {self._last_words(job)}.",
            f"Read `tuneyard logs {job.id}`; a process that needs more memory than there is dies like this.",
        )

    # -- serving and housekeeping ------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self.serving.step()
        self._serve_after = 0.0

    def _purge(self) -> None:
        for file in self.store.expired_files():
            self.store.delete_file(file.project_id, file.id)
            self.settings.home.joinpath(file.path).unlink(missing_ok=True)
        self._purged_at = time.time()


def attempt_log(run: RunDir, attempt: int) -> Path:
    """Where an attempt's output goes."""
    return run.path("logs", f"attempt-{attempt:04d}.log")


def _submission(job_id: str, attempt: int) -> str:
    return f"{job_id}-{attempt}"


def _step_event(step: StepRecord) -> tuple[str, str, str, dict]:
    message = f"Step {step.step}/{step.num_steps}: training loss={step.train_loss:.2f}"
    data = {
        "step": step.step,
        "total_steps": step.num_steps,
        "train_loss": step.train_loss,
        "train_mean_token_accuracy": step.train_accuracy,
    }
    if step.valid_loss is not None:
        message += f", validation loss={step.valid_loss:.2f}"
        data |= {"valid_loss": step.valid_loss, "valid_mean_token_accuracy": step.valid_accuracy}
    return "info", message, "metrics", data
