"""Every format becomes the same conversations; every bad row is named with file, line and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from trainers import sources
from trainers.errors import DataError
from trainers.sources import conversations, inspect, read
from trainers.spec import Source

Q_AND_A = [("What is 2 + 2?", "4"), ("Grüße 你好 🙂", "Hallo\nWelt"), ("Third", "  kept as it is ")]


def as_messages(q: str, a: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}


def as_alpaca(q: str, a: str) -> dict[str, Any]:
    return {"instruction": q, "input": "", "output": a}


def as_sharegpt(q: str, a: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}


GOOD = json.dumps(as_messages("q", "a"))


@pytest.fixture
def put(tmp_path: Path):
    """Write a file and return it as a source."""

    def put(content: str | bytes, name: str = "data.jsonl", **more: Any) -> Source:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Source(path=str(path), **more)

    return put


@pytest.mark.parametrize("row", [as_messages, as_alpaca, as_sharegpt])
@pytest.mark.parametrize("layout", ["lines", "crlf", "bom", "no newline at the end", "blank lines", "array", "pretty array with bom"])
def test_formats_and_layouts_read_alike(put, row: Any, layout: str) -> None:
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


def test_alpaca_input_system_and_history(put) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]]}
    (found,) = conversations(put(json.dumps(row)))
    roles = [(m["role"], m["content"]) for m in found["messages"]]
    assert roles == [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Add\n\n1 2"), ("assistant", "3")]


def test_sharegpt_roles_system_and_weight(put) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}, {"from": "observation", "value": "o"}]
    (found,) = conversations(put(json.dumps({"system": "S", "conversations": [*turns, {"from": "gpt", "value": "b"}]})))
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert [m.get("weight") for m in found["messages"]] == [None, None, 0, None, None]
    (plain,) = conversations(put(json.dumps({"conversations": as_messages("q", "a")["messages"]})))
    assert plain["messages"] == as_messages("q", "a")["messages"]


def test_slices_are_text(put) -> None:
    rows = [{**as_messages("q", "a"), "kind": kind} for kind in ("x", 3, None)]
    assert [c["slice"] for c in conversations(put("\n".join(map(json.dumps, rows))), "kind")] == ["x", "3", None]
    with pytest.raises(DataError, match=r"data.jsonl:1 has a list as `kind`"):
        list(conversations(put(json.dumps({**as_messages("q", "a"), "kind": []})), "kind"))


def _with(message: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "q"}, message]})


BAD_ROWS = {
    "not JSON": ('{"messages": [', "is not JSON"),
    "not an object": ("[1]", "is a JSON list, not an object"),
    "a number": ("7", "is a JSON number, not an object"),
    "nested without end": ("[" * 100_000, "JSON"),
    "a number of too many digits": ('{"messages": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    "missing field": ('{"chat": []}', "has no `messages`"),
    "other format": (json.dumps(as_alpaca("q", "a")), "is a row in alpaca format, but data.jsonl:1 is in messages format"),
    "no list": ('{"messages": "hello"}', "has a string as `messages`"),
    "no messages": ('{"messages": []}', "has an empty list as `messages`"),
    "message is text": (_with("hello"), "has a string as message 2"),
    "no role": (_with({"content": "a"}), "has no `role` in message 2"),
    "no content": (_with({"role": "assistant"}), "has no `content` in message 2"),
    "unknown role": (_with({"role": "asistant", "content": "a"}), 'has the unknown role "asistant" in message 2'),
    "role is no text": (_with({"role": ["user"], "content": "a"}), r'has the unknown role ["user"] in message 2'),
    "content is null": (_with({"role": "assistant", "content": None}), "has a null where message 2 needs text"),
    "content is parts": (_with({"role": "assistant", "content": [{"type": "text"}]}), "has a list where message 2 needs text"),
    "empty answer": (_with({"role": "assistant", "content": " \n"}), "has an empty answer in message 2"),
    "no assistant": (_with({"role": "user", "content": "a"}), "has no assistant turn"),
    "assistant first": ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant turn"),
    "weight": (_with({"role": "assistant", "content": "a", "weight": 0.5}), "has a weight of 0.5 in message 2"),
    "weight of a user": (_with({"role": "user", "content": "a", "weight": 1}), "has a weight in message 2"),
    "tools": ('{"tools": [{}], "messages": []}', "has `tools`, which cannot be trained yet"),
    "tool call": (_with({"role": "assistant", "content": None, "tool_calls": [{}]}), "has a tool call in message 2"),
    "half a character": (_with({"role": "assistant", "content": "\ud800"}), "has half a character"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named(put, bad: str) -> None:
    line, says = BAD_ROWS[bad]
    with pytest.raises(DataError) as error:
        list(conversations(put("\n".join([GOOD, GOOD, line, GOOD]))))
    assert error.value.message.startswith("data.jsonl:3 ") and says in error.value.message
    assert error.value.remedy


@pytest.mark.parametrize(
    "bad", [b for b in BAD_ROWS if b not in ("not JSON", "not an object", "nested without end", "other format", "missing field")]
)
def test_a_bad_first_row_is_named(put, bad: str) -> None:
    line, says = BAD_ROWS[bad]
    with pytest.raises(DataError) as error:
        list(conversations(put(line)))
    assert error.value.message.startswith("data.jsonl:1 ") and says in error.value.message


BAD_FILES = {
    "empty": (b"", "data.jsonl is empty"),
    "blank": (b"\xef\xbb\xbf\n \r\n", "data.jsonl is empty"),
    "empty array": (b"[ ]", "data.jsonl is empty"),
    "not UTF-8": (GOOD.encode() + b'\n{"messages": "\xff"}', "data.jsonl:2 is not UTF-8 (byte 15 of the line)"),
    "UTF-16": (GOOD.encode("utf-16"), "data.jsonl:1 is not UTF-8"),
    "array not UTF-8": (b"[" + GOOD.encode() + b',\n"\xff"]', "data.jsonl:2 is not UTF-8"),
    "one pretty object": (json.dumps(as_messages("q", "a"), indent=1).encode(), "data.jsonl:1 is not JSON"),
    "unknown format": (b'{"question": "q", "answer": "a"}', "data.jsonl:1 has no known format (keys: question, answer)"),
    "array without end": (b"[" + GOOD.encode(), "data.jsonl:1 is not JSON"),
    "array with a bad row": (b"[\n" + GOOD.encode() + b",\n{]", "data.jsonl:3 is not JSON"),
    "array with a number": (b"[\n" + GOOD.encode() + b",\n7]", "data.jsonl:3 is a JSON number"),
    "array without comma": (b"[" + GOOD.encode() + b"\n" + GOOD.encode() + b"]", "data.jsonl:2 is not JSON"),
    "array with a last comma": (b"[" + GOOD.encode() + b",\n]", "data.jsonl:2 is not JSON"),
    "lines after an array": (b"[" + GOOD.encode() + b"]\n" + GOOD.encode(), "but the file goes on"),
    "arrays on lines": (b"[1]\n[2]\n", "data.jsonl:1 is a JSON number"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_named(put, bad: str) -> None:
    content, says = BAD_FILES[bad]
    with pytest.raises(DataError) as error:
        list(conversations(put(content)))
    assert says in error.value.message and error.value.remedy


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*none.jsonl"):
        inspect(Source(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="cannot be read"):
        inspect(Source(path=str(tmp_path)))
    with pytest.raises(DataError, match="cannot be read"):
        inspect(Source(path="nowhere://x.jsonl"))


def test_a_named_format_is_held_to(put) -> None:
    source = put(json.dumps(as_alpaca("q", "a")), format="messages", name="mine")
    with pytest.raises(DataError, match="mine:1 has no `messages`"):
        list(conversations(source))


def test_a_line_over_the_limit_is_refused_without_reading_on(put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 100)
    with pytest.raises(DataError, match=r"data.jsonl:3 is longer than 1,000 bytes"):
        list(conversations(put("\n".join([GOOD, GOOD, json.dumps(as_messages("q" * 5000, "a")), "not JSON"]))))
    monkeypatch.setattr(sources, "MAX_ARRAY_BYTES", 1000)
    with pytest.raises(DataError, match="one JSON array of more than 1,000 bytes"):
        inspect(put("[" + ",".join([GOOD] * 50) + "]"))


@pytest.mark.parametrize("chunk_bytes", [1, 300, 5000])
@pytest.mark.parametrize("block_bytes", [7, 64, 2**20])
def test_chunks_read_alone_are_the_whole_file(put, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, block_bytes: int) -> None:
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block_bytes)
    source = put("\ufeff\n" + "\r\n".join(json.dumps(as_messages("q" * (i % 17), str(i))) for i in range(60)))
    inspected = inspect(source, chunk_bytes)
    assert inspected.chunks[-1].stop == inspected.bytes == Path(source.path).stat().st_size
    assert all(a.stop == b.start for a, b in zip(inspected.chunks, inspected.chunks[1:], strict=False))
    assert len(inspected.chunks) > 1 or chunk_bytes > 300 or block_bytes == 2**20
    read_back = [c for chunk in inspected.chunks for c in read(chunk)]
    assert read_back == list(conversations(source))
    assert [c["id"] for c in read_back] == [f"data.jsonl:{i + 2}" for i in range(60)]


def test_any_fsspec_place_can_be_read() -> None:
    with fsspec.open("memory://folder/x.jsonl", "wb") as file:
        file.write(GOOD.encode())  # type: ignore[union-attr]
    (found,) = conversations(Source(path="memory://folder/x.jsonl"))
    assert found["id"] == "x.jsonl:1"
