"""Bad input, as far as reading goes: an error with file, row and remedy, in bounded memory, and no row lost in silence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import places
from trainers.errors import DataError, RowError
from trainers.rows import MAX_ROW_BYTES
from trainers.sources import conversations, inspect, read
from trainers.spec import Source

ROOT = Path(__file__).parents[2]
GOOD = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
ALPACA = '{"instruction": "q", "input": "", "output": "a"}'


def _with(message: str) -> bytes:
    return b'{"messages": [{"role": "user", "content": "q"}, ' + message.encode() + b"]}"


BAD_ROWS = {
    "cut off": (b'{"messages": [', "is not JSON (Expecting value, column 15)", "is not JSON"),
    "not an object": (b"[1]", "is a JSON list, not an object", "is not a JSON object"),
    "a number": (b"7", "is a JSON number, not an object", "is not a JSON object"),
    "a word": (b"hello", "is not JSON (Expecting value, column 1)", "is not JSON"),
    "deep": (b"[" * 1_000_000, "is nested too deep to be read as JSON", "is nested too deep to be read as JSON"),
    "deep in a column": (
        b'{"x": ' + b"[" * 900 + b"]" * 900 + b', "messages": 1}',
        "has a number as `messages`",
        "has no list of messages as `messages`",
    ),
    "a number of too many digits": (b'{"messages": ' + b"9" * 5000 + b"}", "cannot be read as JSON", "is not JSON"),
    "a number too large": (b'{"messages": 1e999}', "cannot be read as JSON", "is not JSON"),
    "NaN": (b'{"messages": NaN}', "cannot be read as JSON (NaN is no JSON value)", "is not JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "is not UTF-8 (byte 15 of the line)", "is not UTF-8"),
    "Latin-1": ('{"messages": "ü"}'.encode("latin-1"), "is not UTF-8 (byte 15 of the line)", "is not UTF-8"),
    "half a character in UTF-8": (b'{"messages": "\xed\xa0\x80"}', "is not UTF-8", "is not UTF-8"),
    "half a character": (_with(r'{"role": "assistant", "content": "\ud800"}'), "has half a character (a lone surrogate)", None),
    "half a character in a name": (b'{"\\udfff": 1}', "has half a character (a lone surrogate)", None),
    "raw NUL": (_with('{"role": "assistant", "content": "a\0"}'), "is not JSON (Invalid control character at", "is not JSON"),
    "NULs": (b"\0" * 500, "is not JSON", "is not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "is not JSON (Unexpected UTF-8 BOM", "is not JSON"),
    "a key twice": (b'{"messages": 1, "messages": 2}', "has the key `messages` twice", "has a key twice"),
    "a key twice inside": (
        _with('{"role": "assistant", "content": "a", "content": "b"}'),
        "has the key `content` twice",
        "has a key twice",
    ),
    "a key twice beside quotes": (
        _with(r'{"role": "assistant", "content": "\":", "content": "\\\":"}'),
        "has the key `content` twice",
        "has a key twice",
    ),
    "no known key": (b'{"chat": []}', "has no `messages` (columns: chat)", "has no `messages`"),
    "other format": (
        ALPACA.encode(),
        "is a row in alpaca format, but data.jsonl:1 is in messages format",
        "is in another format than the rows before it",
    ),
    "bedrock": (
        b'{"schemaVersion": "bedrock-conversation-2024", "messages": []}',
        "is a row in bedrock format, but data.jsonl:1 is in messages format",
        "is in another format than the rows before it",
    ),
    "number as content": (
        _with('{"role": "assistant", "content": 5}'),
        "has a number where message 2 needs text",
        "has a number where text belongs",
    ),
}
AS_ELEMENT = {
    bad: row for bad, row in BAD_ROWS.items() if bad not in ("cut off", "deep", "a byte order mark")
}  # in an array, these break it


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named_and_the_others_are_read(put: Any, bad: str) -> None:
    line, says, kind = BAD_ROWS[bad]
    source = put(b"\n".join([GOOD.encode(), GOOD.encode(), line, GOOD.encode()]))
    one, two, error, four = (row for chunk in inspect(source).chunks for row in read(chunk))
    assert [c["id"] for c in (one, two, four)] == ["data.jsonl:1", "data.jsonl:2", "data.jsonl:4"]  # type: ignore[index]
    assert isinstance(error, RowError) and error.where == "data.jsonl:3" and error.what.startswith(says), error
    assert error.message == f"data.jsonl:3 {error.what}." and error.remedy and len(error.message) < 500
    assert error.kind == (kind or says)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.where, copy.what, copy.remedy, copy.kind, str(copy)) == (error.where, error.what, error.remedy, error.kind, str(error))
    with pytest.raises(RowError) as raised:
        list(conversations(source))
    assert str(raised.value) == str(error)


@pytest.mark.parametrize("bad", AS_ELEMENT)
def test_a_bad_element_is_named_and_the_others_are_read(put: Any, bad: str) -> None:
    element, says, _ = AS_ELEMENT[bad]
    source = put(b"[\n" + GOOD.encode() + b",\n" + element + b" ,\n" + GOOD.encode() + b"\n]")
    _, error, good = (row for chunk in inspect(source, 1).chunks for row in read(chunk))
    assert isinstance(error, RowError) and good["id"] == "data.jsonl:4"  # type: ignore[index]
    assert error.where == "data.jsonl:3" and error.what.startswith(says.replace("data.jsonl:1", "data.jsonl:2").split(" (")[0]), error


@pytest.mark.parametrize("bad", [bad for bad in BAD_ROWS if bad not in ("other format", "bedrock")])
def test_a_bad_first_row_is_named(put: Any, bad: str) -> None:
    with pytest.raises(RowError) as error:
        list(conversations(put(BAD_ROWS[bad][0])))
    assert error.value.where == "data.jsonl:1" and error.value.remedy


def test_a_bad_first_row_does_not_hide_the_others(put: Any) -> None:
    (chunk,) = inspect(put("hello\n" + GOOD)).chunks
    error, good = read(chunk)
    assert isinstance(error, RowError) and good["id"] == "data.jsonl:2"  # type: ignore[index]


def test_what_looks_bad_and_is_not(put: Any) -> None:
    """A NUL as an escape, characters outside the BMP, line separators that are none in JSON, quotes before colons, blanks after keys."""
    texts = ["a\0b", "🙂", "a\u2028b\u0085c", '{"a": "b", "a": 1}', "ends in a backslash \\", '\\":']
    rows = [json.dumps({"instruction": "q", "output": text}, ensure_ascii=ascii) for text in texts for ascii in (True, False)]
    rows.append('{"instruction" : "q", "output"\t: "a", "with\\\\": 1, "":""}')
    found = [c["messages"][-1]["content"] for c in conversations(put("\n".join(rows)))]
    assert found == [text for text in texts for _ in (True, False)] + ["a"]


BAD_FILES = {
    "empty": (b"", "data.jsonl is empty"),
    "blank": (b"\xef\xbb\xbf\n \r\n", "data.jsonl is empty"),
    "empty array": (b"[ ]", "data.jsonl is empty"),
    "empty gzip": (gzip.compress(b""), "data.jsonl is empty"),
    "UTF-16": (GOOD.encode("utf-16"), "data.jsonl:1 is not UTF-8"),
    "array not UTF-8": (b"[" + GOOD.encode() + b',\n"\xff"]', "data.jsonl:2 is not UTF-8"),
    "one pretty object": (json.dumps(json.loads(GOOD), indent=1).encode(), "data.jsonl:1 is not JSON"),
    "unknown format": (b'{"question": "q", "answer": "a"}', "data.jsonl:1 has no known format (columns: question, answer)"),
    "array without end": (b"[" + GOOD.encode(), "data.jsonl:1 is not JSON (a comma or a closing bracket is missing)"),
    "array cut off after a comma": (b"[" + GOOD.encode() + b",\n", "data.jsonl:2 is not JSON (the file ends before the array does)"),
    "array cut off in a row": (b"[" + GOOD.encode() + b",\n{", "data.jsonl:2 is not JSON (the file ends before it does)"),
    "array of nothing": (b"[", "data.jsonl:1 is not JSON (the file ends before the array does)"),
    "array with a bad row": (b"[\n" + GOOD.encode() + b",\n{]", "data.jsonl:3 is not JSON"),
    "array with a number": (b"[\n" + GOOD.encode() + b",\n7]", "data.jsonl:3 is a JSON number"),
    "array without comma": (b"[" + GOOD.encode() + b"\n" + GOOD.encode() + b"]", "data.jsonl:2 is not JSON (a comma or"),
    "array with a last comma": (b"[" + GOOD.encode() + b",\n]", "data.jsonl:2 is not JSON (a value is missing before ]"),
    "array with two commas": (b"[" + GOOD.encode() + b",\n,]", "data.jsonl:2 is not JSON (a value is missing before ,"),
    "lines after an array": (b"[" + GOOD.encode() + b"]\n" + GOOD.encode(), "data.jsonl:2 goes on after the JSON array's end"),
    "arrays on lines": (b"[1]\n[2]\n", "data.jsonl:1 is a JSON number"),
    "zip": (b"PK\x03\x04" + bytes(50), "data.jsonl is a zip archive"),
    "Parquet cut off": (b"PAR1" + bytes(50), "data.jsonl is no whole Parquet file"),
    "packed Parquet": (gzip.compress(b"PAR1" + bytes(50)), "data.jsonl is a Parquet file inside gzip"),
    "no gzip at all": (b"\x1f\x8b" + bytes(50), "data.jsonl is damaged or cut off after 0 unpacked bytes"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_named(put: Any, bad: str) -> None:
    content, says = BAD_FILES[bad]
    with pytest.raises(DataError) as error:
        list(conversations(put(content)))
    assert error.value.message.startswith(says), error.value.message
    assert error.value.remedy


def test_a_file_that_cannot_be_opened_is_named(put: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, says, remedy in [
        (f"{tmp_path}/none.jsonl", "There is no file", "relative to the job file"),
        (str(tmp_path), "it is a folder", "/*.jsonl"),
        (f"{tmp_path}/pipe", "it is no regular file", "Write"),
        ("/dev/zero", "it is no regular file", "Write"),
        (f"{tmp_path}/{'x' * 300}", "File name too long", "readable file"),
        ("nowhere://x.jsonl", "cannot be read", "fsspec"),
    ]:
        with pytest.raises(DataError) as error:
            inspect(Source(path=path))
        assert says in error.value.message and remedy in error.value.remedy, error.value


def test_a_file_without_permission_is_named(put: Any) -> None:
    path = Path(put(GOOD).path)
    tmp = Path(tempfile.gettempdir())
    for folder in path.parents:
        if folder != tmp and folder.is_relative_to(tmp) and folder.owner() == path.owner():
            folder.chmod(0o755)  # the file alone is closed
    code = """
