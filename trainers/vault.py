"""Where checkpoints lie: the run directory, or any place that fsspec knows (`s3://bucket/prefix`).

Both kinds hold folders of files and answer the same few calls. A folder is a checkpoint once its manifest is there, which is why
nothing is ever renamed: a bucket cannot do that. Files in a local folder are synced to disk before they count.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from trainers.errors import SpecError, TuneyardError, Unavailable
from trainers.records import RunDir, sync_folder
from trainers.spec import CheckpointPart

MANIFEST = "MANIFEST.json"
BLOCK_BYTES = 32 * 2**20
"""Read, hashed, written and uploaded at a time."""
_AHEAD_BYTES = 4 * 2**20  # read at least, of what lies far away: small tensors come together
_MAX_PARTS = 9_000  # of one upload to S3, which allows 10,000

Stated = dict[str, int | str]
"""What a manifest says of a file: {"bytes": size, "sha256": hex digest}."""


class File(Protocol):
    """A file that is read in places."""

    size: int

    def read_into(self, at: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `at` on; raises OSError where the file ends before."""
        ...


class LocalFile:
    """A file of this machine; closed when nobody holds it any more."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size

    def read_into(self, at: int, view: memoryview) -> None:
        while view:
            count = os.preadv(self._handle, [view], at)
            if not count:
                raise OSError("it ends too early")
            view, at = view[count:], at + count


class _RemoteFile:
    def __init__(self, system: Any, path: str, where: str) -> None:
        self._system, self._path, self._where = system, path, where
        with _asking(where):
            self.size = int(system.info(path)["size"])
        self._ahead, self._ahead_at = b"", 0

    def read_into(self, at: int, view: memoryview) -> None:
        end = at + len(view)
        if end > self.size:
            raise OSError("it ends too early")
        if at < self._ahead_at or end > self._ahead_at + len(self._ahead):
            content = self._get(at, max(end, min(at + _AHEAD_BYTES, self.size)))
            if len(view) >= _AHEAD_BYTES:  # big ones are not kept
                view[:] = content
                return
            self._ahead, self._ahead_at = content, at
        view[:] = self._ahead[at - self._ahead_at : end - self._ahead_at]

    def _get(self, start: int, stop: int) -> bytes:
        with _asking(self._where):
            content = self._system.cat_file(self._path, start=start, end=stop) if stop > start else b""
        if len(content) != stop - start:
            raise OSError("it ends too early")
        return content


class Folder:
    """Checkpoints in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def check(self) -> None:
        """Raise SpecError where nothing can be written here, while that costs nothing yet."""
        with _checking(self.where):
            self.root.mkdir(parents=True, exist_ok=True)
            self.write(".", ".probe", b"")
            self.remove(".", ".probe")

    def names(self) -> list[str]:
        """Every folder here, whether or not it is a checkpoint."""
        return sorted(p.name for p in self.root.iterdir() if p.is_dir()) if self.root.is_dir() else []

    def files(self, name: str) -> dict[str, int]:
        """File -> size, of one folder."""
        folder = self.root / name
        return {p.name: p.stat().st_size for p in sorted(folder.iterdir())} if folder.is_dir() else {}

    def open(self, name: str, file: str) -> File:
        """Raises FileNotFoundError."""
        return LocalFile(self.root / name / file)

    def write(self, name: str, file: str, content: bytes | memoryview) -> Stated:
        """Write a file whole or not at all, and say what it holds."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        path, temporary = folder / file, folder / f".{file}.tmp"
        sha256 = hashlib.sha256()
        try:
            with temporary.open("wb", buffering=0) as stream:
                for block in _blocks(content):
                    sha256.update(block)
                    while block:
                        block = block[stream.write(block) :]
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(folder)
        return {"bytes": len(content), "sha256": sha256.hexdigest()}

    def remove(self, name: str, file: str) -> None:
        (self.root / name / file).unlink(missing_ok=True)
        sync_folder(self.root / name)

    def delete(self, name: str) -> None:
        """The manifest first, so that what is half deleted is no checkpoint."""
        if (self.root / name).is_dir():
            self.remove(name, MANIFEST)
            shutil.rmtree(self.root / name)


class Bucket:
    """Checkpoints behind an fsspec URL. Its back ends raise whatever they like: here that becomes FileNotFoundError or Unavailable."""

    def __init__(self, system: Any, root: str, where: str) -> None:
        self.system, self.root, self.where = system, root, where

    def check(self) -> None:
        with _checking(self.where):
            self.write(".", "probe", b"?")
            self.remove(".", "probe")

    def names(self) -> list[str]:
        return sorted(Path(entry["name"]).name for entry in self._list(self.root) if entry["type"] == "directory")

    def files(self, name: str) -> dict[str, int]:
        return {Path(e["name"]).name: int(e["size"]) for e in self._list(self._path(name)) if e["type"] == "file"}

    def open(self, name: str, file: str) -> File:
        return _RemoteFile(self.system, self._path(name, file), self.where)

    def write(self, name: str, file: str, content: bytes | memoryview) -> Stated:
        sha256 = hashlib.sha256()
        with _asking(self.where):
            stream = self.system.open(self._path(name, file), "wb", block_size=max(BLOCK_BYTES, len(content) // _MAX_PARTS))
            try:
                for block in _blocks(content):
                    sha256.update(block)
                    stream.write(block)
                stream.close()
            except BaseException:
                with suppress(Exception):
                    stream.discard()
                with suppress(Exception):
                    stream.closed = True  # else it is uploaded, cut off as it is, when it is collected
                raise
        return {"bytes": len(content), "sha256": sha256.hexdigest()}

    def remove(self, name: str, file: str) -> None:
        with _asking(self.where), suppress(FileNotFoundError):
            self.system.rm_file(self._path(name, file))

    def delete(self, name: str) -> None:
        self.remove(name, MANIFEST)
        with _asking(self.where), suppress(FileNotFoundError):
            self.system.rm(self._path(name), recursive=True)

    def _path(self, name: str, file: str = "") -> str:
        return "/".join(part for part in (self.root, name, file) if part not in ("", "."))

    def _list(self, path: str) -> list[dict[str, Any]]:
        with _asking(self.where):
            self.system.invalidate_cache()
            try:
                return self.system.ls(path, detail=True)
            except FileNotFoundError:
                return []


Vault = Folder | Bucket


def at(run: RunDir, part: CheckpointPart) -> Vault:
    """Where a run's checkpoints lie. Raises SpecError where `checkpoint.to` is no place."""
    if part.to is None:
        return Folder(run.path("checkpoints"))
    try:
        system, root = fsspec.url_to_fs(part.to, use_listings_cache=False)
    except (ValueError, ImportError, OSError) as error:
        raise SpecError(
            f"`checkpoint.to` is {part.to}: {_line(error)}.", "Give a URL that fsspec knows (s3://bucket/prefix).", "checkpoint.to"
        ) from None
    if isinstance(system, LocalFileSystem):
        return Folder(Path(root) / run.root.name)
    return Bucket(system, f"{root.rstrip('/')}/{run.root.name}", f"{part.to.rstrip('/')}/{run.root.name}")


