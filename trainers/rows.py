"""Bytes -> rows, for every kind of file: JSON lines, a JSON array, CSV and TSV, Parquet. Nothing is held whole in memory.

Each kind has two functions. `*_marks` walks through a whole file and says where it may be cut; `*_rows` gives the rows
of one piece, each as (number of the line that it begins on, the row or the Bad that it is). Both walk the same way, so
a piece read alone holds exactly the rows that it holds in the whole.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from trainers.formats import SHAPES, Bad, Row, kind_of

MAX_ROW_BYTES = 16 * 2**20
csv.field_size_limit(MAX_ROW_BYTES)

Numbered = tuple[int, Row | Bad]


class Mark(NamedTuple):
    """A place where a file may be cut."""

    at: int
    """Offset of the first byte after it, unpacked; in Parquet, the index of the next row group."""
    line: int
    """Number of the line (in Parquet, of the row) that begins there."""
    rows: int
    """Rows before it, or lines where only reading would tell rows."""


# -- JSON ------------------------------------------------------------------------------------------------------------------


def parse(text: bytes) -> Row | Bad:
    """One row of JSON."""
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _why(text)
    if type(row) is not dict:
        return Bad(f"is a JSON {kind_of(row)}, not an object", f"Write rows like {SHAPES['messages']}.", "is not a JSON object")
    # In text, a quote before a colon is escaped: as many others as keys, and no key was given twice (the last would win in silence).
    if text.count(b'":') - text.count(b'\\":') != _num_keys(row):
        return _parse_slowly(text)
    return row


def _num_keys(value: Any) -> int:
    if type(value) is dict:
        num = len(value)
        value = value.values()
    else:
        num = 0
    for item in value:
        kind = type(item)
        if kind is dict or kind is list:
            num += _num_keys(item)
    return num


class _Twice(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _parse_slowly(text: bytes) -> Row | Bad:
    """One row by the json module, which knows of keys given twice and says where an error is."""
    remedy = "Write one JSON object per line, or one JSON array."
    try:
        row = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Bad(f"is not UTF-8 (byte {error.start + 1} of the line)", "Save the file as UTF-8.", "is not UTF-8")
    except _Twice as error:
        return Bad(f"has the key `{str(error)[:80]}` twice", "Keep one of them.", "has a key twice")
    except json.JSONDecodeError as error:
        return Bad(f"is not JSON ({error.msg}, column {error.colno})", remedy, "is not JSON")
    except RecursionError:
        return Bad("is nested too deep to be read as JSON", "Make it flatter.")
    except ValueError as error:
        return Bad(f"cannot be read as JSON ({error})", remedy, "is not JSON")
    return row


def _why(text: bytes) -> Bad:
    """Why orjson refuses a text."""
    found = _parse_slowly(text)
    if isinstance(found, Bad):
        return found
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Bad("has half a character (a lone surrogate)", "Write characters outside the BMP as a pair of \\u escapes, or as UTF-8.")
    except RecursionError:
        pass
    return Bad("cannot be read as JSON (a number too large, or nested too deep)", "Write numbers of at most 64 bits.", "is not JSON")


_TOO_LONG = (f"is longer than {MAX_ROW_BYTES:,} bytes", "Split the example, or check that the file has line ends.")


def lines(blocks: Iterable[bytes], line: int, skip_blank: bool = False) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without their ends; None for one that is too long to be held. `skip_blank` passes quickly over many blank ones."""
    tail: bytes | None = b""  # None while in a line that is too long
    for block in blocks:
        if skip_blank and tail == b"" and block.isspace():
            line += block.count(b"\n")
            continue
        first, *rest = block.split(b"\n")
        if tail is not None:
            tail += first
            if len(tail) > MAX_ROW_BYTES:
                tail = None
        if not rest:
            continue
        yield line, tail
        line += 1
        tail = rest.pop()
        yield from enumerate(rest, line)
        line += len(rest)
    if tail != b"":
        yield line, tail


def line_marks(blocks: Iterable[bytes]) -> Iterator[Mark]:
    at, line = 0, 1
    size, num_lines = 0, 1
    for block in blocks:
        end = block.rfind(b"\n") + 1
        if end:
            at = size + end
            num_lines = line = num_lines + block.count(b"\n")
            yield Mark(at, line, line - 1)
        size += len(block)
    if size > at:
        yield Mark(size, line + 1, line)


def line_rows(blocks: Iterable[bytes], line: int) -> Iterator[Numbered]:
    for number, text in lines(blocks, line, skip_blank=True):
        if text is None:
            yield number, Bad(*_TOO_LONG)
        elif text and not text.isspace():
            if number == 1 and text.startswith(codecs.BOM_UTF8):
                text = text[len(codecs.BOM_UTF8) :]
                if not text.strip():
                    continue
            yield number, parse(text)


