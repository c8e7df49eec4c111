"""A base model's weights, from its safetensors files straight to where they are used: a tensor, or this worker's rows of one.

Nothing is ever held whole that need not be: files are mapped, and read some rows at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainers import shards
from trainers.errors import ModelError

CHUNK_BYTES = 4 * 2**20
"""Rows are read in pieces of about this size."""
FLOATS = ("F64", "F32", "F16", "BF16")


def files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it. Raises ModelError for a folder whose index names a file that is not there."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            found = {n: folder / Path(f).name for n, f in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        else:
            found = {}
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"The weights of {folder.name} cannot be read ({str(error).splitlines()[0]}).", "Fetch the model again.") from None
    if missing := sorted({p.name for p in found.values() if not p.exists()}):
        raise ModelError(f"{folder.name} lacks {missing[0]}.", "Fetch the model again.", "model.base")
    return found


def size(folder: Path) -> int:
    """Bytes of a folder's weights, as stored."""
    return sum(path.stat().st_size for path in set(files(folder).values()))


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Give every parameter and buffer of a model on the meta device memory; what no file holds (rotary frequencies) gets its values."""
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # non-persistent: left as they are, logits are wrong without any NaN
            with torch.device(device):
                fresh = type(module)(config=module.config)  # type: ignore[operator]
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer)
            if hasattr(fresh, "attention_scaling"):
                module.attention_scaling = fresh.attention_scaling


def read(folder: Path, targets: Mapping[str, Sequence[Tensor]], takers: Mapping[str, Callable[[Tensor], None]], rank: int) -> None:
    """Fill `targets` (name in the files -> tensors, sharded or not) and hand whole matrices to `takers`, one at a time.

    Every name must be in the files, in the target's shape. Raises ModelError.
    """
    where = files(folder)
    wanted = {*targets, *takers}
    if missing := sorted(wanted - set(where)):
        raise ModelError(f"{folder.name} lacks the weights `{missing[0]}` ({len(missing)} in all).", "Fetch the model again.", "model.base")
    for path in sorted({where[name] for name in wanted}):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(n for n in wanted if where[n] == path):
                    _read_one(file.get_slice(name), name, folder, targets.get(name, ()), takers.get(name), rank)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} of {folder.name} is damaged ({error}).", "Fetch the model again.", "model.base") from None


def _read_one(stored: Any, name: str, folder: Path, targets: Sequence[Tensor], take: Callable[[Tensor], None] | None, rank: int) -> None:
    if stored.get_dtype() not in FLOATS:
        raise ModelError(f"`{name}` of {folder.name} is stored as {stored.get_dtype()}.", "Use the unquantized base.", "model.base")
    shape = tuple(stored.get_shape())
    if take is not None:
        take(stored[:])
    for target in targets:
        if tuple(target.shape) != shape:
            raise ModelError(
                f"`{name}` of {folder.name} is {shape}, but config.json makes it {tuple(target.shape)}.",
                "Fetch the model again.",
                "model.base",
            )
        part = shards.part(target, rank)
        num = part.local.shape[0] if part.local.dim() else 0
        rows = max(1, CHUNK_BYTES // max(1, part.local[:1].numel() * 4))
        with torch.no_grad():
            for start in range(0, num, rows):
                stop = min(start + rows, num)
                part.local[start:stop].copy_(stored[part.offset[0] + start : part.offset[0] + stop])


def targets_of(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Callable[[Tensor], None]]]:
    """Where each tensor of the files goes: (name -> parameter, name -> taker).

    A layer that wraps another as `base` hides it from the files; one with `take_weight` wants the matrix itself. Adapters are in no file.
    """
    takers = {f"{n}.weight": m.take_weight for n, m in model.named_modules() if hasattr(m, "take_weight")}  # type: ignore[misc]
    parameters = {name.replace(".base.", "."): p for name, p in model.named_parameters() if not name.rpartition(".")[2].startswith("lora_")}
    return parameters, takers  # type: ignore[return-value]
