"""Where data lies: local files, globs, any fsspec URL, Hugging Face datasets; plain or packed (gzip, zstd).

    s3://bucket/rows.jsonl     any URL that fsspec knows; keys and endpoints come from the environment, as its back ends read them
    data/*.jsonl               all matching files, in the order of their names
    hf://org/name              a Hugging Face dataset, loaded by the `datasets` library without code of its own

Whatever lies there comes out as blocks of bytes. Memory stays flat, and what a packed file may unpack to is limited.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from trainers.errors import DataError, RowError, Unavailable, UserError
from trainers.spec import Source

BLOCK_BYTES = 2**20
_UNPACK_BYTES = 2**16  # of one read of a packed file: where it is cut off, so many bytes before the cut can be lost
FREE_BYTES = 2**30
MAX_RATIO = 200
"""A packed file may unpack to FREE_BYTES, or to MAX_RATIO times its size. (Rows that repeat reach 993:1 in gzip, real text 10:1.)"""

_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"BZh": "packed with bzip2", b"\xfd7zXZ\x00": "packed with xz", b"7z\xbc\xaf": "a 7z archive"}
_HUB = re.compile(r"hf://(?!datasets/|spaces/|buckets/)(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_DATA_SUFFIX = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|txt|gz|zst)$")


def files_of(source: Source) -> list[tuple[str, str]]:
    """(path, what errors call it) of each file of a source, in order."""
    if _HUB.fullmatch(source.path):
        return [(_hub_url(source), source.shown)]
    system, path = _system_of(source.path)
    local = isinstance(system, LocalFileSystem)
    is_pattern = glob.has_magic(path) and not _glob(glob.escape(path)) if local else "*" in path  # a URL may hold a "?"
    if not is_pattern:
        return [(source.path, source.shown)]
    folder = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0] or "/"
    if local:
        found = sorted(_glob(path))
        for name in found:
            if not Path(os.path.realpath(name)).is_relative_to(os.path.realpath(folder)):
                raise DataError(
                    f"{name} is a link to {os.path.realpath(name)}, out of the folder that {source.path} looks through.",
                    "Name that file as a source of its own, or remove the link.",
                )
        urls = found
    else:
        found = sorted(_asked(source.path, system.glob, path))
        urls = [system.unstrip_protocol(name) for name in found]
    if not found:
        raise DataError(f"There is no file that matches {source.path}.", "Give a pattern that matches files, relative to the job file.")
    prefix = f"{source.name}/" if source.name and not glob.has_magic(source.name) else ""
    return [(url, prefix + name.removeprefix(folder).lstrip("/")) for url, name in zip(urls, found, strict=True)]


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207  (Path.glob passes linked folders over in silence)


def open_file(path: str) -> BinaryIO:
    """The stored bytes of one file."""
    if path.startswith("hf://") and "?" in path:
        path = _from_hub(path)
    system, inner = _system_of(path)
    if isinstance(system, LocalFileSystem):
        _check_local(path, Path(inner))
    return cast(BinaryIO, _asked(path, system.open, inner, "rb"))


def stamp_of(path: str) -> str:
    """Changes when the file does: its size, and its time or entity tag."""
    if path.startswith("hf://") and "?" in path:
        return ""  # named by its fingerprint
    system, inner = _system_of(path)
    if isinstance(system, LocalFileSystem):
        _check_local(path, Path(inner))
    info: dict[str, Any] = _asked(path, system.info, inner)
    return f"{info.get('size')} {info.get('ETag') or info.get('mtime') or info.get('LastModified') or ''}"


def packing_of(file: BinaryIO, name: str) -> str:
    """`gzip`, `zstd` or nothing, by the file's first bytes; the file is left at its beginning."""
    head = file.read(8)
    file.seek(0)
    for magic, what in _ARCHIVES.items():
        if head.startswith(magic):
            raise DataError(f"{name} is {what}.", "Unpack it, or pack it with gzip or zstd.")
    return next((packing for magic, packing in _PACKINGS.items() if head.startswith(magic)), "")


