"""Whatever lies anywhere, in any kind of file: the same conversations, cut anywhere, and the same hash."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import COMMIT, hub
from trainers import places
from trainers.errors import DataError, RowError, Unavailable
from trainers.sources import Chunk, conversations, inspect, read
from trainers.spec import Source

Q_AND_A = [("What is 2 + 2?", "4"), ('Grüße 你好 🙂, "quoted"', "Hallo\nWelt"), ("Third", "  kept as it is ")]
ROOT = Path(__file__).parents[2]


def as_messages(q: str, a: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}


def as_alpaca(q: str, a: str) -> dict[str, Any]:
    return {"instruction": q, "input": "", "output": a}


def as_sharegpt(q: str, a: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}


GOOD = json.dumps(as_messages("q", "a"))


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data, **options)
    return data.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def messages_of(source: Source) -> list[Any]:
    return [c["messages"] for c in conversations(source)]


def everything(source: Source, chunk_bytes: int, **grouping: str) -> list[Any]:
    """All that `read` gives, chunk by chunk and last chunk first; errors as text."""
    chunks = [Chunk(**json.loads(json.dumps(asdict(chunk)))) for chunk in inspect(source, chunk_bytes).chunks]
    parts = [list(read(chunk, **grouping)) for chunk in reversed(chunks)]
    return [str(row) if isinstance(row, RowError) else row for part in reversed(parts) for row in part]


# -- kinds of files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [as_messages, as_alpaca, as_sharegpt])
@pytest.mark.parametrize("layout", ["lines", "crlf", "bom", "no newline at the end", "blank lines", "array", "pretty array with bom"])
def test_json_layouts_read_alike(put: Any, row: Any, layout: str) -> None:
    rows = [json.dumps(row(*pair), ensure_ascii=layout == "crlf") for pair in Q_AND_A]
    text, lines = {
        "lines": ("\n".join(rows) + "\n", [1, 2, 3]),
        "crlf": ("\r\n".join(rows) + "\r\n", [1, 2, 3]),
        "bom": ("\ufeff" + "\n".join(rows) + "\n", [1, 2, 3]),
        "no newline at the end": ("\n".join(rows), [1, 2, 3]),
        "blank lines": ("\n" + "\n \n".join(rows) + "\n\n", [2, 4, 6]),
        "array": ("[" + ",\n".join(rows) + "]", [1, 2, 3]),
        "pretty array with bom": ("\ufeff\n [\n" + " ,\n\n".join(rows) + "\n ] \n", [3, 5, 7]),
    }[layout]
    found = list(conversations(put(text)))
    assert [c["messages"] for c in found] == [as_messages(*pair)["messages"] for pair in Q_AND_A]
    assert [c["id"] for c in found] == [f"data.jsonl:{line}" for line in lines]
    assert found[0].keys() == {"messages", "tools", "slice", "class", "id"}


@pytest.mark.parametrize("packing", [None, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_kinds_of_files_read_alike(put: Any, packing: Any) -> None:
    rows = [as_alpaca(*pair) for pair in Q_AND_A]
    files = {
        "x.jsonl": (jsonl(rows), [1, 2, 3]),
        "x.json": (json.dumps(rows, indent=2).encode(), [2, 7, 12]),
        "x.csv": (b"\xef\xbb\xbf" + as_csv(rows), [2, 3, 5]),
        "x.tsv": (as_csv(rows, "\t"), [2, 3, 5]),
        "without suffix": (jsonl(rows), [1, 2, 3]),
    }
    for name, (data, lines) in files.items():
        stored = packing(data) if packing else data
        source = put(stored, name)
        found = list(conversations(source))
        assert [c["messages"] for c in found] == [as_messages(*pair)["messages"] for pair in Q_AND_A], name
        assert [c["id"] for c in found] == [f"{name}:{line}" for line in lines]
        inspected = inspect(source)
        assert (inspected.bytes, inspected.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
        assert inspected.rows == 3 and inspected.format == "alpaca" and inspected.url == source.path


def test_parquet(put: Any) -> None:
    data = as_parquet([{**as_messages(*pair), "kind": kind} for pair, kind in zip(Q_AND_A, "xyz", strict=True)], row_group_size=2)
    source = put(data, "x.parquet")
    assert messages_of(source) == [as_messages(*pair)["messages"] for pair in Q_AND_A]
    inspected = inspect(source, 1)
    assert (inspected.rows, len(inspected.chunks), inspected.bytes) == (3, 2, len(data))
    assert inspected.sha256 == hashlib.sha256(data).hexdigest()
    assert [(c["id"], c["slice"]) for chunk in inspected.chunks for c in read(chunk, "kind")] == [  # type: ignore[index]
        ("x.parquet:row 1", "x"),
        ("x.parquet:row 2", "y"),
        ("x.parquet:row 3", "z"),
    ]


def test_keys_that_a_table_filled_with_nulls_are_gone(put: Any) -> None:
    tools = [{"name": name, "parameters": {"properties": {name: {"type": "string"}}}} for name in ("f", "g")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"f": "x"}}]}
    turns = [
        {"role": "user", "content": "q"},
        call,
        {"role": "tool", "content": "1", "tool_call_id": "i"},
        {"role": "assistant", "content": "a"},
    ]
    other = {**call, "tool_calls": [{"name": "g", "arguments": {"g": "y"}}]}
    rows = [{"messages": turns, "tools": tools}, {"messages": [turns[0], other], "tools": None}, as_messages("q", "a")]
    assert "null" in json.dumps(pa.Table.from_pylist(rows).to_pylist())
    from_table, from_lines = (list(conversations(put(data))) for data in (as_parquet(rows), jsonl(rows)))
    assert [(c["messages"], c["tools"]) for c in from_table] == [(c["messages"], c["tools"]) for c in from_lines]
    assert json.loads(from_table[0]["tools"])[0]["function"] == tools[0]
    assert from_table[0]["messages"][1]["tool_calls"] == [{"name": "f", "arguments": '{"f": "x"}'}]


def test_tables_of_any_type(put: Any) -> None:
    turn = pa.map_(pa.string(), pa.string())
    maps = [[[("role", "user"), ("content", "q")], [("role", "assistant"), ("content", "a")]]] * 2
    table = pa.table(
        {
            "messages": pa.array(maps, pa.large_list(turn)),
            "day": pa.array([1, None], pa.date32()),
            "level": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    data = io.BytesIO()
    pq.write_table(table, data)
    source = put(data.getvalue())
    assert messages_of(source) == [as_messages("q", "a")["messages"]] * 2
    assert [c["slice"] for c in conversations(source, "level")] == ["x", "y"]
    with pytest.raises(RowError, match="row 1 has a date as `day`"):
        list(conversations(source, "day"))


def test_lists_in_csv_are_json(put: Any) -> None:
    source = put(as_csv([{"messages": json.dumps(as_messages(*pair)["messages"]), "n": "1"} for pair in Q_AND_A]), "x.csv")
    assert messages_of(source) == [as_messages(*pair)["messages"] for pair in Q_AND_A]


# -- cutting -----------------------------------------------------------------------------------------------------------------


def _many() -> dict[str, bytes]:
    rows = [as_alpaca("q" * (i % 17) + '"\\\n[{' * (i % 3) + "x", str(i)) for i in range(60)]
    return {
        "x.jsonl": b"\xef\xbb\xbf\n" + b"\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n7\n",
        "x.json": b"\xef\xbb\xbf\n" + json.dumps([*rows, 7], indent=1).encode(),
        "x.csv": as_csv(rows) + b"only one value\r\n",
        "x.parquet": as_parquet([*rows, as_alpaca("", "a")], row_group_size=7),
    }


@pytest.mark.parametrize("chunk_bytes", [1, 300, 5000])
@pytest.mark.parametrize("block_bytes", [7, 64, 2**20])
@pytest.mark.parametrize("packing", [None, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_chunks_read_alone_are_the_whole_file(
    put: Any, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, block_bytes: int, packing: Any
) -> None:
    for name, data in _many().items():
        if packing and name == "x.parquet":
            continue
        source = put(packing(data) if packing else data, name)
        whole = everything(source, 2**30)
        assert [row["messages"][-1]["content"] for row in whole[:-1]] == [str(i) for i in range(60)]
        assert isinstance(whole[-1], str) and whole[-1].startswith(name)
        monkeypatch.setattr(places, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(places, "_UNPACK_BYTES", block_bytes)
        chunks = inspect(source, chunk_bytes).chunks
        assert len(chunks) > 1 or chunk_bytes > 300 or (block_bytes == 2**20 and name == "x.jsonl")
        assert chunks[0].start == 0 and all(a.stop == b.start for a, b in pairwise(chunks))
        assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert everything(source, chunk_bytes) == whole
        monkeypatch.undo()


def test_a_file_that_changes_meanwhile_is_noticed(put: Any) -> None:
    source = put(GOOD)
    (chunk,) = inspect(source).chunks
    Path(source.path).write_text(GOOD + "\n")
    with pytest.raises(DataError, match=r"data.jsonl has changed while it was being read"):
        list(read(chunk))


# -- columns -----------------------------------------------------------------------------------------------------------------


def test_slices_and_classes_are_text(put: Any) -> None:
    rows = [{**as_messages("q", "a"), "kind": kind, "meta": {"level": "easy"}} for kind in ("x", 3, None, "")]
    (chunk,) = inspect(put(jsonl(rows))).chunks
    found = list(read(chunk, "kind", "meta.level"))
    assert [(c["slice"], c["class"]) for c in found] == [("x", "easy"), ("3", "easy"), (None, "easy"), (None, "easy")]  # type: ignore[index]
    with pytest.raises(RowError, match=r"data.jsonl:1 has a list as `kind`"):
        list(conversations(put(jsonl([{**as_messages("q", "a"), "kind": []}])), "kind"))


@pytest.mark.parametrize("write", [jsonl, as_csv, as_parquet])
def test_columns_by_another_name(put: Any, write: Any) -> None:
    rows = [{"question": q, "answer": a, "text": "x"} for q, a in Q_AND_A]
    source = put(write(rows), f"x.{write.__name__.removeprefix('as_')}", columns={"instruction": "question", "output": "answer"})
    assert messages_of(source) == [as_messages(*pair)["messages"] for pair in Q_AND_A]
    assert [c["slice"] for c in conversations(source, "answer")] == [a for _, a in Q_AND_A]
    assert inspect(source).format == "alpaca"


@pytest.mark.parametrize("write", [jsonl, as_parquet])
def test_columns_inside_others(put: Any, write: Any) -> None:
    row = {"data": {"dialog": [{"who": "human", "says": "q"}, {"who": "gpt", "says": "a"}]}}
    source = put(write([row]), columns={"conversations": "data.dialog", "from": "who", "value": "says"})
    assert messages_of(source) == [as_messages("q", "a")["messages"]]


def test_a_column_that_is_missing_is_named_with_those_there_are(put: Any) -> None:
    rows = [{"question": "q", "answer": "a"}]
    for write in (jsonl, as_parquet):
        with pytest.raises(DataError, match=r"data.jsonl has no column `questions` \(columns: question, answer\)"):
            inspect(put(write(rows), columns={"instruction": "questions", "output": "answer"}))
    with pytest.raises(DataError, match=r"has no column `context`"):
        inspect(put(jsonl(rows), columns={"instruction": "question", "output": "answer", "input": "context"}))
    rows.append({"question": "q", "answer": "a", "context": "c"})  # not in every row
    assert len(messages_of(put(jsonl(rows), columns={"instruction": "question", "output": "answer", "input": "context"}))) == 2
    with pytest.raises(DataError, match="cannot map `instrction`"):
        inspect(put(jsonl([as_alpaca("q", "a")]), columns={"instrction": "input"}))


def test_a_named_format_is_held_to(put: Any) -> None:
    with pytest.raises(RowError, match=r"mine:1 has no `messages` \(columns: instruction, input, output\)"):
        list(conversations(put(json.dumps(as_alpaca("q", "a")), format="messages", name="mine")))
    row = {"text": "t", **as_alpaca("q", "a")}
    assert messages_of(put(json.dumps(row), format="text")) == [[{"role": "assistant", "content": "t"}]]


# -- places ------------------------------------------------------------------------------------------------------------------


def test_a_pattern_is_one_source_of_several_files(tmp_path: Path) -> None:
    for name, data in {"b.jsonl": jsonl([as_alpaca("q", "2")]), "a.jsonl": jsonl([as_alpaca("q", "1")]), "c.txt": b"no"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl([as_alpaca("q", "3")])))
    found = list(conversations(Source(path=f"{tmp_path}/*.jsonl")))
    assert [(c["id"], c["messages"][-1]["content"]) for c in found] == [("a.jsonl:1", "1"), ("b.jsonl:1", "2")]
    source = Source(path=f"{tmp_path}/**/*.jsonl*", name="mine")
    assert [c["id"] for c in conversations(source)] == ["mine/a.jsonl:1", "mine/b.jsonl:1", "mine/deep/c.jsonl.gz:1"]
    inspected = inspect(source)
    assert inspected.rows == 3 and inspected.bytes == sum(p.stat().st_size for p in tmp_path.rglob("*.jsonl*"))
    (tmp_path / "deep" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl([as_messages("q", "3")])))
    assert inspect(source).sha256 != inspected.sha256
    with pytest.raises(RowError, match=r"c.jsonl.gz:1 is a row in messages format, but mine/a.jsonl:1 is in alpaca format"):
        list(conversations(source))
    with pytest.raises(DataError, match="There is no file that matches"):
        inspect(Source(path=f"{tmp_path}/*.csv"))


def test_a_name_with_brackets_is_no_pattern(put: Any) -> None:
    assert len(messages_of(put(GOOD, "data[1].jsonl"))) == 1


def test_any_fsspec_place_can_be_read() -> None:
    for name in ("x", "y"):
        with fsspec.open(f"memory://folder/{name}.jsonl", "wb") as file:
            file.write(GOOD.encode())  # type: ignore[union-attr]
    assert [c["id"] for c in conversations(Source(path="memory://folder/x.jsonl"))] == ["x.jsonl:1"]
    assert [c["id"] for c in conversations(Source(path="memory://folder/*.jsonl"))] == ["x.jsonl:1", "y.jsonl:1"]
    with pytest.raises(DataError, match=r"There is no file memory://none\.jsonl"):
        inspect(Source(path="memory://none.jsonl"))


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server (moto) that s3fs finds through the environment, as it would find any other."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("sources")  # moto's buckets are the process's, not the server's
        yield "s3://sources"
    server.stop()


def test_s3(s3: str) -> None:
    system = fsspec.filesystem("s3")
    rows = [as_alpaca(q, a) for q, a in Q_AND_A * 40]
    for name, data in {
        "a.jsonl": jsonl(rows),
        "b.jsonl.gz": gzip.compress(jsonl(rows)),
        "c.parquet": as_parquet(rows, row_group_size=50),
    }.items():
        system.pipe(f"sources/data/{name}", data)
        source = Source(path=f"{s3}/data/{name}")
        assert inspect(source).sha256 == hashlib.sha256(data).hexdigest()
        assert [c["messages"] for c in everything(source, 1000)] == [as_messages(*pair)["messages"] for pair in Q_AND_A * 40]
    assert len(everything(Source(path=f"{s3}/data/*"), 1000)) == 3 * len(rows)
    (chunk, *_) = inspect(Source(path=f"{s3}/data/a.jsonl")).chunks
    system.pipe("sources/data/a.jsonl", jsonl(rows[1:]))
    system.invalidate_cache()
    with pytest.raises(DataError, match="has changed"):
        list(read(chunk))
    with pytest.raises(DataError, match="There is no file s3://sources/data/none"):
        inspect(Source(path=f"{s3}/data/none"))


def test_a_place_that_does_not_answer_may_be_tried_again() -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        inspect(Source(path="http://127.0.0.1:9/x.jsonl"))


HUB_FILES = {"train.jsonl": jsonl([as_alpaca(*pair) for pair in Q_AND_A]), "test.jsonl": jsonl([as_alpaca("q", "a")])}


def test_hugging_face_datasets(tmp_path: Path) -> None:
    code = """
