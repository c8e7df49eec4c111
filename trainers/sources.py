"""Any source -> conversations: {"messages", "tools", "slice", "class", "id": "file:line"}.

`inspect` walks through a source once: its format (by the first row's columns), its hash, and chunks cut at row ends; `read`
turns a chunk into conversations, anywhere and in any order. Every row is held to the first one's format, and becomes a
conversation or a RowError with file, line and remedy: none is lost. What lies where is the business of `places`, what
bytes make a row that of `rows`, what a row means that of `formats`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import BinaryIO, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from trainers import rows
from trainers.errors import DataError, RowError
from trainers.formats import NORMALISER_VERSION as NORMALISER_VERSION
from trainers.formats import (
    REQUIRED,
    SHAPES,
    Bad,
    Conversation,
    Row,
    check_columns,
    columns_of,
    detect,
    kind_of,
    look_up,
    mapped_keys,
    normalise,
    rename,
    suggest,
)
from trainers.places import Hashed, blocks, files_of, open_file, packing_of, stamp_of
from trainers.spec import Source

_HEAD_ROWS = 100  # looked at to find the format and the mapped columns
_TABLE = re.compile(r"\.(csv|tsv)(\.(gz|zst))?(\?.*)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Chunk:
    """A run of whole rows of one file, with all that is needed to read it alone. Plain values: it travels as JSON."""

    path: str
    name: str
    """What errors call the file."""
    kind: str
    """`lines`, `array`, `csv`, `tsv` or `parquet`."""
    packing: str
    """`gzip`, `zstd` or nothing."""
    size: int
    """Bytes of the whole file, as stored."""
    stamp: str
    """Changes when the file does."""
    format: str = ""
    columns: dict[str, str] | None = None
    """The column map."""
    header: list[str] | None = None
    """Columns of a table."""
    first: str = ""
    """The row that decided the format; empty where the spec named it."""
    start: int = 0
    stop: int = 0
    """Range of unpacked bytes; in Parquet, of row groups."""
    line: int = 1
    """Number of the first line; in Parquet, of the first row."""
    last: bool = True
    """It goes on to the end of the file."""

    @property
    def place(self) -> str:
        """What stands before a row's number in ids and errors."""
        return f"{self.name}:row " if self.kind == "parquet" else f"{self.name}:"


@dataclass(frozen=True)
class Inspection:
    """What one pass over a source tells."""

    name: str
    url: str
    """Where it was read from."""
    format: str
    bytes: int
    """As stored, all files together."""
    sha256: str
    """Of the stored bytes; of several files, of their hashes, one a line."""
    rows: int
    """At most so many (blank lines count)."""
    chunks: list[Chunk]


def conversations(source: Source, slice_by: str | None = None, keep: str | None = None) -> Iterator[Conversation]:
    """Every conversation of a source, in order, with the column `keep` as "kept"; raises RowError at the first bad row."""
    for chunk in inspect(source).chunks:
        for row in read(chunk, slice_by, keep=keep):
            if isinstance(row, RowError):
                raise row
            yield row


def inspect(source: Source, chunk_bytes: int = 4 * 2**20) -> Inspection:
    """Find a source's format and hash, and cut it into chunks of at least `chunk_bytes` where it has so many. Memory stays flat.

    Raises DataError for what is wrong with a whole file; of its rows, only those are looked at that decide the format.
    """
    files = [_probe(path, name) for path, name in files_of(source)]
    format, first = _decide(source, files[0])
    chunks: list[Chunk] = []
    hashes = []
    size = num_rows = 0
    for file in files:
        file = replace(file, format=format, first=first, columns=source.columns or None)
        cut, rows_of_file, sha256 = _cut(file, chunk_bytes)
        if rows_of_file == 0:
            _empty(file.name)
        chunks += cut
        hashes.append(sha256)
        size += file.size
        num_rows += rows_of_file
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    url = files[0].path.partition("?")[0] if files[0].path.startswith("hf://") else source.path  # with the commit
    return Inspection(source.shown, url, format, size, sha256, num_rows, chunks)


def first_rows(source: Source, slice_by: str | None = None, class_by: str | None = None) -> Iterator[Conversation | RowError]:
    """The rows of a source as `read` gives them, without a pass over its files before: for who takes only the first of them."""
    files = files_of(source)
    format, first = _decide(source, _probe(*files[0]))
    for path, name in files:
        file = replace(_probe(path, name), format=format, first=first, columns=source.columns or None)
        yield from read(file, slice_by, class_by)


