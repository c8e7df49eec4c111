"""What becomes of each row of a source: read, checked, rendered, tokenized, masked, proven. Pure work of one CPU, in tables.

`examine` turns a chunk of a file into tables of ROWS: one row for each row of the source, whatever became of it, with the
examples made of it. Errors travel as values, so that the first one in file order is the one that is raised.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from trainers.chat import Chat, Example, trained_turns, volume
from trainers.curate import Note, RowChecks, fingerprints, sketch
from trainers.errors import DataError, RowError, UserError
from trainers.overlength import split_turns, truncate_prompt
from trainers.proof import Claim, prove_all
from trainers.sources import Chunk, Conversation, read
from trainers.spec import Curate, JobSpec
from trainers.store import SCHEMA, to_table

TOO_LONG = "longer than max_length"
_BATCH_ROWS = 2048
_BATCH_CHARS = 64 * 2**20  # rendered, where all of a batch has to be

_EXAMPLE = pa.struct([SCHEMA.field(name) for name in ("input_ids", "run_weights", "run_lengths", "length", "supervised")])
ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("digest", pa.uint64()),  # of all messages
        ("prompt", pa.uint64()),  # of what stands before the last answer
        ("sketch", pa.binary()),  # MinHash, where near-duplicates are looked for
        ("slice", pa.string()),
        ("class", pa.string()),
        ("excerpt", pa.string()),
        ("dropped", pa.string()),  # the reason why it is left out
        ("error", pa.list_(pa.string())),  # class, message, remedy, kind
        ("notes", pa.list_(pa.struct([("step", pa.string()), ("action", pa.string()), ("kind", pa.string()), ("text", pa.string())]))),
        ("examples", pa.large_list(_EXAMPLE)),
    ]
)


@dataclass(frozen=True)
class Rules:
    """All that decides what becomes of a row on its own."""

    train_on: str
    reasoning: str
    slice_by: str | None
    class_by: str | None
    max_length: int
    overlength: str
    curate: Curate

    @classmethod
    def of(cls, spec: JobSpec) -> Rules:
        data = spec.data
        return cls(
            train_on=data.train_on,
            reasoning=data.reasoning,
            slice_by=data.slice_by,
            class_by=data.curate.balance.by if data.curate.balance else None,
            max_length=spec.model.max_length,
            overlength=spec.model.overlength,
            curate=data.curate,
        )


@dataclass
class Row:
    """One row of the source on its way."""

    id: str
    conversation: Conversation | None = None
    parts: list[Conversation] | None = None
    """The conversation as it is trained; shorter ones where it was too long."""
    examples: list[list[Example]] | None = None
    """Of each part."""
    notes: list[Note] | None = None
    dropped: str | None = None
    error: UserError | None = None
    digest: int = 0
    prompt: int = 0
    sketch: bytes | None = None


def examine(chat: Chat, rules: Rules, chunk: Chunk) -> Iterator[pa.Table]:
    """Tables of ROWS: every row of the chunk, in order. Memory stays at some megabytes of text."""
    checks = RowChecks(rules.curate)
    rows = iter(read(chunk, rules.slice_by, rules.class_by))
    while True:
        with no_garbage_collection():
            batch = _next_batch(rows)
            table = _to_table(examine_rows(chat, rules, batch, checks)) if batch else None
        if table is None:
            return
        yield table


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A batch makes a hundred thousand small objects and no cycles; looking for cycles among them takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _next_batch(rows: Iterator[Conversation | RowError]) -> list[Conversation | RowError]:
    batch: list[Conversation | RowError] = []
    chars = 0
    for row in islice(rows, _BATCH_ROWS):
        batch.append(row)
        if not isinstance(row, RowError):
            chars += volume(row["messages"], row["tools"])
        if chars > _BATCH_CHARS:
            break
    return batch


def examine_rows(chat: Chat, rules: Rules, batch: Sequence[Conversation | RowError], checks: RowChecks | None = None) -> list[Row]:
    """The same for rows at hand; `checks` are those of the rules, made once by a caller who has many batches."""
    checks = RowChecks(rules.curate) if checks is None else checks
    rows = []
    for given in batch:
        if isinstance(given, RowError):
            rows.append(Row(given.where, error=given))
            continue
        row = Row(given["id"])
        if rules.reasoning == "drop":
            given = _without_reasoning(given)
        if checks:
            given, row.notes = checks(given)
            _judge(row)
        row.conversation = given
        row.digest, row.prompt = fingerprints(given)
        if rules.curate.near_duplicates is not None:
            row.sketch = sketch(given).tobytes()
        rows.append(row)

    alive = [row for row in rows if row.error is None and row.dropped is None]
    made = chat.examples([row.conversation for row in alive], rules.train_on, rules.reasoning)  # type: ignore[misc]
    for row, examples in zip(alive, made, strict=True):
        assert row.conversation is not None
        if isinstance(examples, UserError):
            row.error = _at(row, examples)
        else:
            row.parts, row.examples = [row.conversation], [examples]
            if max(len(example.ids) for example in examples) > rules.max_length:
                _shorten(chat, rules, row)

    claims, owners = [], []
    for row in alive:
        if row.error is None and row.dropped is None:
            for part, examples in zip(row.parts or (), row.examples or (), strict=True):
                claims.append(Claim(row.id, part, examples))
                owners.append(row)
    for row, claim, verdict in zip(owners, claims, prove_all(chat, claims, rules.train_on, rules.reasoning), strict=True):
        if verdict is not None and _diverges(chat, rules, claim):
            verdict = Diverged(f"{chat.backend} reads {row.id} otherwise than the tokenizers library.", "")
        row.error = row.error or verdict
    return rows


def _without_reasoning(conversation: Conversation) -> Conversation:
    messages = [{key: value for key, value in message.items() if key != "reasoning"} for message in conversation["messages"]]
    return {**conversation, "messages": messages}


def _judge(row: Row) -> None:
    """Act on what the row checks found."""
    for note in row.notes or ():
        if note.action == "drop":
            row.dropped = f"{note.step}: {note.kind}"
            return
        if note.action == "refuse":
            row.error = RowError(
                row.id, f"holds {note.kind} ({note.text})", "Remove or mask it, or set data.curate to mask it.", f"holds {note.kind}"
            )
            return


def _shorten(chat: Chat, rules: Rules, row: Row) -> None:
    """A row that is too long: refused, left out, or made shorter, as the rules say."""
    assert row.conversation is not None and row.examples is not None
    length = max(len(example.ids) for example in row.examples[0])

    def made(conversation: Conversation) -> list[Example]:
        (examples,) = chat.examples([conversation], rules.train_on, rules.reasoning)
        if isinstance(examples, UserError):
            raise _at(row, examples)
        return examples

    def measure(conversation: Conversation) -> int:
        # A part whose turns are all of weight 0 makes no example; its length is measured as if they were trained.
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in conversation["messages"]]
        return max(len(example.ids) for example in made({**conversation, "messages": messages}))

    def note(kind: str) -> None:
        row.notes = [*(row.notes or ()), Note("overlength", "report", kind, f"{length:,} tokens")]

    try:
        if rules.overlength == "refuse" or (row.conversation.get("text") and rules.overlength != "drop"):
            raise RowError(
                f"{row.id}:",
                f"the example has {length:,} tokens, more than model.max_length = {rules.max_length:,}",
                "Raise model.max_length, shorten the example, or set model.overlength to drop, truncate_prompt or split_turns.",
                TOO_LONG,
            )
        if rules.overlength == "truncate_prompt":
            short = truncate_prompt(row.conversation, rules.max_length, measure)
            if short is not None and trained_turns(short["messages"], rules.train_on):
                row.parts, row.examples = [short], [made(short)]
                note("prompt shortened")
                return
        if rules.overlength == "split_turns":
            parts, lost = split_turns(row.conversation, rules.max_length, measure)
            if rules.train_on == "last_assistant":
                parts = parts[-1:] if not lost else []
            parts = [part for part in parts if trained_turns(part["messages"], rules.train_on)]
            if parts:
                row.parts, row.examples = parts, [made(part) for part in parts]
                note("turns spread over several examples")
                if lost:
                    note("without turns that alone are longer than max_length")
                return
        row.dropped = TOO_LONG if rules.overlength == "drop" else "an answer alone is longer than max_length"
    except UserError as error:
        row.error = error


def _diverges(chat: Chat, rules: Rules, claim: Claim) -> bool:
    """Whether a claim fails for the fast tokenizer's sake: the reference gives other ids."""
    if chat.backend == "hf":
        return False
    (wanted,) = chat.with_backend("hf").examples([claim.conversation], rules.train_on, rules.reasoning)
    return isinstance(wanted, list) and [e.ids.tolist() for e in wanted] != [e.ids.tolist() for e in claim.examples]


