"""Held-out tasks: which conversations are asked. Pure, but for reading the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.metrics import parse_json
from trainers.errors import DataError
from trainers.sources import conversations
from trainers.spec import EvalTask, Source


@dataclass(frozen=True)
class Case:
    """One held-out conversation: the turns before the last assistant turn, and that turn's text as the reference."""

    id: str
    messages: list[dict[str, str]]
    reference: str
    slice: str | None
    options: tuple[str, ...] = ()
    """Of a multiple choice: the answers to choose from."""


def load(task: EvalTask, slice_by: str | None = None) -> list[Case]:
    """A task's cases in file order; raises DataError for a row that cannot be asked or scored."""
    column = task.choices if isinstance(task.choices, str) else None
    return [_case(row, task) for row in conversations(Source(path=task.path, name=task.shown), slice_by, column)]


def _case(row: dict[str, Any], task: EvalTask) -> Case:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise DataError(f"{row['id']} has no assistant turn after a question.", "End it with the answer to compare with.")
    reference = turns[last]["content"]
    if task.metric == "json_match":
        try:
            parse_json(reference)
        except ValueError as error:
            raise DataError(f"{row['id']}: the reference answer is not JSON ({error}).", "Mend it, or use metric exact_match.") from None
    return Case(row["id"], turns[:last], reference, row["slice"], _options(row, task, reference))


def _options(row: dict[str, Any], task: EvalTask, reference: str) -> tuple[str, ...]:
    if task.metric != "choice":
        return ()
    options = row["kept"] if isinstance(task.choices, str) else task.choices
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) and option for option in options):
        raise DataError(f"{row['id']}: `{task.choices}` holds no list of two or more texts.", "Give each row the answers to choose from.")
    if options.count(reference) != 1:
        raise DataError(
            f"{row['id']}: the reference {reference!r} is not one of {options}.", "End the row with the right one of its choices."
        )
    return tuple(options)
