"""Checkpoints: the named state of a run, whole or not there.

A checkpoint is a folder `checkpoints/step-000100-a2` (step, attempt) with safetensors and JSON in it: no pickle is written or read.
It is made under a temporary name; MANIFEST.json, with every file's size and hash, is its last file; a rename makes it appear.
Reading checks the manifest: a damaged checkpoint is passed over, with an event, for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.errors import CheckpointError
from trainers.records import CheckpointRecord, RunDir, checkpoint_name, parse_checkpoint_name, sync_folder

MANIFEST = "MANIFEST.json"


@dataclass
class Progress:
    """What the loop must know to go on as if it had never stopped. The data position is `step` alone (see batching.Order)."""

    step: int = 0
    """Optimizer steps made."""
    trained_tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all attempts."""
    history: list[list[float]] = field(default_factory=list)
    """trend.History of the run."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each step since the last validation."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last 50 steps that were made."""
    skipped: int = 0
    """Steps skipped in a row."""

    @property
    def last_loss(self) -> float:
        """Training loss of the last step that had one, or the mean before the last validation; 0 at the start."""
        return self.losses[-1] if self.losses else self.history[-1][1] if self.history else 0.0


def save(
    run: RunDir,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    record: CheckpointRecord,
    adapter: Callable[[Path], None],
) -> None:
    """Write one checkpoint and the adapter of the same step (`adapters/step-000100`), which can be served at once."""
    run.check_lease()
    name = checkpoint_name(progress.step, run.attempt)
    target, scratch = run.path("checkpoints", name), run.path("checkpoints", f".{name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in _tensors(parameters, optimizer).items()}, scratch / "state.safetensors")
    (scratch / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    _publish_adapter(run, progress.step, adapter)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in sorted(scratch.iterdir())}
    for path in scratch.iterdir():
        _sync(path)
    record = record.model_copy(update={"files": files, "attempt": run.attempt})
    (scratch / MANIFEST).write_text(record.model_dump_json(indent=2), encoding="utf-8")
    _sync(scratch / MANIFEST)
    run.check_lease()
    shutil.rmtree(target, ignore_errors=True)  # this attempt's own, from before a worker was lost
    scratch.rename(target)
    sync_folder(target.parent)


def _publish_adapter(run: RunDir, step: int, adapter: Callable[[Path], None]) -> None:
    target = run.path("adapters", adapter_name(step))
    if target.exists():  # an attempt before this one made the same step
        return
    scratch = run.path("adapters", f".{adapter_name(step)}.a{run.attempt}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    adapter(scratch)
    for path in scratch.iterdir():
        _sync(path)
    scratch.rename(target)


def adapter_name(step: int) -> str:
    return f"step-{step:06d}"


def restore(run: RunDir, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> Progress:
    """Load the newest whole checkpoint into parameters and optimizer; a fresh Progress where there is none."""
    for folder in reversed(folders(run)):
        try:
            read_manifest(folder, verify=True)
            tensors = load_file(folder / "state.safetensors")
            progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        except (CheckpointError, OSError, ValueError) as error:
            say(f"Checkpoint {folder.name} is damaged ({error}); going back to the one before it.")
            continue
        _load(tensors, parameters, optimizer)
        return progress
    return Progress()


def folders(run: RunDir) -> list[Path]:
    """Checkpoints by step, then attempt, oldest first. What lacks a manifest is none."""
    found = [(parse_checkpoint_name(p.name), p) for p in run.path("checkpoints").glob("step-*")]
    return [p for key, p in sorted((key, p) for key, p in found if key is not None) if (p / MANIFEST).exists()]


def read_manifest(folder: Path, verify: bool = False) -> CheckpointRecord:
    """The folder's record; with `verify`, after checking every file's size and hash. Raises CheckpointError."""
    try:
        record = CheckpointRecord.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder.name} has no readable manifest.") from None
    for name, stated in record.files.items() if verify else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stated["bytes"] or _digest(path) != stated["sha256"]:
            raise CheckpointError(f"{folder.name}/{name} does not match its manifest.")
    return record


def best(run: RunDir) -> CheckpointRecord | None:
    """The manifest with the lowest validation loss; without validation, the last one."""
    records = list(_readable(run).values())
    judged = [r for r in records if r.valid_loss is not None]
    return min(judged, key=lambda r: (r.valid_loss, -r.step)) if judged else (records[-1] if records else None)  # type: ignore[return-value]


def prune(run: RunDir, keep_last: int, keep_best: bool) -> None:
    """Delete full checkpoints beyond the newest `keep_last` (and the best). Adapters stay: they are small and callable."""
    present = _readable(run)
    kept = set(list(present)[-keep_last:])
    winner = best(run) if keep_best else None
    for folder, record in present.items():
        if folder not in kept and not (winner and (record.step, record.attempt) == (winner.step, winner.attempt)):
            doomed = folder.with_name(f".{folder.name}.old")  # renamed first, so that no half-deleted checkpoint can be seen
            folder.rename(doomed)
            shutil.rmtree(doomed)


def _readable(run: RunDir) -> dict[Path, CheckpointRecord]:
    """Checkpoints whose manifest can be read, oldest first: one that was damaged must not stop the run that went on without it."""
    found: dict[Path, CheckpointRecord] = {}
    for folder in folders(run):
        with suppress(CheckpointError):
            found[folder] = read_manifest(folder)
    return found


def _tensors(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flat names: `model.{parameter}` and `optimizer.{parameter}.{slot}`."""
    out = {f"model.{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        out |= {f"optimizer.{name}.{slot}": value for slot, value in optimizer.state[parameter].items()}
    return out


def _load(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            prefix = f"optimizer.{name}."
            slots = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            # AdamW counts its steps in a CPU scalar; the moments live where the parameter does.
            optimizer.state[parameter] = {s: v.clone() if v.dim() == 0 else v.to(parameter.device).clone() for s, v in slots.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