import os, sys
from trainers.errors import DataError
from trainers.sources import inspect
from trainers.spec import Source
inspect(Source(path=sys.argv[1]))  # loads what nobody else may read
os.chmod(sys.argv[1], 0)
if os.getuid() == 0:
    os.setuid(65534)
try:
    inspect(Source(path=sys.argv[1]))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{path} cannot be read: permission denied. Let the service's user read it (chmod).", done.stderr


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(GOOD)
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "a.jsonl").write_text(GOOD)
    (data / "deep" / "b.jsonl").symlink_to(data / "a.jsonl")  # inside: fine
    assert len(list(conversations(Source(path=f"{data}/**/*.jsonl")))) == 2
    for link, target in [(data / "c.jsonl", tmp_path / "secret.jsonl"), (data / "linked", tmp_path)]:
        link.symlink_to(target)
        with pytest.raises(DataError) as error:
            inspect(Source(path=f"{data}/**/*.jsonl"))
        assert error.value.message.startswith(f"{link}") and "out of the folder" in error.value.message and error.value.remedy
        link.unlink()
    named = tmp_path / "named.jsonl"
    named.symlink_to(tmp_path / "secret.jsonl")
    assert len(list(conversations(Source(path=str(named))))) == 1  # by name, a link may lead anywhere


