"""A run whose training is over, named by its folder or its job's id: what `tuneyard merge` and `tuneyard export` work on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from service.settings import Settings
from trainers.catalogue import find_any
from trainers.errors import UserError
from trainers.fetch import ensure
from trainers.records import TEMPLATE_FILE, Lease, ModelRecord, PrepareRecord, RunDir, StageProgress, TrainRecord
from trainers.spec import JobSpec

if TYPE_CHECKING:
    from trainers.export import Form

BUSY_S = 600
"""A job that is not over and told of its merge so short a time ago is still at it."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finished:
    """A run, as the attempt that wrote last."""

    run: RunDir
    spec: JobSpec
    step: int
    """The one whose model is the run's."""

    @classmethod
    def find(cls, target: str, settings: Settings) -> Finished:
        """Raises UserError where there is no such run, or its training is not over."""
        root = Path(target) if Path(target).is_dir() else settings.runs / target
        if "/" not in target and not root.is_dir():
            raise UserError(f"There is no folder and no job `{target}`.", f"Jobs lie in {settings.runs}; `tuneyard list` names them.")
        if not root.is_dir():
            raise UserError(f"There is no folder {target}.", "Name a run's folder, or a job's id.")
        lease = RunDir(root).read("lease.json", Lease)
        run = RunDir(root, lease.attempt if lease else 1, "cli")
        trained = run.read("train.json", TrainRecord)
        if trained is None or not run.path("resolved.json").exists():
            raise UserError(f"{root.name} is no run whose training is over.", "Wait for its training to end.")
        if trained.status != "finished":
            raise UserError(f"The training of {root.name} has {trained.status} at step {trained.step}.", "Go on with it until its end.")
        progress, over = run.read("progress.json", StageProgress), run.path("outcome.json").exists()
        if lease and not over and progress and progress.message == "merge" and (ago := time.time() - progress.time) < BUSY_S:
            raise UserError(f"The job is merging this run itself (so it said {ago:.0f} s ago).", "Wait for the job to end.")
        spec = JobSpec.model_validate_json(run.path("resolved.json").read_bytes())
        return cls(run, spec, trained.best_step or trained.step)

    @property
    def model(self) -> ModelRecord | None:
        """What has been made of it so far."""
        return self.run.read("model.json", ModelRecord)

    def merge(self, settings: Settings, say: Callable[[str], None], on_progress: OnProgress) -> ModelRecord:
        """The whole model, made if it is not there."""
        from trainers import merge
        from trainers.chat import Chat

        base = find_any(self.spec.model.base)
        model_dir = ensure(base, settings.models, say)
        template, prepared = self.run.path(TEMPLATE_FILE), self.run.read("prepare.json", PrepareRecord)
        chat = Chat.load(model_dir, template.read_text(encoding="utf-8") if template.exists() else "auto")
        store = Path(prepared.store) if prepared and Path(prepared.store).is_dir() else None
        spec = self.spec.model_copy(update={"export": self.spec.export.model_copy(update={"merge": True})})
        return merge.merge(self.run, spec, base.id, model_dir, self.step, merge.probes(chat, store), on_progress)

    def export(self, record: ModelRecord | None, form: Form, output: Path | None, on_progress: OnProgress) -> tuple[Path, bool]:
        """(where this form lies, whether it was made just now); without `output`, in the run's own folder."""
        from trainers import checkpoint, export

        if record is None:  # the adapter of a run of which no model was made yet
            adapter = None if self.spec.method.type == "full" else f"adapters/{checkpoint.adapter_name(self.step)}"
            record = ModelRecord(base=find_any(self.spec.model.base).id, adapter=adapter, merged=None, step=self.step)
        if output is not None:
            export.export(self.run, record, form, output, on_progress)
            return output, True
        if own := {"adapter": record.adapter, "safetensors": record.merged}.get(form):
            return self.run.path(own), False
        made = not export.is_there(self.run, record, form)
        if made:
            record = export.export_beside(self.run, self.spec.name, record, form, on_progress)
        return self.run.path(record.exports[form]), made