def read(
    chunk: Chunk, slice_by: str | None = None, class_by: str | None = None, keep: str | None = None
) -> Iterator[Conversation | RowError]:
    """The rows of one chunk in order, each as a conversation, or as the RowError that says why it is none.

    `slice_by` and `class_by` name columns whose values go along as "slice" and "class"; `keep` one that goes along as it is, as "kept".
    Where a file is broken off, its error comes last.
    """
    if stamp_of(chunk.path) != chunk.stamp:
        raise DataError(f"{chunk.name} has changed while it was being read.", "Run the job again when the file is whole.")
    format, columns, required, place = chunk.format, chunk.columns, REQUIRED[chunk.format], chunk.place
    number = chunk.line - 1
    try:
        for number, row in _rows(chunk, slice_by, class_by, keep):
            where = f"{place}{number}"
            if type(row) is not dict:
                yield _error(where, row)  # type: ignore[arg-type]
                continue
            named = rename(row, columns) if columns else row
            try:
                for key in required:
                    if key not in named:
                        _misses(named, key, chunk)
                if format == "messages" and "schemaVersion" in row:
                    _misses(named, "content", chunk)
                conversation = normalise(named, format)
                conversation["slice"] = _group(row, named, slice_by) if slice_by else None
                conversation["class"] = _group(row, named, class_by) if class_by else None
            except Bad as bad:
                yield _error(where, bad)
                continue
            conversation["id"] = where
            if keep:
                conversation["kept"] = look_up(named, keep) if look_up(named, keep) is not None else look_up(row, keep)
            yield conversation
    except RowError as error:  # nothing after it can be read
        yield RowError(f"{place}{number + 1}", error.what, error.remedy, error.kind)


def _error(where: str, bad: Bad) -> RowError:
    return RowError(where, bad.what, bad.remedy, bad.kind)


def _misses(row: Row, key: str, chunk: Chunk) -> NoReturn:
    """A row is not in its file's format."""
    other = detect(row)
    if other and other != chunk.format and chunk.first:
        what = f"is a row in {other} format, but {chunk.first} is in {chunk.format} format"
        raise Bad(what, "Put each format into a file of its own.", "is in another format than the rows before it")
    remedy = f"A row in {chunk.format} format looks like {SHAPES[chunk.format]}. {suggest(row)}"
    raise Bad(f"has no `{key}` (columns: {_listed(row)})", remedy, f"has no `{key}`")


def _group(row: Row, named: Row, column: str) -> str | None:
    value = look_up(named, column)
    if value is None:
        value = look_up(row, column)  # by the data's own name
    if value is None or value == "" or isinstance(value, str | int | float):
        return None if value is None or value == "" else str(value)
    what = f"has a {kind_of(value)} as `{column}`"
    raise Bad(what, "A column to group by holds text or numbers.", what)


# -- files to chunks ---------------------------------------------------------------------------------------------------------


def _probe(path: str, name: str) -> Chunk:
    """What a file is, as one chunk of all of it."""
    stamp = stamp_of(path)
    with open_file(path) as file:
        packing = packing_of(file, name)
        size = file.seek(0, 2)
        file.seek(0)
        head = next(blocks(file, name, packing, size), b"").removeprefix(b"\xef\xbb\xbf").lstrip()
    table = _TABLE.search(path) or _TABLE.search(name)
    if head.startswith(b"PAR1"):
        if packing:
            raise DataError(f"{name} is a Parquet file inside {packing}.", "Unpack it: Parquet is packed by itself.")
        kind = "parquet"
    elif table and not head.startswith((b"{", b"[")):
        kind = table[1].lower()
    else:
        kind = "array" if head.startswith(b"[") else "lines"
    whole = Chunk(path, name, kind, packing, size, stamp, stop=size)
    return replace(whole, header=_header(whole)) if kind in ("csv", "tsv", "parquet") else whole


def _header(file: Chunk) -> list[str]:
    with open_file(file.path) as stored:
        if file.kind == "parquet":
            return _parquet(stored, file.name).schema_arrow.names
        header = rows.csv_header(blocks(stored, file.name, file.packing, file.size), _delimiter(file))
    if isinstance(header, Bad):
        raise _error(f"{file.name}:1", header)
    return header


def _decide(source: Source, file: Chunk) -> tuple[str, str]:
    """The source's format, and the row that decided it (nothing where the spec names it); raises DataError if its columns do not tell."""
    seen: list[rows.Numbered] = []
    try:
        seen.extend(islice(_rows(file), _HEAD_ROWS))
    except RowError:  # the file is broken off; what came before stays in the list
        if not seen:
            raise
    head = [(number, row) for number, row in seen if not isinstance(row, Bad)]
    if not head and seen:
        raise _error(f"{file.place}{seen[0][0]}", seen[0][1])  # type: ignore[arg-type]
    if not head:
        _empty(file.name)
    number, row = head[0]
    columns = file.header or list(row)
    for ours, path in source.columns.items():
        if ours in mapped_keys(source.columns) and path.split(".")[0] not in columns and all(look_up(r, path) is None for _, r in head):
            raise DataError(
                f"{file.name} has no column `{path}` (columns: {_listed(columns)}).",
                f"Mend `columns: {{{ours}: ...}}`: it maps the format's name to the data's.",
            )
    keys = {*columns} - {*source.columns.values()} | mapped_keys(source.columns)
    format = detect(keys) if source.format == "auto" else source.format
    table = file.header is not None
    if format is None or (table and not keys.issuperset(REQUIRED[format])):
        what = "has no known format" if format is None else f"has no `{next(k for k in REQUIRED[format] if k not in keys)}`"
        where = file.name if table else f"{file.place}{number}"
        raise RowError(where, f"{what} (columns: {_listed(columns)})", suggest(columns), what)
    try:
        check_columns(source.columns, format)
    except Bad as bad:
        raise _error(file.name, bad) from None
    return format, f"{file.place}{number}" if source.format == "auto" else ""


