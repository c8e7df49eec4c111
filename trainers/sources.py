"""Any supported format -> conversations: {"messages": [...], "slice": str | None, "id": "name:line"}.

    messages   {"messages": [{"role", "content"[, "weight": 0 | 1]}, ...]}               OpenAI's training lines
    alpaca     {"instruction", "output"[, "input", "system", "history": [[user, assistant], ...]]}
    sharegpt   {"conversations": [{"from", "value"} or {"role", "content"}, ...][, "system"]}

Files are JSONL, or one JSON array. `inspect` reads a file once: its format (by the keys of the first row), hash, and cuts
into chunks at line ends; `read` turns a chunk into conversations, anywhere and in any order. Every later row is held to
the first one's format. A bad row raises DataError with file name, line number and remedy.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, cast

import fsspec

from trainers.chat import ROLES, Message
from trainers.errors import DataError, RowError
from trainers.spec import Source

NORMALISER_VERSION = 1  # raise it whenever any row normalises differently: it is part of every token store's key
MAX_LINE_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 256 * 2**20
_BLOCK_BYTES = 2**20

Conversation = dict[str, Any]

_SHAPES = {
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
}
_KEYS = {"messages": ("messages",), "alpaca": ("instruction", "output"), "sharegpt": ("conversations",)}
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "observation": "tool",
}
_SHAREGPT_ROLES |= {role: role for role in ROLES}


@dataclass(frozen=True)
class Chunk:
    """A run of whole lines of one file (or a whole JSON array), with all that is needed to read it alone."""

    path: str
    name: str
    format: str
    first_line: int
    """Line of the file's first row, which decided the format; 0 where the spec named the format."""
    start: int
    stop: int
    """Byte range."""
    line: int
    """Line number of the first byte."""
    array: bool


@dataclass(frozen=True)
class Inspection:
    """What one pass over a source tells."""

    name: str
    url: str
    """Where it was read from."""
    format: str
    bytes: int
    sha256: str
    rows: int
    """At most so many (blank lines count); 0 where only reading would tell (a JSON array)."""
    chunks: list[Chunk]


def conversations(source: Source, slice_by: str | None = None) -> Iterator[Conversation]:
    """Every conversation of a source, in file order; raises DataError at the first bad row."""
    for chunk in inspect(source).chunks:
        for row in read(chunk, slice_by):
            if isinstance(row, RowError):
                raise row
            yield row


def inspect(source: Source, chunk_bytes: int = 4 * 2**20) -> Inspection:
    """Find a source's format and hash, and cut it into chunks of at least `chunk_bytes` where it has so many. Memory stays flat."""
    name = source.shown
    first_row, first_line, array = _first_row(source)
    format = source.format
    if format == "auto":
        format = _detect(first_row)
        if format is None:
            keys = ", ".join(map(str, first_row)) or "none"
            _fail(
                f"{name}:{first_line}",
                f"has no known format (keys: {keys})",
                f"Write rows like {_SHAPES['messages']}, alpaca or sharegpt rows.",
            )

    def chunk(start: int, stop: int, line: int) -> Chunk:
        return Chunk(source.path, name, format, first_line if source.format == "auto" else 0, start, stop, line, array)

    chunks = []
    sha256 = hashlib.sha256()
    start, line = 0, 1  # of the chunk that is being gathered
    size = 0
    lines = 1  # number of the line that byte `size` is on
    line_start = 0
    with _open(source) as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            newline = block.rfind(b"\n")
            if newline >= 0:
                lines += block.count(b"\n")
                line_start = size + newline + 1
            size += len(block)
            if size - line_start > MAX_LINE_BYTES and not array:
                break  # `read` refuses this line by its number; the rest of the file need not be looked at
            if line_start - start >= chunk_bytes and not array:
                chunks.append(chunk(start, line_start, line))
                start, line = line_start, lines
    if size > start:
        chunks.append(chunk(start, size, line))
    rows = 0 if array else lines - (line_start == size)
    return Inspection(name, source.path, format, size, sha256.hexdigest(), rows, chunks)


def read(chunk: Chunk, slice_by: str | None = None, class_by: str | None = None) -> Iterator[Conversation | RowError]:
    """The rows of one chunk in file order, each as a conversation, or as the RowError that says why it is none.

    `slice_by` and `class_by` name columns whose values go along as "slice" and "class".
    """
    try:
        for line, row in _array_rows(chunk) if chunk.array else _line_rows(chunk):
            if isinstance(row, RowError):
                yield row
                continue
            where = f"{chunk.name}:{line}"
            try:
                messages = _normalise(row, chunk, where)
                groups = [_group(row, column, where) for column in (slice_by, class_by)]
            except RowError as error:
                yield error
                continue
            yield {"messages": messages, "tools": None, "slice": groups[0], "class": groups[1], "id": where}
    except RowError as error:  # nothing after it can be read
        yield error


