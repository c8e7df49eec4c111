"""The running example: reproducible, honest (train and test share no surface), and true to the task's rules."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from examples.task_api import generate
from examples.task_api.wording import DAYS, TEST, TRAIN, Wording
from trainers.spec import JobSpec

FOLDER = Path(generate.__file__).parent
ACTIONS = {"create", "complete", "list", "update", "delete"}
KEYS = {  # action -> keys always there, keys that may be there; all in this order
    "create": (["action", "title", "priority", "due", "person"], []),
    "complete": (["action", "task"], []),
    "list": (["action", "status", "priority", "due", "person"], []),
    "update": (["action", "task"], ["title", "priority", "due", "person"]),
    "delete": (["action", "task"], []),
}
GLUE = {
    "the",
    "a",
    "to",
    "from",
    "in",
    "on",
    "at",
    "with",
    "of",
    "up",
    "for",
    "over",
    "as",
    "into",
    "through",
    "behind",
    "without",
    "under",
}


@cache
def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def commands(name: str) -> list[dict]:
    return [json.loads(row["messages"][-1]["content"]) for row in rows(name)]


def test_the_generator_writes_the_committed_bytes() -> None:
    for name, text in generate.files().items():
        assert (FOLDER / name).read_bytes() == text.encode(), f"{name} is not what the generator writes: run it again"


def test_there_are_enough_of_each_action() -> None:
    assert len(rows("train.jsonl")) >= 800 and len(rows("test.jsonl")) >= 150
    for name in ("train.jsonl", "test.jsonl"):
        counts = {action: sum(row["action"] == action for row in rows(name)) for action in ACTIONS}
        assert min(counts.values()) >= 20 and sum(counts.values()) == len(rows(name))
        requests = [row["messages"][1]["content"] for row in rows(name)]
        assert len(set(requests)) == len(requests)


def test_the_three_forms_hold_the_same_examples() -> None:
    alpaca = json.loads((FOLDER / "train.alpaca.json").read_text())
    sharegpt = json.loads((FOLDER / "train.sharegpt.json").read_text())
    messages = [([m["content"] for m in row["messages"]], row["action"]) for row in rows("train.jsonl")]
    assert messages == [([r["system"], r["instruction"], r["output"]], r["action"]) for r in alpaca]
    assert messages == [([t["value"] for t in r["conversations"]], r["action"]) for r in sharegpt]
    assert all(r["input"] == "" for r in alpaca)


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_every_answer_follows_the_rules(name: str) -> None:
    for row, command in zip(rows(name), commands(name), strict=True):
        request, answer = row["messages"][1]["content"], row["messages"][2]["content"]
        assert answer == json.dumps(command, separators=(",", ":")), "one compact form"
        assert command["action"] == row["action"]
        always, maybe = KEYS[command["action"]]
        assert [key for key in [*always, *maybe] if key in command] == list(command) and set(always) <= set(command)
        assert command.get("priority", "medium") in {"high", "medium", "low"} or (command["priority"] is None and row["action"] == "list")
        assert command.get("status", "open") in {"open", "done", "all"}
        if command["action"] == "update":
            assert len(command) > 2, "an update changes something"
        # All that is free text stands in the request as it stands in the answer; a number may have lost its "#".
        task = command.get("task", "")
        assert (task[1:] if task.startswith("#") else task) in request
        for key in ("title", "due", "person"):
            assert (command.get(key) or "") in request
        assert "  " not in answer and "\n" not in request


def test_defaults_and_synonyms() -> None:
    """The rules read off the requests again, by other means than the generator's slots."""
    by_request = {row["messages"][1]["content"]: json.loads(row["messages"][2]["content"]) for row in rows("train.jsonl")}
    urgent = [c for r, c in by_request.items() if re.search(r"\b(asap|critical|important)\b", r) and "unimportant" not in r]
    relaxed = [c for r, c in by_request.items() if re.search(r"no rush|minor|not urgent|unimportant", r)]
    assert urgent and all(c["priority"] == "high" for c in urgent)
    assert relaxed and all(c["priority"] == "low" for c in relaxed)
    silent = re.compile(r"urgent|asap|as soon as|priority|important|critical|minor|rush|whenever")
    plain = [c for r, c in by_request.items() if c["action"] == "create" and not silent.search(r)]
    assert plain and all(c["priority"] == "medium" for c in plain)
    undated = [c for r, c in by_request.items() if re.search(r"no deadline|due date (of|from) .*", r) and c["action"] == "update"]
    assert any(c.get("due", "") is None for c in undated)


def surface(words: Wording) -> dict[str, set[str]]:
    """All that a test must not have seen in training: sentences, clauses, title words, names, dates, numbers."""
    lists = [words.create, words.complete, words.update, words.delete, *words.list_.values()]
    clauses = [words.due, words.high, words.low, words.person, words.list_filters]
    titles = {word for t in words.titles for phrase in [*t.verbs, *t.things, *t.ends] for word in phrase.lower().split()}
    return {
        "openers": set(words.openers) - {""},
        "sentences": {re.sub(r"\W+", " ", sentence.replace("{do}", "")).strip().lower() for each in lists for sentence in each},
        "clauses": {clause.strip(" ,-!()") for group in clauses for clause in group},
        "title words": titles - GLUE,
        "names": set(words.names),
        "dates": {form.replace("{n}", str(n)) for form in words.month_days for n in words.numbers},
        "numbers": {str(n) for n in words.ids},
    }


def test_the_two_wordings_share_no_surface() -> None:
    train, test = surface(TRAIN), surface(TEST)
    assert {kind: train[kind] & test[kind] for kind in train} == {kind: set() for kind in train}


def test_the_files_share_no_title_name_date_or_request() -> None:
    def values(name: str) -> dict[str, set[str]]:
        found = commands(name)
        return {
            "titles": {c[key] for c in found for key in ("title", "task") if c.get(key)},
            "names": {c["person"] for c in found if c.get("person")},
            "dates": {c["due"] for c in found if c.get("due")} - set(DAYS),
            "requests": {row["messages"][1]["content"].lower() for row in rows(name)},
        }

    train, test = values("train.jsonl"), values("test.jsonl")
    assert all(test.values()) and {kind: train[kind] & test[kind] for kind in train} == {kind: set() for kind in train}


def test_the_job_names_files_that_are_there() -> None:
    spec = JobSpec.load(FOLDER / "job.yaml")
    assert all(Path(s.path).exists() for s in spec.data.train) and all(Path(t.path).exists() for t in spec.evaluate.tasks)
    assert spec.evaluate.tasks[0].metric == "json_match" and spec.data.slice_by == "action"
