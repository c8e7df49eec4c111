"""The tuned model as one Hugging Face folder, made tensor by tensor from the base's files and what was trained.

    LoRA, DoRA, QLoRA    the base, with each adapter folded into its matrix (fold.py)
    full fine-tuning     the checkpoint's weights, in the base's dtype and file layout

Peak memory is one tensor and its fp32 copy. The folder is checked before it exists: its logits must agree with those of what was
trained, on real prompts (agreement.py). Killed anywhere, it is made again from the start, and is the same.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainers import agreement, checkpoint, tensors
from trainers.agreement import Agreement
from trainers.card import write_card
from trainers.chat import Chat
from trainers.errors import ModelError, Unavailable
from trainers.fold import EMBEDDING, AdapterFold, Fold, FullFold
from trainers.records import TEMPLATE_FILE, ModelRecord, RunDir, sync_folder
from trainers.spec import JobSpec, Method, QLora
from trainers.store import TokenStore
from trainers.tensors import Entry, ModelFolder

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    TEMPLATE_FILE,
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    tensors.INDEX,
)
OnProgress = Callable[[int, int], None]
"""Told (bytes done, bytes in all)."""


def merge(
    run: RunDir, spec: JobSpec, base: str, model_dir: Path, step: int, prompts: list[list[int]], on_progress: OnProgress = lambda *_: None
) -> ModelRecord:
    """Make `model/` in the run directory from the base and what had been learned at `step`, and record it as `model.json`.

    `prompts` are token ids on which the folder and what was trained are compared. Where nothing asks for a whole model, only the record is
    made. Raises ModelError where the two disagree, Unavailable where there is no room.
    """
    whole = wants_whole(spec)
    done = run.read("model.json", ModelRecord)
    if done is not None and done.step == step and (not whole or (done.merged and run.path(done.merged, "config.json").exists())):
        return done
    adapter = None if spec.method.type == "full" else f"adapters/{checkpoint.adapter_name(step)}"
    record = ModelRecord(base=base, adapter=adapter, merged=None, served=served(spec.method), step=step)
    if whole:
        target, scratch = run.path("model"), run.path(f".model-{run.writer}.a{run.attempt}.tmp")
        for left in run.root.glob(f".model-{run.writer}.a*.tmp"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            found = _make(run, spec, model_dir, adapter, step, scratch, prompts, on_progress)
            record = record.model_copy(update={"merged": "model", **asdict(found)})
            write_card(run, record, scratch)
            for path in scratch.iterdir():
                sync_file(path)
            run.check_lease()
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(run.path("exports"), ignore_errors=True)  # they are forms of the folder that stood here
            scratch.rename(target)
            shutil.rmtree(run.path("checkpoints", ".fetched"), ignore_errors=True)  # a copy of one that lies elsewhere
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        sync_folder(target.parent)
    return run.write("model.json", record)


def told(spec: JobSpec, record: ModelRecord) -> str:
    """What was made, in one line."""
    said = f"Model of step {record.step} is ready"
    if record.kl is not None and record.effect is not None:
        apart = "the checkpoint's weights" if record.adapter is None else "base + adapter"
        said += f"; as one folder, it is {record.kl:.1g} nats from {apart} (what training changed: {record.effect:.1g})"
        if record.kl > agreement.allowed(record.effect):
            said += ": rounding took that much, because training changed little; the adapter has all of it"
    if record.merged and spec.method.type == "qlora":
        said += "; the base in it is what NF4 leaves of it, as in training"
    return f"{said}."


def served(method: Method) -> Literal["adapter", "merged"]:
    """What answers: an adapter on the shared base, or, where that would not be what was trained, the whole model."""
    return "adapter" if method.type == "lora" and not method.dora and not method.modules_to_save else "merged"


def wants_whole(spec: JobSpec) -> bool:
    """Whether the whole model is written: it was asked for, or it is what is served or exported."""
    exported = any(name.startswith("gguf") for name in spec.export.formats)
    return spec.export.merge or exported or (spec.deploy.serve and served(spec.method) == "merged")


def _make(
    run: RunDir,
    spec: JobSpec,
    model_dir: Path,
    adapter: str | None,
    step: int,
    out: Path,
    prompts: list[list[int]],
    on_progress: OnProgress,
) -> Agreement:
    """Write the folder into `out`, and hold it against what was trained."""
    base, template, rounded = ModelFolder(model_dir), run.path(TEMPLATE_FILE), None
    if adapter is None:
        state = checkpoint.State(checkpoint.fetch(run, spec.checkpoint, step))
        full = FullFold(list(state.names()), state.read)
        write_model(model_dir, full, out, template, on_progress)

        def stored(name: str) -> Tensor:
            # Not the fp32 masters: most updates are smaller than a bf16 step, so that rounding them alone measured 1.6% of what training
            # did. A forward pass in bf16 never saw more of them than this.
            return full.read(name).to(base[name if name in base else EMBEDDING].dtype)

        want_NV = agreement.of_weights(model_dir, stored, prompts)
        base_NV = agreement.of_weights(model_dir, agreement.reader(base), prompts)
    else:
        folder, read = run.path(adapter), agreement.reader(base)
        four_bits = None
        if isinstance(spec.method, QLora):
            dtype = torch.bfloat16 if spec.scale.precision == "bf16" else torch.float32  # of training's arithmetic
            four_bits = _four_bits(spec.method, dtype)
            read = agreement.in_four_bits(read, folder, spec.method.double_quant, dtype)
        write_model(model_dir, AdapterFold(folder, base, four_bits), out, folder / TEMPLATE_FILE, on_progress)
        want_NV, base_NV = agreement.of_adapter(model_dir, folder, read, prompts)
        rounded = partial(agreement.of_rounded, model_dir, folder, read, prompts, base[EMBEDDING].dtype)
    return agreement.compare(agreement.of_weights(out, agreement.reader(ModelFolder(out)), prompts), want_NV, base_NV, rounded)


def _four_bits(method: QLora, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from trainers import nf4

    return lambda w_OI: nf4.round_trip(w_OI, method.double_quant, dtype)


def write_model(model_dir: Path, fold: Fold, out: Path, template: Path | None = None, on_progress: OnProgress = lambda *_: None) -> None:
    """Write every weight that `fold` makes of the base's, in the base's files, dtypes and order; then what else belongs to a model.

    `template` is the chat template that the model was trained with, where that may be another than the base's.
    """
    base = ModelFolder(model_dir)
    done, total = 0, base.num_bytes + sum(entry.num_bytes for entry in fold.extra)
    if shutil.disk_usage(out).free < total:
        raise _no_room(out, total)

    def value(entry: Entry) -> Tensor:
        nonlocal done
        tensor = fold.value(entry, base)
        done += entry.num_bytes
        on_progress(done, total)
        return tensor

    try:
        for file in base.files:
            more = fold.extra if file is base.files[-1] else []
            tensors.write(out / file.path.name, [*file.entries.values(), *more], value)
        for name in COPIED:
            if (model_dir / name).exists():
                shutil.copyfile(model_dir / name, out / name)
    except OSError as error:
        raise (_no_room(out, total) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error) from None
    if left := fold.unused():
        raise ModelError(f"What was trained changes {left[0]}, which the base does not have.", "Merge it into the base it was trained on.")
    if fold.extra:
        _untie(out, base, fold.extra)
    if template is not None and template.exists():
        carry_template(template, out)


def _no_room(out: Path, total: int) -> Unavailable:
    free = shutil.disk_usage(out).free
    return Unavailable(f"The merged model needs {total / 1e9:.2g} GB, and {out.parent} has {free / 1e9:.2g} GB left.", "Make room there.")


def _untie(out: Path, base: ModelFolder, extra: list[Entry]) -> None:
    """Say in a model's folder that its head is its own."""
    _change(out / "config.json", tie_word_embeddings=False)
    if (index := out / tensors.INDEX).exists():
        told = json.loads(index.read_text(encoding="utf-8"))
        told["weight_map"] |= {entry.name: base.files[-1].path.name for entry in extra}
        told.setdefault("metadata", {})["total_size"] = ModelFolder(out).num_bytes
        index.write_text(json.dumps(told, indent=2), encoding="utf-8")


def _change(file: Path, **values: Any) -> None:
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**told, **values}, indent=2), encoding="utf-8")


def carry_template(template: Path, out: Path) -> None:
    """Give a model folder the template that it was trained with, and let generation end where that ends a turn."""
    shutil.copyfile(template, out / TEMPLATE_FILE)
    file = out / "generation_config.json"
    known = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.exists() else None
    ends = sorted(Chat.load(out).stop_ids)
    if set(ends) - {*(known if isinstance(known, list) else [known])}:
        _change(file, eos_token_id=ends)


def sync_file(path: Path) -> None:
    """Make a file's content durable, before the rename that lets it be seen."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def probes(chat: Chat, store: Path | None = None) -> list[list[int]]:
    """Prompts to compare models on: a few questions, and, from a token store, a few examples that were held out of training."""
    questions = ("Say hello.", "What is 12 + 30?", "List three colours as JSON.", "Write one sentence about the sea.")
    found = [chat.prompt([{"role": "user", "content": question}]) for question in questions]
    return found + (held_out(store) if store is not None else [])


def held_out(store: Path) -> list[list[int]]:
    """Token ids of the first few validation examples."""
    split = TokenStore(store, "validation")
    return [split.get(i)[0].tolist() for i in range(min(4, len(split)))]