def _cut(file: Chunk, chunk_bytes: int) -> tuple[list[Chunk], int, str]:
    """(chunks of at least `chunk_bytes`, rows at most, sha256 of the stored bytes) of a file."""
    chunks: list[Chunk] = []
    start, line = 0, 1  # of the chunk that is being gathered
    gathered = num_rows = 0
    mark = None
    with open_file(file.path) as stored:
        hashed = Hashed(stored)
        try:
            for mark, size in _marks(file, hashed, stored):
                num_rows = mark.rows
                gathered += size
                # A chunk of a packed file can only be come to through all that is before it: fewer chunks, the further in they are.
                if gathered >= (max(chunk_bytes, start // 4) if file.packing else chunk_bytes):
                    chunks.append(replace(file, start=start, stop=mark.at, line=line, last=False))
                    start, line, gathered = mark.at, mark.line, 0
        except RowError:
            gathered, num_rows = 1, num_rows + 1  # the last chunk comes upon it again
        sha256 = hashed.hexdigest() if file.kind != "parquet" else _hash(file.path)
    if gathered:
        chunks.append(replace(file, start=start, stop=mark.at if mark else 0, line=line))
    elif chunks:
        chunks[-1] = replace(chunks[-1], last=True)
    return chunks, num_rows, sha256


def _marks(file: Chunk, hashed: Hashed, stored: BinaryIO) -> Iterator[tuple[rows.Mark, int]]:
    """Where the file may be cut, each with the bytes since the mark before."""
    if file.kind == "parquet":
        yield from rows.parquet_marks(_parquet(stored, file.name))
        return
    stream = blocks(hashed, file.name, file.packing, file.size)  # type: ignore[arg-type]
    if file.kind == "lines":
        marks = rows.line_marks(stream)
    elif file.kind == "array":
        marks = rows.array_marks(stream)
    else:
        marks = rows.csv_marks(stream, _delimiter(file))
    at = 0
    for mark in marks:
        yield mark, mark.at - at
        at = mark.at


def _rows(chunk: Chunk, *grouping: str | None) -> Iterator[rows.Numbered]:
    with open_file(chunk.path) as stored:
        if chunk.kind == "parquet":
            file = _parquet(stored, chunk.name)
            groups = range(chunk.start, file.metadata.num_row_groups if chunk.last else chunk.stop)
            yield from rows.parquet_rows(file, groups, chunk.line, _wanted(chunk, grouping))
            return
        stream = blocks(stored, chunk.name, chunk.packing, chunk.size, chunk.start, None if chunk.last else chunk.stop)
        if chunk.kind == "lines":
            yield from rows.line_rows(stream, chunk.line)
        elif chunk.kind == "array":
            yield from rows.array_rows(stream, chunk.start, chunk.line, chunk.last)
        else:
            yield from rows.csv_rows(stream, chunk.start, chunk.line, _delimiter(chunk), chunk.header or [])


def _wanted(chunk: Chunk, grouping: tuple[str | None, ...]) -> list[str]:
    """The columns of a table that anybody looks at; all while the format is not known."""
    header = chunk.header or []
    if not chunk.format:
        return header
    asked = {*columns_of(chunk.format), *(chunk.columns or {}).values(), *filter(None, grouping)}
    return [name for name in header if name in asked or any(path.startswith(f"{name}.") for path in asked)]


def _parquet(stored: BinaryIO, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stored)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is no whole Parquet file ({' '.join(str(error).split())[:200]}).", "Write or copy it again.") from None


def _delimiter(file: Chunk) -> str:
    return "\t" if file.kind == "tsv" else ","


def _hash(path: str) -> str:
    with open_file(path) as stored:
        return Hashed(stored).hexdigest()


def _empty(name: str) -> NoReturn:
    raise DataError(f"{name} is empty.", "Put at least one example into it.")


def _listed(columns: object) -> str:
    names = [str(name) for name in columns]  # type: ignore[attr-defined]
    return ", ".join(names[:30]) + (", ..." if len(names) > 30 else "") if names else "none"