def _group(row: dict[str, Any], column: str | None, where: str) -> str | None:
    value = row.get(column) if column else None
    if value is None or isinstance(value, str | int | float):
        return None if value is None else str(value)
    _fail(where, f"has a {_kind(value)} as `{column}`", "A column to group by holds text or numbers.")


# -- bytes to rows -------------------------------------------------------------------------------------------------------


def _open(source: Source | Chunk) -> BinaryIO:
    try:
        system, path = fsspec.url_to_fs(source.path)
        return cast(BinaryIO, system.open(path, "rb"))
    except FileNotFoundError:
        raise DataError(f"There is no file {source.path}.", "Give a path that exists, relative to the job file.") from None
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{source.path} cannot be read: {error}.", "Give a readable file.") from None


def _first_row(source: Source) -> tuple[dict[str, Any], int, bool]:
    """(first row, its line, whether the file is one JSON array)."""
    with _open(source) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            if text.lstrip().startswith(b"["):
                whole = Chunk(source.path, source.shown, "", 0, 0, MAX_ARRAY_BYTES + 1, 1, True)
                first = next(_array_rows(whole), None)
                if first is None:
                    break
                return first[1], first[0], True
            return _parse(line, f"{source.shown}:{number}", number == 1), number, False
    _fail(source.shown, "is empty", "Put at least one example into it.")