def test_a_table_with_a_renamed_column_shows_the_map_to_write(put: Any) -> None:
    for rows, map in [
        ([{"question": "q", "answer": "a"}], "{instruction: question, output: answer}"),
        ([{"instruction": "q", "outputs": "a"}], "{instruction: instruction, output: outputs}"),
        ([{"dialog": json.loads(GOOD)["messages"]}], "{messages: dialog}"),
    ]:
        data = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), data)
        with pytest.raises(DataError) as error:
            inspect(put(data.getvalue(), "x.parquet"))
        assert (
            error.value.message == f"x.parquet has no known format (columns: {', '.join(rows[0])})."
            and f"`columns: {map}`" in error.value.remedy
        )
    with pytest.raises(DataError, match=r"x.parquet has no `instruction` \(columns: dialog\)"):
        inspect(put(data.getvalue(), "x.parquet", format="alpaca"))


# -- tables ------------------------------------------------------------------------------------------------------------------

BAD_RECORDS = {
    "too few values": (b"q,a", "x.csv:3 has 2 values where the header has 3"),
    "too many values": (b"q,a,b,c", "x.csv:3 has 4 values where the header has 3"),
    "text after a quote": (b'"q"x,,a', "x.csv:3 is not CSV"),
    "not UTF-8": (b"\xff,,a", "x.csv:3 is not UTF-8"),
    "old line ends": (b"q,,a\rq,,a", "x.csv:3 is not CSV"),
    "no answer": (b"q,,", "x.csv:3 has an empty answer in `output`"),
}


