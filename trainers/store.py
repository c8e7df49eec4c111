"""The token store: written once, read by index.

    {stores}/{key}/manifest.json        rows of each split; bytes and sha256 of every other file; written last
                   data_report.json     what was read, kept and left out
                   train-00000.arrow    SHARD_ROWS examples each, one Arrow record batch, memory-mapped on reading
                   validation-00000.arrow

A folder without a manifest, or with one that its files do not match, is no store. The content depends only on the
examples and their order, never on who wrote them, so two writers of one key write the same bytes and the first rename wins.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainers.errors import StoreError
from trainers.records import sync_folder, write_atomic

STORE_VERSION = 1
SHARD_ROWS = 4096
SPLITS = ("train", "validation")
_STALE_S = 24 * 3600

# Weights are run-length encoded: run i of an example is `run_lengths[i]` tokens of weight `run_weights[i]`.
SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.field("item", pa.int32(), nullable=False))),
        ("run_weights", pa.large_list(pa.field("item", pa.float32(), nullable=False))),
        ("run_lengths", pa.large_list(pa.field("item", pa.int32(), nullable=False))),
        ("length", pa.int32()),
        ("supervised", pa.int32()),
        ("id", pa.string()),
        ("slice", pa.string()),
    ]
)


Spans = Sequence[tuple[int, int]]
"""Stretches [start, stop) of supervised tokens, in order."""


def to_table(ids: Sequence[np.ndarray], spans: Sequence[Spans], names: Sequence[str], slices: Sequence[str | None]) -> pa.Table:
    """Examples as rows of a store: `ids` int32 [T] each, with a loss weight of 1 inside their spans and 0 elsewhere."""
    run_weights: list[float] = []
    run_lengths: list[int] = []
    num_runs, supervised = [], []
    for tokens, stretches in zip(ids, spans, strict=True):
        before, at, count = len(run_lengths), 0, 0
        for start, stop in stretches:
            if start > at or (before == len(run_lengths) and start == at):
                if start > at:
                    run_weights.append(0.0)
                    run_lengths.append(start - at)
                run_weights.append(1.0)
                run_lengths.append(stop - start)
            else:  # it goes on where the one before ended
                run_lengths[-1] += stop - start
            at, count = stop, count + stop - start
        if at < len(tokens):
            run_weights.append(0.0)
            run_lengths.append(len(tokens) - at)
        num_runs.append(len(run_lengths) - before)
        supervised.append(count)
    lengths = [len(tokens) for tokens in ids]
    columns = [
        _lists(lengths, np.concatenate([np.zeros(0, np.int32), *ids]), "input_ids"),
        _lists(num_runs, np.array(run_weights, np.float32), "run_weights"),
        _lists(num_runs, np.array(run_lengths, np.int32), "run_lengths"),
        pa.array(lengths, pa.int32()),
        pa.array(supervised, pa.int32()),
        pa.array(names, pa.string()),
        pa.array(slices, pa.string()),
    ]
    return pa.table(columns, schema=SCHEMA)


class StoreWriter:
    """Collects rows in order and closes a shard every SHARD_ROWS; `commit` makes the store exist, `abandon` removes every trace.

    Memory stays at one shard per split.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        parent = self.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(parent)
        self._temporary = parent / f".{self.folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        self._temporary.mkdir()
        self._waiting: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
        self._shards: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._files: dict[str, dict[str, int | str]] = {}

    def append(self, split: str, rows: pa.Table) -> None:
        """Add rows of SCHEMA."""
        waiting = self._waiting[split]
        waiting.append(rows)
        while (num := sum(len(table) for table in waiting)) >= SHARD_ROWS:
            together = pa.concat_tables(waiting)
            self._write_shard(split, together.slice(0, SHARD_ROWS))
            waiting[:] = [together.slice(SHARD_ROWS)] if num > SHARD_ROWS else []

    def commit(self, report_json: str) -> None:
        """Write the rest, the report and the manifest, and rename the folder into place; a whole store already there stays."""
        for split in SPLITS:
            if self._waiting[split]:
                self._write_shard(split, pa.concat_tables(self._waiting[split]))
        self._add_file("data_report.json", report_json.encode())
        manifest = {"version": STORE_VERSION, "key": self.folder.name, "shard_rows": SHARD_ROWS, "rows": self._shards, "files": self._files}
        write_atomic(self._temporary / "manifest.json", json.dumps(manifest, indent=1))
        while True:
            try:
                self._temporary.rename(self.folder)
                break
            except OSError:
                if not self.folder.exists():
                    raise
                if is_store(self.folder):  # another job was first with the same bytes
                    self.abandon()
                    break
                broken = self._temporary.with_suffix(".broken.tmp")
                self.folder.rename(broken)  # half a store is in the way
                shutil.rmtree(broken, ignore_errors=True)
        sync_folder(self.folder.parent)

    def abandon(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _write_shard(self, split: str, rows: pa.Table) -> None:
        name = f"{split}-{len(self._shards[split]):05d}.arrow"
        # Arrays are built afresh from all rows, so a shard's bytes do not depend on how the rows arrived.
        columns = [_fresh(rows.column(field.name), field) for field in SCHEMA]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._add_file(name, memoryview(sink.getvalue()))
        self._shards[split].append(len(rows))

    def _add_file(self, name: str, content: bytes | memoryview) -> None:
        with (self._temporary / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _lists(lengths: Sequence[int] | np.ndarray, values: np.ndarray, name: str) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), type=SCHEMA.field(name).type)


