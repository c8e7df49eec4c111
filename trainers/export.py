"""Further forms of a finished run's model: the adapter alone (PEFT), the whole folder (safetensors), GGUF files.

Every form is written under a temporary name and renamed, so that it exists whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from trainers.catalogue import catalogue
from trainers.errors import Fenced, ModelError, UserError
from trainers.records import ModelRecord, RunDir, sync_folder
from trainers.spec import JobSpec

Form = Literal["adapter", "safetensors", "gguf-f16", "gguf-q8_0"]
OnProgress = Callable[[int, int], None]
"""Told (bytes done, bytes in all)."""


def export_all(run: RunDir, spec: JobSpec, record: ModelRecord, on_progress: OnProgress = lambda *_: None) -> ModelRecord:
    """Make the forms that a job's `export.formats` asks for, beside its model; returns the record that names them.

    One that fails is an event, never the failure of the job: the training was paid for, and the model is there.
    """
    for form in spec.export.formats:
        if form == "safetensors" or is_there(run, record, form):
            continue
        try:
            record = export_beside(run, spec.name, record, form, on_progress)
        except Fenced:
            raise
        except Exception as error:
            run.event(f"Export as {form} failed: {error}", "error")
            continue
        made = run.path(record.exports[form])
        run.event(f"Export as {form}: {made.name}, {made.stat().st_size / 1e6:,.0f} MB.")
    return record


def is_there(run: RunDir, record: ModelRecord, form: Form) -> bool:
    """Whether a GGUF file of this model lies in the run directory."""
    return form in record.exports and run.path(record.exports[form]).exists()


def export_beside(run: RunDir, name: str, record: ModelRecord, form: Form, on_progress: OnProgress = lambda *_: None) -> ModelRecord:
    """Write a GGUF file into the run directory, and name it in the model's record."""
    target = run.path("exports", f"{name}-{form.removeprefix('gguf-')}.gguf")
    target.unlink(missing_ok=True)  # by an attempt that was killed before it could say so
    export(run, record, form, target, on_progress)
    return run.write("model.json", record.model_copy(update={"exports": {**record.exports, form: str(target.relative_to(run.root))}}))


def export(run: RunDir, record: ModelRecord, form: Form, target: Path, on_progress: OnProgress = lambda *_: None) -> None:
    """Write one form of a run's model as `target`: a folder for `adapter` and `safetensors`, else a file.

    Raises UserError where the run has no such form, ModelError where the form cannot say what the model is.
    """
    if form not in get_args(Form):
        raise UserError(f"There is no format `{form}`.", f"Formats: {', '.join(get_args(Form))}.")
    if form == "adapter" and record.adapter is None:
        raise UserError("Every weight of this model was trained: it has no adapter.", "Export it as safetensors or GGUF.")
    if form != "adapter" and record.merged is None:
        raise UserError("This run has no merged model.", "Make it with `tuneyard merge`.")
    if target.exists() and not (target.is_dir() and not form.startswith("gguf") and not any(target.iterdir())):
        raise UserError(f"{target} is there already.", "Name a path that is free, or an empty folder.")
    with _whole(target) as scratch:
        if form == "adapter":
            _copy(run.path(str(record.adapter)), scratch, on_progress)
        elif form == "safetensors":
            _copy(run.path(str(record.merged)), scratch, on_progress)
        else:
            from trainers.gguf_file import write_gguf  # a bare training machine may have no gguf

            known = catalogue().get(record.base)
            write_gguf(
                run.path(str(record.merged)),
                scratch,
                "f16" if form == "gguf-f16" else "q8_0",
                run.root.name,
                known.licence if known else None,
                on_progress,
            )
        run.check_lease()


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, which takes its place once all went well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield scratch
            for path in scratch.iterdir() if scratch.is_dir() else [scratch]:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if target.is_dir():
                target.rmdir()  # an empty folder; one with files was refused
            scratch.replace(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.", "Name a place that is yours and has room.") from None
    sync_folder(target.parent)


def _copy(source: Path, target: Path, on_progress: OnProgress) -> None:
    if not source.is_dir():
        raise ModelError(f"{source} is gone.", "Bring the run directory back whole.")
    files = sorted(p for p in source.iterdir() if p.is_file())
    total, done = sum(p.stat().st_size for p in files), 0
    target.mkdir()
    for path in files:
        shutil.copyfile(path, target / path.name)
        done += path.stat().st_size
        on_progress(done, total)