def blocks(file: BinaryIO, name: str, packing: str, size: int, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The unpacked bytes from `start` to `stop` (None: the end), block by block.

    `size` is the stored file's. Raises RowError where a packed file is damaged or cut off, DataError where it is a bomb.
    """
    if not packing:
        if start:
            file.seek(start)
        at = start
        while block := _asked(name, file.read, BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - at)):
            at += len(block)
            yield block
        return
    limit = max(FREE_BYTES, MAX_RATIO * size)
    stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), packing)
    at = 0
    while stop is None or at < stop:
        try:
            block = cast(bytes, stream.read(_UNPACK_BYTES))
        except OSError as error:
            raise RowError(
                name,
                f"is damaged or cut off after {at:,} unpacked bytes ({error})",
                "Make or copy the file again.",
                "is damaged or cut off",
            ) from None
        if not block:
            return
        at += len(block)
        if at > limit:
            raise DataError(f"{name} unpacks to more than {limit:,} bytes, from {size:,}.", "Unpack it yourself if you trust it.")
        if at > start:
            block = block[max(0, start - at + len(block)) :]
            yield block if stop is None or at <= stop else block[: stop - at]


class Hashed:
    """A file that hashes what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.closed = False

    def read(self, num_bytes: int = -1) -> bytes:
        data = self._file.read(num_bytes)
        self._sha256.update(data)
        return data

    def close(self) -> None:
        """Asked for by Arrow when it has come to the end; the rest of the file is still to be hashed."""

    def hexdigest(self) -> str:
        """Of the whole file: reads what is left of it."""
        while self.read(BLOCK_BYTES):
            pass
        return self._sha256.hexdigest()


# -- what can go wrong -----------------------------------------------------------------------------------------------------


def _system_of(path: str) -> tuple[Any, str]:
    try:
        return fsspec.url_to_fs(path)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {_line(error)}.", "Give a local path, or a URL that fsspec knows (s3://, https://, ...)."
        ) from None


def _check_local(path: str, local: Path) -> None:
    """Refuse what would not answer like a file (a folder, a pipe, a device), by name."""
    try:
        mode = local.stat().st_mode
        if stat.S_ISREG(mode) and os.access(local, os.R_OK):
            return
    except FileNotFoundError:
        _missing(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Give a readable file.") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} cannot be read: it is a folder.", f"Name its files: {path.rstrip('/')}/*.jsonl.")
    if stat.S_ISREG(mode):
        raise DataError(f"{path} cannot be read: permission denied.", "Let the service's user read it (chmod).")
    raise DataError(f"{path} cannot be read: it is no regular file.", "Write the data into a file first.")


def _missing(path: str) -> NoReturn:
    remedy = "Give a path that exists, relative to the job file."
    parts = path.rstrip("/").split("/")[-2:]
    if (
        "://" not in path
        and len(parts) == 2
        and all(re.fullmatch(r"[\w.-]+", part) for part in parts)
        and not _DATA_SUFFIX.search(parts[1])
    ):
        remedy = f"A dataset of the Hugging Face hub is written hf://{'/'.join(parts)}. " + remedy
    raise DataError(f"There is no file {path}.", remedy)


def _asked(path: str, ask: Any, *arguments: Any) -> Any:
    """What a file system answers. Its back ends raise whatever they like."""
    try:
        return ask(*arguments)
    except UserError:
        raise
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):  # what HTTP says of a dead server
            raise Unavailable(f"{path} does not answer: {_line(error.__cause__)}.", "Check the address, and try again.") from None
        _missing(path)
    except PermissionError as error:
        raise DataError(f"{path} cannot be read: {_line(error)}.", "Check who may read it, and the keys in the environment.") from None
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            raise DataError(
                f"{path} cannot be read: {_line(error)}.", "Set the keys in the environment (AWS_ACCESS_KEY_ID, ...)."
            ) from None
        raise Unavailable(f"{path} does not answer: {_line(error)}.", "Check the address and the network, and try again.") from None


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")


# -- Hugging Face datasets ---------------------------------------------------------------------------------------------------


def _hub_url(source: Source) -> str:
    """All that names one split of a dataset, with the commit that the hub has now: whoever reads it later gets the same rows."""
    import huggingface_hub

    found = cast("re.Match[str]", _HUB.fullmatch(source.path))
    revision = found["revision"]
    with suppress(Exception):  # without a hub, `datasets` finds what this machine has, or says what is wrong
        revision = huggingface_hub.dataset_info(found["id"], revision=revision).sha
    at = f"@{revision}" if revision else ""
    return f"hf://{found['id']}{at}?subset={source.subset or ''}&split={source.split}"


@functools.lru_cache(maxsize=32)
def _from_hub(url: str) -> str:
    """A Parquet file with the rows of one split, made once on each machine: its name is the dataset's fingerprint."""
    import datasets  # takes a second to load, and most jobs need none
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    place, _, query = url.partition("?")
    subset, split = (part.partition("=")[2] for part in query.split("&", 1))
    found = cast("re.Match[str]", _HUB.fullmatch(place))
    if Path(found["id"]).exists():
        raise DataError(f"{place} is also a folder here, {found['id']}.", "Run from another folder, or name its files without hf://.")
    disable_progress_bars()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(found["id"], subset or None, split=split, revision=found["revision"])
    except (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError) as error:
        raise DataError(f"{place} cannot be read: {_line(error)}.", "Check the name; a private or gated dataset needs HF_TOKEN.") from None
    except (ValueError, RuntimeError) as error:  # no such subset or split, or a dataset that is a program
        raise DataError(f"{place} cannot be read: {_line(error)}.", "Set `subset` and `split` beside `path` to ones that it has.") from None
    except Exception as error:
        raise Unavailable(f"{place} does not answer: {_line(error)}.", "Check the network and HF_ENDPOINT, and try again.") from None
    folder = Path(os.environ.get("TUNEYARD_DATASETS") or Path.home() / ".cache" / "tuneyard" / "datasets")
    path = folder / f"{dataset._fingerprint}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        dataset.to_parquet(temporary)
        temporary.replace(path)
    return str(path)