def _fresh(column: pa.ChunkedArray, field: pa.Field) -> pa.Array:
    """The same values in buffers of their own, without offsets or leftovers of other arrays."""
    if pa.types.is_large_list(field.type):
        lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks])
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
        return _lists(lengths, values, field.name)
    if pa.types.is_string(field.type):
        return pa.array(column.to_pylist(), field.type)
    return pa.array(column.to_numpy(), field.type)


def _remove_stale(parent: Path) -> None:
    """Remove what writers that died left behind, once it is a day old."""
    for path in parent.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)


def is_store(folder: Path) -> bool:
    """Whether a whole store lies here."""
    try:
        _read_manifest(folder)
    except StoreError:
        return False
    return True


def _read_manifest(folder: Path) -> dict:
    """The manifest, checked against the sizes of the files it names; raises StoreError."""
    folder = Path(folder)
    again = "Run the job again: it is prepared anew."
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        version = manifest["version"]
        for name, entry in manifest["files"].items():
            if (folder / name).stat().st_size != entry["bytes"]:
                raise StoreError(f"{folder / name} has not the size its manifest states.", again)
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is no token store: {Path(error.filename).name} is missing.", again) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / 'manifest.json'} is damaged: {error}.", again) from None
    if version != STORE_VERSION:
        raise StoreError(f"{folder} is a token store of version {version}, not {STORE_VERSION}.", again)
    return manifest


class TokenStore:
    """One split of a store, read by index. Opening reads no example; shards are mapped when first touched and shared by the page cache."""

    def __init__(self, folder: Path, split: str) -> None:
        """Raises StoreError where no whole store lies."""
        self.folder = Path(folder)
        self.split = split
        self._manifest = _read_manifest(self.folder)
        self._shard_rows: int = self._manifest["shard_rows"]
        self._rows: list[int] = self._manifest["rows"][split]
        self._batches: dict[int, pa.RecordBatch] = {}
        self._lists: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    @property
    def key(self) -> str:
        """The content address."""
        return self._manifest["key"]

    def __len__(self) -> int:
        return sum(self._rows)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every example, int32 [N]."""
        return self._column("length")

    @functools.cached_property
    def supervised(self) -> np.ndarray:
        """Supervised tokens of every example, int32 [N]."""
        return self._column("supervised")

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Example i: (ids int32 [T], a read-only view of the file; loss weights float32 [T])."""
        shard, row = self._locate(i)
        if shard not in self._lists:
            self._lists[shard] = [_as_numpy(self._batch(shard).column(name)) for name in ("input_ids", "run_weights", "run_lengths")]
        ids, weights, lengths = (values[offsets[row] : offsets[row + 1]] for offsets, values in self._lists[shard])
        return ids, np.repeat(weights, lengths)

    def slice(self, i: int) -> str | None:
        """The group that example i belongs to."""
        shard, row = self._locate(i)
        return self._batch(shard).column("slice")[row].as_py()

    def example_id(self, i: int) -> str:
        """Where example i came from, as `file:line`."""
        shard, row = self._locate(i)
        return self._batch(shard).column("id")[row].as_py()

    def verify(self) -> None:
        """Read every file of the store and compare its hash; raises StoreError."""
        for name, entry in self._manifest["files"].items():
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise StoreError(
                        f"{self.folder / name} is damaged: its hash is not what its manifest states.",
                        "Remove the folder and run the job again.",
                    )

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        return divmod(int(i), self._shard_rows)

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            source = pa.memory_map(str(self.folder / f"{self.split}-{shard:05d}.arrow"))
            self._batches[shard] = pa.ipc.open_file(source).get_batch(0)
        return self._batches[shard]

    def _column(self, name: str) -> np.ndarray:
        parts = [self._batch(shard).column(name).to_numpy() for shard in range(len(self._rows))]
        return np.concatenate([np.zeros(0, np.int32), *parts])


def _as_numpy(lists: Any) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, values) of an Arrow list column, as views."""
    return lists.offsets.to_numpy(), lists.values.to_numpy()