@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_a_bad_record_is_named_and_the_others_are_read(put: Any, bad: str) -> None:
    record, says = BAD_RECORDS[bad]
    source = put(b"instruction,input,output\nq,,a\n" + record + b"\r\nq,,a", "x.csv")
    _, error, good = (row for chunk in inspect(source, 1).chunks for row in read(chunk))
    assert isinstance(error, RowError) and str(error).startswith(says) and error.remedy
    assert good["id"] == "x.csv:4"  # type: ignore[index]


def test_a_quote_that_does_not_end_is_an_error(put: Any) -> None:
    (chunk,) = inspect(put(b'instruction,output\nq,a\n"q,a\nq,a\n', "x.csv")).chunks
    good, error = read(chunk)
    assert isinstance(error, RowError) and error.message == "x.csv:3 is not CSV (unexpected end of data)." and good["id"] == "x.csv:2"  # type: ignore[index]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"instruction,output,output\nq,a,b", "x.csv:1 has the column `output` twice"),
        (b"instruction,output\n", "x.csv is empty"),
        (b"", "x.csv is empty"),
        (b"q;a\n1;2\n", "x.csv has no known format (columns: q;a)"),
    ],
)
def test_a_bad_table_is_named(put: Any, data: bytes, says: str) -> None:
    with pytest.raises(DataError) as error:
        inspect(put(data, "x.csv"))
    assert error.value.message.startswith(says)


def test_a_damaged_row_group_ends_the_reading_with_its_error(put: Any) -> None:
    rows = [{"instruction": f"{os.urandom(50).hex()}", "output": "a"} for _ in range(3000)]
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data, row_group_size=1000, use_dictionary=False, compression="snappy")
    broken = bytearray(data.getvalue())
    offset = pq.ParquetFile(data).metadata.row_group(1).column(0).data_page_offset
    broken[offset : offset + 2000] = os.urandom(2000)
    found = [row for chunk in inspect(put(bytes(broken), "x.parquet")).chunks for row in read(chunk)]
    assert len(found) == 1001 and isinstance(found[-1], RowError)
    assert found[-1].message.startswith("x.parquet:row 1001 and the rows after it cannot be read")


# -- packed files ------------------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_packed_file_that_is_cut_off_ends_with_its_error(put: Any, pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_UNPACK_BYTES", 100)
    rows = [json.dumps({"instruction": os.urandom(20).hex(), "output": str(i)}) for i in range(10_000)]
    packed = pack("\n".join(rows).encode())
    half = len(packed) // 2
    for stored in (packed[:half], packed[:half] + b"x" * 100 + packed[half + 100 :]):
        source = put(stored)
        for chunk_bytes in (2**30, 30_000):
            found = [row for chunk in inspect(source, chunk_bytes).chunks for row in read(chunk)]
            assert isinstance(found[-1], RowError) and found[-1].kind == "is damaged or cut off"
            if len(stored) == half:
                good = found[:-1]
                assert found[-1].where == f"data.jsonl:{len(good) + 1}" and 1000 < len(good) < 9500
                assert [c["messages"][-1]["content"] for c in good] == [str(i) for i in range(len(good))]  # type: ignore[index]


# -- memory and time -----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, time
from pathlib import Path
from trainers.errors import RowError, TuneyardError
from trainers.sources import inspect, read
from trainers.spec import Source
import pyarrow.parquet
def peak():
    status = Path("/proc/self/status").read_text()  # getrusage would tell of the parent's memory too
    return int(status.split("VmHWM:")[1].split()[0]) // 1024
before, begun, told, good = peak(), time.process_time(), [], 0
try:
    for chunk in inspect(Source(path=sys.argv[1])).chunks:
        for row in read(chunk):
            if isinstance(row, RowError):
                told.append([row.message, row.remedy])
            else:
                good += 1
except TuneyardError as error:
    told.append([error.message, error.remedy])
