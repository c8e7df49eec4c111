"""Named tensors in shard files, as torch's own `HuggingFaceStorageWriter` lays them out: each file is plain safetensors, and its header's
`DCP_SHARDING_INFO` says where each of its tensors begins in the whole one (torch/distributed/checkpoint/_hf_utils.py).

Written from memory in one piece; read by rows, from however many files hold them.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainers.errors import CheckpointError
from trainers.shards import Part
from trainers.vault import File, LocalFile

SUFFIX = ".safetensors"
_INFO = "DCP_SHARDING_INFO"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_MAX_HEADER = 100_000_000  # safetensors' own limit


def shard_file(rank: int) -> str:
    """The file of the worker of this rank, by torch's rule."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001{SUFFIX}"


class Image:
    """A shard file as it will lie on disk, in host memory. The memory is kept for the next one: pages that are there are quickly filled."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._size = 0

    def reserve(self, parts: dict[str, Part]) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """Have the memory for such parts at hand; returns their layout. Pages that were never used can take seconds a GB on a virtual
        machine."""
        header, places = _lay_out(parts)
        self._size = max((stop for _, stop in places.values()), default=len(header))
        if self._size > len(self._bytes):
            self._bytes = np.empty(self._size, np.uint8)
            self._bytes[:: mmap.PAGESIZE] = 0
        return header, places

    def take(self, parts: dict[str, Part]) -> None:
        """Copy the parts. On the CPU one thread does it, without torch, whose worker threads would get in the way of the training step."""
        header, places = self.reserve(parts)
        self._bytes[: len(header)] = np.frombuffer(header, np.uint8)
        for name, (start, stop) in places.items():
            flat = parts[name].local.contiguous().reshape(-1).view(torch.uint8)
            if flat.device.type == "cpu":
                np.copyto(self._bytes[start:stop], flat.numpy())
            else:
                torch.from_numpy(self._bytes[start:stop]).copy_(flat)

    @property
    def content(self) -> memoryview:
        return self._bytes.data[: self._size]


def _lay_out(parts: dict[str, Part]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The head of a shard file, and each tensor's place in the file; widest dtypes first, so that all are aligned."""
    order = sorted(parts, key=lambda name: (-parts[name].local.element_size(), name))
    offsets = {name: {"saved_offsets": list(parts[name].offset)} for name in order}
    header: dict[str, object] = {"__metadata__": {_INFO: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}}
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for name in order:
        local = parts[name].local
        start, at = at, at + local.numel() * local.element_size()
        places[name] = (start, at)
        header[name] = {"dtype": _NAMES[local.dtype], "shape": list(local.shape), "data_offsets": [start, at]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (begin + start, begin + stop) for name, (start, stop) in places.items()}


@dataclass(frozen=True)
class _Chunk:
    """Part of a tensor, in one file."""

    file: File
    at: int
    """Where its bytes begin in the file."""
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where it begins in the whole tensor."""


class State:
    """The tensors of a checkpoint. Reading checks no hashes (`checkpoint.read_manifest` does) but raises CheckpointError where parts are
    missing."""

    def __init__(self, folder: Path | Mapping[str, File]) -> None:
        """`folder`, or its shard files by name."""
        files = folder if isinstance(folder, Mapping) else {p.name: LocalFile(p) for p in sorted(folder.glob(f"*{SUFFIX}"))}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for name, file in files.items():
            try:
                self._add(file)
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise CheckpointError(f"{name} is no safetensors file ({error}).") from None

    def _add(self, file: File) -> None:
        head = bytearray(8)
        file.read_into(0, memoryview(head))
        length = int.from_bytes(head, "little")
        if length > min(file.size - 8, _MAX_HEADER):
            raise ValueError("its header is too long")
        text = bytearray(length)
        file.read_into(8, memoryview(text))
        header = json.loads(text)
        info = json.loads(header.pop("__metadata__", {}).get(_INFO, "{}"))
        for name, entry in header.items():
            shape = tuple(int(n) for n in entry["shape"])
            offset = tuple(int(n) for n in info[name]["saved_offsets"]) if info else (0,) * len(shape)
            self._dtypes[name] = _DTYPES[entry["dtype"]]
            self._chunks.setdefault(name, []).append(_Chunk(file, 8 + length + int(entry["data_offsets"][0]), shape, offset))

    def names(self) -> list[str]:
        """In the order in which they are best read."""
        return list(self._chunks)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        chunks = self._chunks[name]
        return tuple(max(c.offset[d] + c.shape[d] for c in chunks) for d in range(len(chunks[0].shape)))

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of the whole tensor (all of it where it has no dimension), on the CPU."""
        shape = self.shape(name)
        if not shape:
            return self._rows(name, self._chunks[name][0], 0, 1).reshape(())
        stop = shape[0] if stop is None else stop
        out = torch.empty((stop - start, *shape[1:]), dtype=self._dtypes[name])
        found = 0
        for chunk in self._chunks[name]:
            begin, end = chunk.offset[0], chunk.offset[0] + chunk.shape[0]
            first, last = max(start, begin), min(stop, end)
            if first >= last:
                continue
            columns = tuple(slice(o, o + n) for o, n in zip(chunk.offset[1:], chunk.shape[1:], strict=True))
            into = out[(slice(first - start, last - start), *columns)]
            if into.is_contiguous():
                self._rows(name, chunk, first - begin, last - begin, into)
            else:
                into.copy_(self._rows(name, chunk, first - begin, last - begin))
            found += into.numel()
        if found != out.numel():
            raise CheckpointError(f"Of {name}, rows {start} to {stop}, only {found} of {out.numel()} values are there.")
        return out

    def _rows(self, name: str, chunk: _Chunk, first: int, last: int, into: Tensor | None = None) -> Tensor:
        """Rows of one chunk, counted from its own first."""
        into = torch.empty((last - first, *chunk.shape[1:]), dtype=self._dtypes[name]) if into is None else into
        row_bytes = math.prod(chunk.shape[1:]) * into.element_size()
        if into.numel():
            try:
                chunk.file.read_into(chunk.at + first * row_bytes, into.reshape(-1).view(torch.uint8).numpy().data)
            except OSError as error:
                raise CheckpointError(f"{name} cannot be read: {error}.") from None
        return into