def _line_rows(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    with _open(chunk) as file:
        file.seek(chunk.start)
        data = file.read(chunk.stop - chunk.start)
    for number, line in enumerate(data.split(b"\n"), chunk.line):
        if line.strip() and line != codecs.BOM_UTF8:
            try:
                yield number, _parse(line, f"{chunk.name}:{number}", number == 1)
            except RowError as error:
                yield number, error


def _parse(line: bytes, where: str, first: bool) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        _fail(where, f"is longer than {MAX_LINE_BYTES:,} bytes", "Split the example, or check that the file has line ends.")
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        _fail(where, f"is not UTF-8 (byte {error.start + 1} of the line)", "Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        _fail(where, f"is not JSON ({error.msg}, column {error.colno})", "Write one JSON object per line, or one JSON array.")
    except (ValueError, RecursionError) as error:
        _fail(where, f"cannot be read as JSON ({error})", "Write one JSON object per line, or one JSON array.")
    return _as_row(row, where)


def _array_rows(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a JSON array with the line that each begins on, decoded one at a time."""
    with _open(chunk) as file:
        data = file.read(chunk.stop)
    if len(data) > MAX_ARRAY_BYTES:
        _fail(chunk.name, f"is one JSON array of more than {MAX_ARRAY_BYTES:,} bytes", "Write one JSON object per line instead (JSONL).")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _fail(f"{chunk.name}:{_line_of(data, error.start)}", "is not UTF-8", "Save the file as UTF-8.")
    blank = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted = 1, 0
    separator = "]"  # an empty array may close at once
    while True:
        at = blank(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        where = f"{chunk.name}:{line}"
        if text[at : at + 1] == separator == "]":
            break
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            _fail(f"{chunk.name}:{error.lineno}", f"is not JSON ({error.msg}, column {error.colno})", "Mend the JSON array.")
        except (ValueError, RecursionError) as error:
            _fail(where, f"cannot be read as JSON ({error})", "Mend the JSON array.")
        yield line, _as_row(row, where)
        at = blank(text, at).end()
        separator = text[at : at + 1]
        if separator == "]":
            break
        if separator != ",":
            _fail(f"{chunk.name}:{_line_of(text, at)}", "is not JSON (a comma or a closing bracket is missing)", "Mend the JSON array.")
        at += 1
    if text[at + 1 :].strip():
        _fail(
            f"{chunk.name}:{_line_of(text, at)}",
            "ends a JSON array, but the file goes on",
            "Write one JSON object per line, or one JSON array.",
        )


def _line_of(data: Any, at: int) -> int:
    return 1 + data[:at].count(b"\n" if isinstance(data, bytes) else "\n")


def _as_row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        _fail(where, f"is a JSON {_kind(row)}, not an object", f"Write rows like {_SHAPES['messages']}.")
    return row


# -- rows to messages ----------------------------------------------------------------------------------------------------


def _detect(row: dict[str, Any]) -> str | None:
    return next((format for format, keys in _KEYS.items() if all(key in row for key in keys)), None)


def _normalise(row: dict[str, Any], chunk: Chunk, where: str) -> list[Message]:
    missing = [key for key in _KEYS[chunk.format] if key not in row]
    if missing:
        other = _detect(row)
        if other and chunk.first_line:
            begun = f"{chunk.name}:{chunk.first_line}"
            _fail(where, f"is a row in {other} format, but {begun} is in {chunk.format} format", "Put each format into a file of its own.")
        _fail(where, f"has no `{missing[0]}`", f"A row in {chunk.format} format looks like {_SHAPES[chunk.format]}.")
    messages = {"messages": _from_messages, "alpaca": _from_alpaca, "sharegpt": _from_sharegpt}[chunk.format](row, where)
    if not any(m["role"] == "assistant" for m in messages):
        _fail(where, "has no assistant turn, so nothing can be learnt from it", "Add an assistant message, or remove the row.")
    if messages[0]["role"] == "assistant":
        _fail(where, "begins with an assistant turn, which answers nothing", "Begin with a system or user message.")
    return messages


def _from_messages(row: dict[str, Any], where: str) -> list[Message]:
    return [_message(turn, n, where, "role", "content", dict.fromkeys(ROLES)) for n, turn in _turns(row, "messages", where)]


def _from_sharegpt(row: dict[str, Any], where: str) -> list[Message]:
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row["system"], "`system`", where)})
    for n, turn in _turns(row, "conversations", where):
        keys = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
        messages.append(_message(turn, n, where, *keys, _SHAREGPT_ROLES))
    return messages


def _from_alpaca(row: dict[str, Any], where: str) -> list[Message]:
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row["system"], "`system`", where)})
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        _fail(where, "has a `history` that is not a list of [user, assistant] pairs", 'Write it as [["question", "answer"], ...].')
    for user, assistant in history:
        messages += [{"role": "user", "content": _text(user, "`history`", where)}, _answer(assistant, "`history`", where)]
    user = _text(row["instruction"], "`instruction`", where)
    if not user.strip():
        _fail(where, "has an empty `instruction`", "Fill it in, or remove the row.")
    context = row.get("input")
    if context is not None and _text(context, "`input`", where).strip():
        user += "\n\n" + context
    return [*messages, {"role": "user", "content": user}, _answer(row["output"], "`output`", where)]


def _turns(row: dict[str, Any], key: str, where: str) -> Iterator[tuple[int, Any]]:
    for unsupported in ("tools", "functions"):
        if row.get(unsupported):
            _fail(
                where,
                f"has `{unsupported}`, which cannot be trained yet",
                "Remove the row: left in, its tool calls would be lost in silence.",
            )
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        _fail(where, f"has {'an empty list' if turns == [] else 'a ' + _kind(turns)} as `{key}`", "Give it a list of messages.")
    return enumerate(turns, 1)


def _message(turn: Any, n: int, where: str, role_key: str, content_key: str, roles: dict[str, Any]) -> Message:
    """One turn of a conversation; `roles` maps the format's role names to ours (None: the same)."""
    if not isinstance(turn, dict):
        _fail(where, f"has a {_kind(turn)} as message {n}", f'Write it as {{"{role_key}": ..., "{content_key}": ...}}.')
    for key in (role_key, content_key):
        if key not in turn and not turn.get("tool_calls"):
            _fail(where, f"has no `{key}` in message {n}", f'Write it as {{"{role_key}": ..., "{content_key}": ...}}.')
    if turn.get("tool_calls") or turn.get("function_call"):
        _fail(where, f"has a tool call in message {n}, which cannot be trained yet", "Remove the row.")
    named = turn[role_key]
    if not isinstance(named, str) or named not in roles:
        shown = json.dumps(named, ensure_ascii=False)
        _fail(where, f"has the unknown role {shown[:80]} in message {n}", f"Use one of {', '.join(roles)}.")
    role = roles[named] or named
    weight = turn.get("weight")
    if role == "assistant":
        message = _answer(turn[content_key], f"message {n}", where)
        if weight is not None:
            if weight not in (0, 1):
                _fail(where, f"has a weight of {json.dumps(weight)[:80]} in message {n}", "An assistant message's weight is 0 or 1.")
            message["weight"] = int(weight)
        return message
    if weight is not None:
        _fail(
            where, f"has a weight in message {n}, which is no assistant message", "Only assistant messages are trained; remove the weight."
        )
    return {"role": role, "content": _text(turn[content_key], f"message {n}", where)}


def _answer(value: Any, what: str, where: str) -> Message:
    text = _text(value, what, where)
    if not text.strip():
        _fail(where, f"has an empty answer in {what}", "Write the answer that the model should give, or remove the row.")
    return {"role": "assistant", "content": text}


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        _fail(where, f"has a {_kind(value)} where {what} needs text", "Write the content as one JSON string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        _fail(
            where,
            f"has half a character (a lone surrogate) in {what}",
            "Write characters outside the BMP as a pair of \\u escapes, or as UTF-8.",
        )
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _fail(where: str, what: str, remedy: str) -> NoReturn:
    raise RowError(where, what, remedy)