print(json.dumps({"told": told, "good": good, "grown_mb": peak() - before, "seconds": time.process_time() - begun}))
"""


def measured(path: str) -> dict[str, Any]:
    exact = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}  # what is freed is given back at once
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path],
        env={**os.environ, **exact},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return json.loads(done.stdout)


def test_a_line_of_100_mb_is_refused_in_little_memory(put: Any) -> None:
    long = json.dumps({"messages": [{"role": "user", "content": "x" * 100_000_000}]}).encode()
    told = {}
    for name, data in {
        "x.jsonl": b"\n".join([GOOD.encode(), long, GOOD.encode()]),
        "x.json": b"[" + GOOD.encode() + b",\n" + long + b"]",
        "x.csv": b"messages\n"
        + b'"'
        + json.dumps(json.loads(GOOD)["messages"]).replace('"', '""').encode()
        + b'"\n"'
        + b"x\n" * 50_000_000
        + b'"',
    }.items():
        found = measured(put(data, name).path)
        assert found["grown_mb"] < 100, found
        assert found["seconds"] < 20, found
        assert found["good"] == (2 if name == "x.jsonl" else 1)
        ((told[name], remedy),) = found["told"]
        assert remedy
    assert told["x.jsonl"] == f"x.jsonl:2 is longer than {MAX_ROW_BYTES:,} bytes."
    assert told["x.json"] == f"x.json:2 is longer than {MAX_ROW_BYTES:,} bytes."
    assert told["x.csv"] == "x.csv:3 is not CSV (a quoted value does not end)."


@pytest.mark.parametrize(
    ("what", "pack"),
    [("zeros", gzip.compress), ("blank lines", gzip.compress), ("rows", gzip.compress), ("one array", gzip.compress), ("rows", zstd)],
)
def test_a_bomb_is_refused_in_little_memory_and_time(put: Any, pack: Any, what: str) -> None:
    part = {"zeros": bytes(2**24), "blank lines": b"\n" * 2**24, "rows": f"{GOOD}\n".encode() * 2**17, "one array": b"[" * 2**24}[what]
    packed = pack(f"{GOOD}\n".encode()) + pack(part) * (1 + 2**30 // len(part))  # members one after another unpack as one file
    assert len(packed) < 2**22
    found = measured(put(packed).path)
    assert found["told"] == [
        [f"data.jsonl unpacks to more than {2**30:,} bytes, from {len(packed):,}.", "Unpack it yourself if you trust it."]
    ]
    assert found["grown_mb"] < 100 and found["seconds"] < 30


def test_repetitive_rows_are_no_bomb(put: Any) -> None:
    packed = gzip.compress(f"{GOOD}\n".encode() * 200_000)
    assert 200_000 * len(GOOD) / len(packed) > 250
    assert inspect(put(packed)).rows == 200_000


# -- no row is lost --------------------------------------------------------------------------------------------------------------

LINES = st.one_of(
    st.just(GOOD.encode()),
    st.sampled_from([line for line, _, _ in BAD_ROWS.values() if len(line) < 10_000]),
    st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")),
    st.text(max_size=20).map(
        lambda t: json.dumps({"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t}]}).encode()
    ),
)


def _read_back(data: bytes, name: str, chunk_bytes: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        rows = [row for chunk in inspect(Source(path=str(path)), chunk_bytes).chunks for row in read(chunk)]
        return [(row.where, str(row)) if isinstance(row, RowError) else (row["id"], row["messages"]) for row in rows]


@given(lines=st.lists(LINES, max_size=12), chunk_bytes=st.integers(1, 500), end=st.sampled_from([b"\n", b"\r\n"]))
def test_every_line_becomes_a_conversation_or_an_error(lines: list[bytes], chunk_bytes: int, end: bytes) -> None:
    data = end.join([GOOD.encode(), *lines])
    found = _read_back(data, "x.jsonl", chunk_bytes)
    assert [place for place, _ in found] == [f"x.jsonl:{n}" for n, line in enumerate([GOOD.encode(), *lines], 1) if line.strip()]
    assert found == _read_back(data, "x.jsonl", 2**30)


@given(
    rows=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=9)] * 3), min_size=1),
    chunk_bytes=st.integers(1, 99),
)
def test_every_record_becomes_a_conversation_or_an_error(rows: list[tuple[str, ...]], chunk_bytes: int) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("instruction", "input", "output"), *rows])
    data = text.getvalue().encode()
    found = _read_back(data, "x.csv", chunk_bytes)
    assert len(found) == len(rows) and found == _read_back(data, "x.csv", 2**30)
    good = [messages[-1]["content"] for _, messages in found if not isinstance(messages, str)]
    assert good == [a for q, i, a in rows if (q.strip() or i.strip()) and a.strip()]


@settings(max_examples=300)
@given(
    data=st.one_of(st.binary(max_size=200), st.text('[]{}",:\\ \n1a\ufeff', max_size=40).map(str.encode)),
    name=st.sampled_from(["x.jsonl", "x.json", "x.csv"]),
    packed=st.booleans(),
)
def test_no_bytes_make_more_than_an_error(data: bytes, name: str, packed: bool) -> None:
    for stored in (data, b"[" + GOOD.encode() + b"," + data, GOOD.encode() + b"\n" + data):
        try:
            _read_back(gzip.compress(stored) if packed else stored, name, 3)
        except DataError as error:
            assert error.remedy
