"""Writes the running example: task requests in plain English, and the one JSON command that each stands for.

    python -m examples.task_api.generate [FOLDER]

The same seed gives the same bytes. The rules of the task:

- create   {"action", "title", "priority", "due", "person"}: all keys, always; without a word on priority it is "medium", the rest is null
- complete {"action", "task"}: a task is named by its title, or by "#" and its number
- list     {"action", "status", "priority", "due", "person"}: all keys, always; without a word on status it is "open", the rest is null
- update   {"action", "task"} and what changes: "title", "priority", "due" (null when the date is removed), "person"
- delete   {"action", "task"}

Keys stand in this order. "urgent", "asap" and the like mean "high"; "no rush", "minor" and the like mean "low".
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from examples.task_api.wording import DAYS, HIGH, LOW, MEDIUM, TEST, THINGS, TRAIN, Wording

SEED = 7
SYSTEM = "Turn the request into one JSON command."
# How many examples of each action; create and update have the most fields, so they get the most.
TRAIN_COUNTS = {"create": 430, "complete": 130, "list": 200, "update": 380, "delete": 160}
TEST_COUNTS = {"create": 52, "complete": 20, "list": 28, "update": 40, "delete": 20}

# Slot in a sentence -> the key of the command that it speaks of.
KEYS = {
    "title": "title", "new": "title", "ref": "task", "due": "due", "undue": "due", "person": "person",
    "high": "priority", "medium": "priority", "low": "priority",
}  # fmt: skip
ORDER = ["task", "title", "status", "priority", "due", "person"]


class Writer:
    """Draws requests and their commands in one wording. No request and no title comes twice."""

    def __init__(self, words: Wording, seed: str) -> None:
        self.words = words
        self.rng = random.Random(seed)
        self.used: set[str] = set()

    def example(self, action: str) -> dict[str, str]:
        """One new `{"request", "command", "action"}`."""
        while True:
            request, said = {"create": self.create, "list": self.list_, "update": self.update}.get(action, lambda: self.plain(action))()
            if self.new(request):
                command = {"action": action} | {key: said[key] for key in ORDER if key in said}
                return {"request": request, "command": json.dumps(command, separators=(",", ":")), "action": action}

    def create(self) -> tuple[str, dict[str, Any]]:
        frame = self.rng.choice(self.words.create)
        level = self.rng.choice(["high", "low"])
        clauses = {"priority": getattr(self.words, level), "due": self.words.due, "person": self.words.person}
        chosen = [key for key in clauses if key not in keys_in(frame) and self.rng.random() < 1 / 3]
        said: dict[str, Any] = {"priority": level if "priority" in chosen else "medium", "due": None, "person": None}
        self.rng.shuffle(chosen)
        tail = "".join(self.rng.choice(clauses[key]) for key in chosen)
        return self.fill(frame.replace("{tail}", tail), said), said

    def list_(self) -> tuple[str, dict[str, Any]]:
        status = self.rng.choice(["open", "open", "open", "done", "all"])
        frame = self.rng.choice(self.words.list_[status])
        said: dict[str, Any] = {"status": status, "priority": None, "due": None, "person": None}
        clause = self.rng.choice(self.words.list_filters)
        tail = clause if self.rng.random() < 0.6 and not keys_in(frame) & keys_in(clause) else ""
        return self.fill(frame.replace("{tail}", tail), said), said

    def update(self) -> tuple[str, dict[str, Any]]:
        said: dict[str, Any] = {}
        return self.fill(self.rng.choice(self.words.update), said), said

    def plain(self, action: str) -> tuple[str, dict[str, Any]]:
        """Actions that name a task and no more."""
        said: dict[str, Any] = {}
        return self.fill(self.rng.choice(getattr(self.words, action)), said), said

    def fill(self, sentence: str, said: dict[str, Any]) -> str:
        """The sentence with words in its slots; what they say goes into `said`."""

        def word(slot: re.Match[str]) -> str:
            if slot[1] == "do":
                return self.rng.choice(self.words.openers)
            if slot[1] == "thing":
                return self.rng.choice(THINGS)
            text, said[KEYS[slot[1]]] = getattr(self, f"slot_{slot[1]}")()
            return text

        return re.sub(r"\{(\w+)\}", word, sentence)

    # -- one function per slot: (words in the sentence, value in the command) --------------------------------------------

    def slot_title(self) -> tuple[str, str]:
        while True:
            kind = self.rng.choice(self.words.titles)
            parts = [self.rng.choice(kind.verbs), self.rng.choice(kind.things)]
            if self.rng.random() < 0.4:
                parts.append(self.rng.choice(kind.ends))
            title = " ".join(parts)
            if self.new(title):
                return title, title

    slot_new = slot_title

    def slot_ref(self) -> tuple[str, str]:
        if self.rng.random() < 0.4:
            number = self.rng.choice(self.words.ids)
            return self.fill(self.rng.choice(self.words.ref_id).replace("{id}", str(number)), {}), f"#{number}"
        title, _ = self.slot_title()
        return self.fill(self.rng.choice(self.words.ref_title).replace("{title}", title), {}), title

    def slot_due(self) -> tuple[str, str]:
        day = self.rng.choice(DAYS)
        if self.rng.random() < 0.3:
            day = self.rng.choice(self.words.month_days).replace("{n}", str(self.rng.choice(self.words.numbers)))
        return day, day

    def slot_undue(self) -> tuple[str, None]:
        return "", None

    def slot_person(self) -> tuple[str, str]:
        name = self.rng.choice(self.words.names)
        return name, name

    def slot_high(self) -> tuple[str, str]:
        return self.rng.choice(HIGH), "high"

    def slot_medium(self) -> tuple[str, str]:
        return self.rng.choice(MEDIUM), "medium"

    def slot_low(self) -> tuple[str, str]:
        return self.rng.choice(LOW), "low"

    def new(self, text: str) -> bool:
        """True the first time this text is drawn."""
        seen = text in self.used
        self.used.add(text)
        return not seen


def keys_in(sentence: str) -> set[str]:
    """The command's keys that a sentence's slots speak of."""
    return {KEYS[slot] for slot in re.findall(r"\{(\w+)\}", sentence) if slot in KEYS}


def examples(words: Wording, counts: dict[str, int], seed: str) -> list[dict[str, str]]:
    """All examples of one split, in a fixed random order."""
    writer = Writer(words, seed)
    rows = [writer.example(action) for action, count in counts.items() for _ in range(count)]
    writer.rng.shuffle(rows)
    return rows


def messages(row: dict[str, str]) -> dict[str, Any]:
    turns = [("system", SYSTEM), ("user", row["request"]), ("assistant", row["command"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "action": row["action"]}


def alpaca(row: dict[str, str]) -> dict[str, Any]:
    return {"system": SYSTEM, "instruction": row["request"], "input": "", "output": row["command"], "action": row["action"]}


def sharegpt(row: dict[str, str]) -> dict[str, Any]:
    turns = [("system", SYSTEM), ("human", row["request"]), ("gpt", row["command"])]
    return {"conversations": [{"from": who, "value": value} for who, value in turns], "action": row["action"]}


def files() -> dict[str, str]:
    """File name -> its whole text."""
    train = examples(TRAIN, TRAIN_COUNTS, f"{SEED}-train")
    test = examples(TEST, TEST_COUNTS, f"{SEED}-test")
    return {
        "train.jsonl": lines(messages(row) for row in train),
        "train.alpaca.json": array(alpaca(row) for row in train),
        "train.sharegpt.json": array(sharegpt(row) for row in train),
        "test.jsonl": lines(messages(row) for row in test),
    }


def lines(rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def array(rows: Any) -> str:
    """A JSON array with one row a line, so that a change shows as a changed line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(text):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
