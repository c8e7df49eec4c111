"""Held-out tasks: which conversations to ask, and how an answer is scored. Pure, but for reading the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from trainers.errors import DataError
from trainers.sources import conversations
from trainers.spec import EvalTask, Source

Metric = Literal["exact_match", "json_match"]
METRICS: dict[Metric, tuple[str, ...]] = {"exact_match": ("exact_match",), "json_match": ("json_match", "valid_json")}
"""What a task of each metric reports, the deciding number first."""


@dataclass(frozen=True)
class Case:
    """One held-out conversation: the turns before the last assistant turn, and that turn's text as the reference."""

    id: str
    messages: list[dict[str, str]]
    reference: str
    slice: str | None


def load(task: EvalTask, slice_by: str | None = None) -> list[Case]:
    """A task's cases in file order; raises DataError for a row that cannot be asked or scored."""
    return [_case(row, task.metric) for row in conversations(Source(path=task.path, name=task.shown), slice_by)]


def _case(row: dict[str, Any], metric: Metric) -> Case:
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0:
        raise DataError(f"{row['id']} has no assistant turn after a question.", "End it with the answer to compare with.")
    reference = turns[last]["content"]
    if metric == "json_match":
        try:
            parse_json(reference)
        except ValueError as error:
            raise DataError(f"{row['id']}: the reference answer is not JSON ({error}).", "Mend it, or use metric exact_match.") from None
    return Case(row["id"], turns[:last], reference, row["slice"])


def score(metric: Metric, answer: str | None, reference: str) -> dict[str, float]:
    """Each of the metric's numbers for one answer, 0 or 1. No answer (None) is a wrong one."""
    if metric == "exact_match":
        return {"exact_match": float(answer is not None and answer.strip() == reference.strip())}
    try:
        value = parse_json(answer or "")
    except ValueError:
        return {"json_match": 0.0, "valid_json": 0.0}
    return {"json_match": float(same_json(value, parse_json(reference))), "valid_json": 1.0}


def mean(metric: Metric, scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over at least one score."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in METRICS[metric]}


def parse_json(text: str) -> Any:
    """The JSON value that a whole text is, blanks around it aside; raises ValueError otherwise (NaN and Infinity are no JSON)."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:  # a model that repeats "[[[[" for ever
        raise ValueError("nested too deep") from None


def same_json(a: Any, b: Any) -> bool:
    """Equal as JSON: keys in any order, 1 equals 1.0, but true is not 1 (in Python it is)."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b