import json, sys
from trainers.errors import TuneyardError
from trainers.sources import conversations, inspect
from trainers.spec import Source
told = []
for more in ({}, {"split": "test"}, {"split": "dev"}, {"subset": "x"}, {"path": "hf://org/none"}):
    source = Source(**{"path": "hf://org/name", **more})
    try:
        told.append([inspect(source).url, *([c["id"], c["messages"]] for c in conversations(source))])
    except TuneyardError as error:
        told.append([type(error).__name__, error.message])
print(json.dumps(told))
"""
    with hub({"org/name": HUB_FILES}) as url:
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "TUNEYARD_DATASETS": str(tmp_path / "cache"),
        }
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    train, test, no_split, no_subset, no_dataset = json.loads(done.stdout)
    place = f"hf://org/name@{COMMIT}"
    assert train == [place, *([f"name:row {i}", as_messages(*pair)["messages"]] for i, pair in enumerate(Q_AND_A, 1))]
    assert test == [place, ["name:row 1", as_messages("q", "a")["messages"]]]
    assert no_split[0] == "DataError" and 'Unknown split "dev"' in no_split[1]
    assert no_subset[0] == "DataError" and "'x' not found" in no_subset[1]
    assert no_dataset[0] == "DataError" and "hf://org/none cannot be read" in no_dataset[1]
    assert len(list((tmp_path / "cache").glob("*.parquet"))) == 2


def test_a_hub_id_that_is_no_file_is_understood(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        inspect(Source(path=f"{tmp_path}/org/name-1.5"))
    assert "is written hf://org/name-1.5" in error.value.remedy