def digest(file: File) -> str:
    """SHA-256 of a file's bytes, in hex."""
    sha256 = hashlib.sha256()
    block = bytearray(min(BLOCK_BYTES, file.size))
    for start in range(0, file.size, BLOCK_BYTES):
        view = memoryview(block)[: min(BLOCK_BYTES, file.size - start)]
        file.read_into(start, view)
        sha256.update(view)
    return sha256.hexdigest()


def read(vault: Vault, name: str, file: str) -> bytes:
    """A small file's content."""
    source = vault.open(name, file)
    content = bytearray(source.size)
    source.read_into(0, memoryview(content))
    return bytes(content)


def copy(source: Vault, target: Folder, name: str, files: dict[str, Stated]) -> None:
    """Copy files of one folder, block by block."""
    folder = target.root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        stream = source.open(name, file)
        with (folder / file).open("wb") as out:
            for start in range(0, stream.size, BLOCK_BYTES):
                block = bytearray(min(BLOCK_BYTES, stream.size - start))
                stream.read_into(start, memoryview(block))
                out.write(block)


def sync(folder: Path) -> None:
    """Make a folder's files durable."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _blocks(content: bytes | memoryview) -> Iterator[memoryview]:
    view = memoryview(content)
    for start in range(0, len(view), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]


@contextmanager
def _asking(where: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, TuneyardError):
        raise
    except Exception as error:
        raise Unavailable(f"{where} does not answer: {_line(error)}.", "Check the address and the network, and try again.") from error


@contextmanager
def _checking(where: str) -> Iterator[None]:
    """Tell what a job's owner must mend from what may heal by itself."""
    try:
        yield
    except (OSError, Unavailable) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        lacks_keys = type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError")
        if lacks_keys or isinstance(cause, FileNotFoundError | FileExistsError | NotADirectoryError | PermissionError):
            raise SpecError(
                f"Checkpoints cannot be written to {where}: {_line(cause)}.",
                "Name a place that exists and may be written to; its keys come from the environment.",
                "checkpoint.to",
            ) from None
        raise


def _line(error: BaseException | None) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
