"""An uploaded file -> the items of a study: conversations to be answered, or answers that are there already.

{"messages": [...]}, or any row that training reads    its last assistant turn, if it has one, is left out: the models answer
{"prompt": "..."}                                      the same for a single question
either, with "answers": {"model A": "...", ...}        given answers: no model is asked
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers import formats
from trainers.errors import DataError, RowError
from trainers.formats import Bad

MAX_ITEMS = 2000
MAX_BYTES = 64 * 2**20
MAX_ANSWER_CHARS = 100_000
_STAND_IN = {"role": "assistant", "content": "?"}  # where the answer will be: a conversation to train on must have one

Item = dict[str, Any]
"""{"source", "slice", "messages", "tools", "answers": {model: text} or None}; messages and tools as the wire has them."""


def read(path: Path, name: str, slice_by: str | None, limit: int | None, seed: int = 0) -> list[Item]:
    """The file's items in order; with `limit`, so many of them, drawn by `seed`. Raises DataError."""
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{name} has more than {MAX_BYTES >> 20} MiB.", "Upload the part that people shall rate.", "file")
    items = [_item(where, row, slice_by) for where, row in _drawn(list(_rows(path, name)), name, limit, seed)]
    if slice_by and not any(item["slice"] for item in items):
        raise DataError(f"No row of {name} has a column `{slice_by}`.", "Name a column of the data, or leave slice_by out.", "slice_by")
    return items


def of_evaluation(path: Path, names: dict[str, str], limit: int | None, seed: int = 0) -> list[Item]:
    """The items of an evaluation's answers.jsonl; `names`: its columns of answers -> their models. Cases without an answer are left out."""
    rows = [(str(row["id"]), row) for _, row in _rows(path, "The evaluation") if all(row[column] is not None for column in names)]
    made = [(where, {**row, "answers": {model: row[column] for column, model in names.items()}}) for where, row in rows]
    return [_item(where, row, "slice") for where, row in _drawn(made, "The evaluation", limit, seed)]


def _drawn(rows: list[tuple[str, Any]], name: str, limit: int | None, seed: int) -> list[tuple[str, Any]]:
    """The rows that people rate."""
    if not rows:
        raise DataError(f"{name} has no rows.", 'Write one JSON object a line, like {"prompt": "..."}.', "file")
    if limit is None and len(rows) > MAX_ITEMS:
        raise DataError(f"{name} has {len(rows)} rows; people rate {MAX_ITEMS} at most.", "Set `limit`: so many are drawn.", "limit")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    return rows


def _rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, row); a file may also be one JSON array."""
    with path.open("rb") as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            try:
                rows = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name} is not JSON ({error}).", "Upload JSON lines, or one JSON array.", "file") from None
            for number, row in enumerate(rows, 1):
                yield _row(f"{name}:{number}", row)
            return
        for number, line in enumerate(file, 1):
            where = f"{name}:{number}"
            if text := line.strip().removeprefix(b"\xef\xbb\xbf"):
                try:
                    yield _row(where, json.loads(text.decode("utf-8")))
                except (ValueError, RecursionError):
                    raise RowError(where, "is not JSON", "Upload one JSON object a line.") from None


def _row(where: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise RowError(where, "is not a JSON object", 'Write rows like {"prompt": "..."}.')
    return where, row


def _item(where: str, row: dict[str, Any], slice_by: str | None) -> Item:
    answers = row.get("answers")
    if answers is not None and not (isinstance(answers, dict) and answers and all(isinstance(a, str) for a in answers.values())):
        raise RowError(where, "has `answers` that are not texts by model", 'Write them as {"model A": "...", "model B": "..."}.')
    if any(len(answer) > MAX_ANSWER_CHARS for answer in (answers or {}).values()):
        raise RowError(where, f"has an answer of more than {MAX_ANSWER_CHARS} characters", "Shorten it: nobody reads that.")
    value = row.get(slice_by) if slice_by else None
    try:
        messages, tools = _asked({key: value for key, value in row.items() if key != "answers"})
    except Bad as bad:
        raise RowError(where, bad.what, bad.remedy, bad.kind) from None
    return {"source": where, "slice": _slice(where, slice_by, value), "messages": messages, "tools": tools, "answers": answers}


def _slice(where: str, column: str | None, value: Any) -> str | None:
    if isinstance(value, (dict, list)):
        raise RowError(where, f"has a list or an object as `{column}`", "Slice by a column of texts or numbers.")
    return None if value is None else str(value)[:100]


def _asked(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages before the answer, tools), as the wire has them; raises Bad."""
    turns = row.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") not in ("assistant", "model"):
        row = {**row, "messages": [*turns, _STAND_IN]}
    elif "prompt" in row and "completion" not in row:
        row = {**row, "completion": _STAND_IN["content"]}
    format = formats.detect(row)
    if format is None or format == "text":
        raise Bad("is no conversation", 'Write rows like {"prompt": "..."} or {"messages": [...]}.')
    conversation = formats.normalise(row, format)
    messages = conversation["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if all(message["role"] == "system" or not message["content"].strip() for message in messages[:last]):
        raise Bad("asks nothing", "Put a user message before the answer.")
    return [_wire(message) for message in messages[:last]], json.loads(conversation["tools"] or "[]")


def _wire(message: dict[str, Any]) -> dict[str, Any]:
    sent = {key: message[key] for key in ("role", "content", "name", "tool_call_id") if key in message}
    if calls := message.get("tool_calls"):
        sent["tool_calls"] = [
            {
                "id": call.get("id", f"call_{number}"),
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for number, call in enumerate(calls)
        ]
    return sent