# -- a JSON array --------------------------------------------------------------------------------------------------------------

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+[{}\[\]]", re.DOTALL)  # the next one that is not in a string
_SCALAR = re.compile(_STRING + rb'|[^\s,\[\]{}"]++', re.DOTALL)
_BLANK = re.compile(rb"[ \t\r\n]*")
_MEND = "Mend the JSON array."


class _Window:
    """The part of a stream that is being looked at: `data[at:]` comes next; `line` and `offset` are those of `data[at]`."""

    def __init__(self, blocks: Iterable[bytes], line: int) -> None:
        self._blocks = iter(blocks)
        self.data = b""
        self.at = 0
        self.line = line
        self.offset = 0

    def more(self) -> bool:
        """Make `data` about twice as long; False at the end."""
        gathered, size = [self.data[self.at :]], 0
        while size <= len(gathered[0]) and (block := next(self._blocks, b"")):
            gathered.append(block)
            size += len(block)
        self.data, self.at = b"".join(gathered), 0
        return size > 0

    def take(self, end: int) -> bytes:
        taken = self.data[self.at : end]
        self.line += taken.count(b"\n")
        self.offset += len(taken)
        self.at = end
        return taken

    def next_char(self) -> bytes:
        """The next byte that is no blank, not taken; nothing at the end."""
        while True:
            self.take(_BLANK.match(self.data, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.data):
                return self.data[self.at : self.at + 1]
            if not self.more():
                return b""


def _element(window: _Window) -> bytes | None:
    """The text of the element that begins here; None if it does not end within the file or the limit."""
    while True:
        data, at, depth = window.data, window.at, 0
        if data[at] in b"{[}":
            while bracket := _BRACKET.match(data, at):
                at = bracket.end()
                depth += 1 if data[at - 1] in b"{[" else -1
                if depth <= 0:
                    return window.take(at)
        elif (scalar := _SCALAR.match(data, at)) and scalar.end() < len(data):
            return window.take(scalar.end())
        if len(data) - window.at > MAX_ROW_BYTES or not window.more():
            return None


def _elements(blocks: Iterable[bytes], start: int, line: int, last: bool) -> Iterator[tuple[_Window, int, bytes | Bad]]:
    """(the window after it, the line it begins on, its text) for each element; a Bad where the array itself is broken, as the last.

    A piece that begins inside the array begins with an element; the last one holds the array's end.
    """
    window = _Window(blocks, line)
    window.offset = start
    if start == 0:
        while len(window.data) < len(codecs.BOM_UTF8) and window.more():
            pass
        if window.data.startswith(codecs.BOM_UTF8):
            window.take(len(codecs.BOM_UTF8))
        window.next_char()
        window.take(window.at + 1)  # the bracket
        if window.next_char() == b"]":
            return
    while char := window.next_char():
        line = window.line
        if char in b"],":
            yield window, line, Bad(f"is not JSON (a value is missing before {char.decode()})", _MEND, "is not JSON")
            return
        text = _element(window)
        if text is None:
            if len(window.data) > MAX_ROW_BYTES:
                yield window, line, Bad(*_TOO_LONG)
            else:
                yield window, line, Bad("is not JSON (the file ends before it does)", _MEND, "is not JSON")
            return
        separator = window.next_char()
        if separator == b",":
            window.take(window.at + 1)
        yield window, line, text
        if separator == b"]":
            window.take(window.at + 1)
            if window.next_char():
                what = "goes on after the JSON array's end"
                yield window, window.line, Bad(what, "Write one JSON object per line, or one JSON array.")
            return
        if separator != b",":
            what = "is not JSON (a comma or a closing bracket is missing)"
            yield window, window.line, Bad(what, _MEND, "is not JSON")
            return
    if last:
        yield window, window.line, Bad("is not JSON (the file ends before the array does)", _MEND, "is not JSON")


def array_marks(blocks: Iterable[bytes]) -> Iterator[Mark]:
    for rows, (window, _, _) in enumerate(_elements(blocks, 0, 1, True), 1):
        yield Mark(window.offset, window.line, rows)


def array_rows(blocks: Iterable[bytes], start: int, line: int, last: bool) -> Iterator[Numbered]:
    for _, number, text in _elements(blocks, start, line, last):
        if isinstance(text, Bad):
            yield number, text
        elif len(text) > MAX_ROW_BYTES:
            yield number, Bad(*_TOO_LONG)
        else:
            yield number, parse(text)


# -- CSV -----------------------------------------------------------------------------------------------------------------------


class _Feed:
    """Lines for csv.reader, which asks for just those that a record needs; so this knows where records begin and end."""

    def __init__(self, blocks: Iterable[bytes], start: int, line: int) -> None:
        self._lines = lines(blocks, line)
        self._record_start = start
        self.offset = start
        self.line = line
        self.broken = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, text = next(self._lines)
        if text is None:
            self.broken = True  # where the next record begins is anybody's guess
            raise csv.Error(_TOO_LONG[0])
        self.line = number + 1
        self.offset += len(text) + 1
        if self.offset - self._record_start > MAX_ROW_BYTES:
            self.broken = True
            raise csv.Error("a quoted value does not end")
        if number == 1:
            text = text.removeprefix(codecs.BOM_UTF8)
        return text.decode(errors="surrogateescape") + "\n"

    def begin_record(self) -> int:
        self._record_start = self.offset
        return self.line


def _records(feed: _Feed, delimiter: str) -> Iterator[tuple[int, list[str] | Bad]]:
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while not feed.broken:
        line = feed.begin_record()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield (
                line,
                Bad(f"is not CSV ({error})", 'Put values with quotes or line ends in quotes, and double their quotes ("").', "is not CSV"),
            )
            continue
        if values:
            yield line, values


def csv_marks(blocks: Iterable[bytes], delimiter: str) -> Iterator[Mark]:
    """The first mark is after the header."""
    feed = _Feed(blocks, 0, 1)
    for rows, _ in enumerate(_records(feed, delimiter)):
        yield Mark(feed.offset, feed.line, rows)


def csv_header(blocks: Iterable[bytes], delimiter: str) -> list[str] | Bad:
    header = next(_records(_Feed(blocks, 0, 1), delimiter), (1, []))[1]
    if not isinstance(header, Bad) and (twice := {name for name in header if header.count(name) > 1}):
        return Bad(f"has the column `{min(twice)}` twice", "Give each column a name of its own.")
    return header


def csv_rows(blocks: Iterable[bytes], start: int, line: int, delimiter: str, header: list[str]) -> Iterator[Numbered]:
    records = _records(_Feed(blocks, start, line), delimiter)
    if start == 0:
        next(records, None)
    for number, values in records:
        if isinstance(values, Bad):
            yield number, values
        elif len(values) != len(header):
            what = f"has {len(values)} values where the header has {len(header)}"
            yield number, Bad(what, "Put values with commas in quotes.", "has another number of values than the header")
        else:
            try:
                "".join(values).encode()
            except UnicodeEncodeError:
                yield number, Bad("is not UTF-8", "Save the file as UTF-8.")
            else:
                yield number, dict(zip(header, values, strict=True))


# -- Parquet -------------------------------------------------------------------------------------------------------------------

_BATCH_BYTES = 4 * 2**20


def parquet_marks(file: pq.ParquetFile) -> Iterator[tuple[Mark, int]]:
    """Each with the bytes of its row group, unpacked."""
    rows = 0
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        rows += group.num_rows
        yield Mark(index + 1, rows + 1, rows), group.total_byte_size


def parquet_rows(file: pq.ParquetFile, groups: range, row: int, columns: list[str]) -> Iterator[Numbered]:
    """Rows with the columns that are asked for, without nulls: a struct's missing keys are nulls in a table."""
    for index in groups:
        group = file.metadata.row_group(index)
        batch_rows = max(1, min(1024, _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
        try:
            for batch in file.iter_batches(batch_rows, [index], columns, use_threads=False):
                check = batch.nbytes > MAX_ROW_BYTES
                for values in _values(batch.to_struct_array()):
                    too_long = check and len(orjson.dumps(values, default=str)) > MAX_ROW_BYTES
                    yield row, Bad(*_TOO_LONG) if too_long else values
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            what = f"and the rows after it cannot be read ({' '.join(str(error).split())[:200]})"
            yield row, Bad(what, "Write the Parquet file again.", "cannot be read from Parquet")
            return


def _values(array: pa.Array) -> list[Any]:
    """Python's values, column by column (several times as fast as Arrow's own way, which goes value by value)."""
    if pa.types.is_struct(array.type):
        names = [field.name for field in array.type]
        columns = [_values(column) for column in array.flatten()]
        values = [{k: v for k, v in zip(names, row, strict=True) if v is not None} for row in zip(*columns, strict=True)]
        values = values or [{} for _ in range(len(array))]  # no field is asked for
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        items = iter(_values(array.flatten()))
        values = [list(islice(items, length or 0)) for length in array.value_lengths().to_pylist()]
    elif pa.types.is_nested(array.type):
        return [_without_nulls(value) for value in array.to_pylist(maps_as_pydicts="lossy")]
    else:
        return array.to_pylist()
    if not array.null_count:
        return values
    return [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]


def _without_nulls(value: Any) -> Any:
    if type(value) is dict:
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if type(value) is list:
        return [_without_nulls(item) for item in value]
    return value