class Diverged(DataError):
    """The fast tokenizer gave other ids than the reference on a row; never seen by users: the data is prepared again without it."""


def _at(row: Row, error: UserError) -> UserError:
    """The error, naming the row."""
    if isinstance(error, RowError) or error.message.startswith(row.id):
        return error
    if isinstance(error, DataError):
        return RowError(f"{row.id}:", error.message.rstrip("."), error.remedy, _kind(error.message))
    return type(error)(f"{row.id}: {error.message}", error.remedy)


def _kind(message: str) -> str:
    """An error's message without the numbers of this row."""
    return (
        " ".join(word for word in message.rstrip(".").split() if not any(c.isdigit() for c in word)) if len(message) < 200 else message[:60]
    )


def _to_table(rows: list[Row]) -> pa.Table:
    flat = [
        (row, part, example) for row in rows if row.error is None and row.dropped is None for part in row.examples or () for example in part
    ]
    counts = np.zeros(len(rows) + 1, np.int64)
    position = {id(row): i for i, row in enumerate(rows)}
    for row, _, _ in flat:
        counts[position[id(row)] + 1] += 1
    table = to_table([e.ids for _, _, e in flat], [e.spans for _, _, e in flat], [""] * len(flat), [None] * len(flat))
    structs = pa.StructArray.from_arrays([table.column(f.name).combine_chunks() for f in _EXAMPLE], fields=list(_EXAMPLE))
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "digest": [row.digest for row in rows],
        "prompt": [row.prompt for row in rows],
        "sketch": [row.sketch for row in rows],
        "slice": [row.conversation["slice"] if row.conversation else None for row in rows],
        "class": [row.conversation["class"] if row.conversation else None for row in rows],
        "excerpt": [_excerpt(row.conversation) if row.conversation else None for row in rows],
        "dropped": [row.dropped for row in rows],
        "error": [_error(row.error) if row.error else None for row in rows],
        "notes": [[note._asdict() for note in row.notes] if row.notes else None for row in rows],
    }
    arrays = [pa.array(values, ROWS.field(name).type) for name, values in columns.items()]
    return pa.table([*arrays, pa.LargeListArray.from_arrays(pa.array(np.cumsum(counts)), structs)], schema=ROWS)


def _error(error: UserError) -> list[str]:
    return [type(error).__name__, error.message, error.remedy, error.kind if isinstance(error, RowError) else _kind(error.message)]


def _excerpt(conversation: Conversation) -> str:
    """The last thing that was asked, and the beginning of the answer."""
    messages = conversation["messages"]
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    return f"{asked[:120]} -> {messages[-1]['content'][:80]}"
