"""What the examination of a data set left on disk so far: one Arrow file of ROWS for each chunk, in order.

    {stores}/.{key}.parts.tmp/plan.json      which chunks these are
                              000000.arrow   the rows of chunk 0, renamed into place when it is whole

A prepare that is killed leaves its parts, and the next one goes on from them. The choice over all rows is made from a few
columns; the rest stays on disk and is read again when the store is written, so memory stays flat whatever the size.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainers.errors import Unavailable
from trainers.examine import ROWS
from trainers.records import write_atomic
from trainers.sources import Chunk


class Spool:
    """The parts of one data set. Part i holds the rows of chunk i."""

    def __init__(self, folder: Path, num_parts: int) -> None:
        self.folder = folder
        self.num_parts = num_parts
        self.firsts = np.zeros(1, np.int64)
        """Number of the first row of each part, and of all rows at the end; known once every part is there."""

    @classmethod
    @contextmanager
    def open(cls, folder: Path, chunks: list[Chunk]) -> Iterator[Spool]:
        """The spool in this folder, ours alone until the context ends; parts of another plan are removed first."""
        plan = hashlib.sha256(json.dumps([asdict(chunk) for chunk in chunks], sort_keys=True).encode()).hexdigest()
        with _unwritable_named(folder.parent), _locked(folder):  # a second job on the same data waits here, and then finds the store
            if not (folder / "plan.json").exists() or json.loads((folder / "plan.json").read_bytes()) != plan:
                for path in folder.glob("*.arrow*"):
                    path.unlink()
                write_atomic(folder / "plan.json", json.dumps(plan))
            yield cls(folder, len(chunks))

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [i for i in range(self.num_parts) if not self._path(i).exists()]

    def write(self, tables: Iterable[tuple[int, pa.Table]]) -> Iterator[pa.Table]:
        """Store tables (part, rows) that come part by part; yields each when it is written. A part exists once its last table is."""
        current = -1
        writer: pa.ipc.RecordBatchFileWriter | None = None
        try:
            for part, table in tables:
                if part != current:
                    self._close(current, writer)
                    writer = None  # closed: whatever happens next must not close it again
                    current = part
                    writer = pa.ipc.new_file(str(self._path(part)) + ".tmp", ROWS)
                assert writer is not None
                writer.write_table(table)
                yield table
            self._close(current, writer)
            writer = None
        finally:
            if writer is not None:
                writer.close()  # half a part: it keeps its temporary name

    def _close(self, part: int, writer: pa.ipc.RecordBatchFileWriter | None) -> None:
        if writer is not None:
            writer.close()
            os.replace(str(self._path(part)) + ".tmp", self._path(part))  # noqa: PTH105  # two plain names

    def count(self) -> int:
        """Number of all rows, once every part is there."""
        self.firsts = np.cumsum([0, *(sum(batch.num_rows for batch in self.part(i)) for i in range(self.num_parts))])
        return int(self.firsts[-1])

    def part(self, i: int) -> list[pa.RecordBatch]:
        """The rows of part i, mapped and not read."""
        reader = pa.ipc.open_file(pa.memory_map(str(self._path(i))))
        return [reader.get_batch(n) for n in range(reader.num_record_batches)]

    def rows(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Rows by number (int64, in any order): (numbers, rows), some at a time and in the order asked for."""
        part_of = np.searchsorted(self.firsts, numbers, side="right") - 1
        for start, stop in _stretches(part_of):
            part = int(part_of[start])
            batches = self.part(part)
            firsts = self.firsts[part] + np.cumsum([0, *(batch.num_rows for batch in batches)])
            batch_of = np.searchsorted(firsts, numbers[start:stop], side="right") - 1
            for first, last in _stretches(batch_of):
                batch = int(batch_of[first])
                asked = numbers[start + first : start + last]
                yield asked, batches[batch].take(pa.array(asked - firsts[batch]))

    def remove(self) -> None:
        """Leave no trace."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.arrow"


@contextmanager
def _unwritable_named(folder: Path) -> Iterator[None]:
    """A disk that is full or read-only is nobody's bug."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise Unavailable(
            f"{folder} cannot be written: {os.strerror(error.errno)}.", "Make room there, or choose another folder."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with this folder, which is made if need be, and made again if its last owner removed it while we waited."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / "lock").open("w")
        except FileNotFoundError:
            continue
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                ours = (folder / "lock").stat().st_ino == os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:
                ours = False
            if ours:
                os.utime(folder)  # parts of a day ago are not stale: we go on from them
                yield
                return


def _stretches(values: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of every run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = [0, *edges.tolist(), len(values)]
    return list(pairwise(bounds)) if len(values) else []
