"""Safetensors files read and written one tensor at a time, by plain reads: memory holds one tensor, whatever the file's size.

A file is 8 bytes (the header's length, little-endian), a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainers.errors import ModelError

INDEX = "model.safetensors.index.json"
"""Of a folder in several shards: which tensor lies in which file."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    """Byte of the file where its data begins."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One safetensors file. Raises ModelError where it is none, or is cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= path.stat().st_size:
                    raise ValueError("its header is damaged")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = sorted(((told["data_offsets"][0], name, told) for name, told in header.items()), key=lambda f: f[:2])
            self.entries = {n: Entry(n, DTYPES[t["dtype"]], tuple(t["shape"]), 8 + length + start) for start, n, t in found}
            """In the order of their data."""
            end = max((e.start + e.num_bytes for e in self.entries.values()), default=0)
            if end > path.stat().st_size:
                raise ValueError("it is cut short")
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.", "Bring the whole folder here.") from None
        except KeyError as error:
            raise ModelError(f"{path} has a tensor of type {error}.", f"Known types: {', '.join(DTYPES)}.") from None
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path} is no safetensors file: {error}.", "Fetch it again.") from None

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with self.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(_bytes(tensor)) != entry.num_bytes:
                raise ModelError(f"{self.path} is cut short: {name} is not whole.", "Fetch it again.")
        return tensor


class ModelFolder:
    """The weights of a Hugging Face folder. Raises ModelError where a shard or a tensor that the index names is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.exists():
            where = {str(k): str(v) for k, v in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
            files = sorted(set(where.values()))
        else:  # a folder may also hold the same weights under another maker's names
            where, files = {}, ["model.safetensors"]
            if not (folder / files[0]).exists():
                files = sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder.name} holds no *.safetensors file.", "Convert its weights to safetensors.")
        if missing := [f for f in files if not (folder / f).exists()]:
            raise ModelError(f"{folder.name} lacks {missing[0]}, which its index names.", "Fetch the missing shard.")
        self.files = [TensorFile(folder / f) for f in files]
        self._of = {name: file for file in self.files for name in file.entries}
        if lost := sorted(set(where) - set(self._of)):
            raise ModelError(f"{folder.name} lacks the tensor {lost[0]}, which its index names.", "Fetch the folder again.")

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> Entry:
        return self._of[name].entries[name]

    def names(self) -> list[str]:
        return list(self._of)

    @property
    def num_bytes(self) -> int:
        return sum(e.num_bytes for file in self.files for e in file.entries.values())

    def read(self, name: str) -> Tensor:
        return self._of[name].read(name)


def write(path: Path, entries: Iterable[Entry], value: Callable[[Entry], Tensor]) -> None:
    """Write a file whose tensors `value` gives one after the other. Raises ModelError for a wrong shape or dtype."""
    entries = list(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.num_bytes]}
        at += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on an 8-byte boundary
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = value(entry)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                told = f"{tuple(tensor.shape)} {tensor.dtype}, not {entry.shape} {entry.dtype}"
                raise ModelError(f"{entry.name} is {told}.", "Merge it into the base it was trained on.")
            file.write(_bytes(tensor.contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
