"""The first examples of a job as tokens with weights: what training will see, before anything is prepared. Pure.

Only as many rows are read as are shown, whatever the size of the data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from tokenizers.decoders import DecodeStream

from trainers.chat import Chat
from trainers.errors import RowError, UserError
from trainers.examine import Row, Rules, examine_rows
from trainers.sources import Conversation, first_rows
from trainers.spec import JobSpec

MAX_CHARS = 2**20
"""Of one row: beyond it, finding what fits into `max_length` takes many seconds."""


class PreviewToken(BaseModel):
    id: int
    text: str
    """The texts of an example, joined, are what its tokens decode to. A character whose bytes are spread over several tokens stands at
    the first of them; the others have none."""
    weight: float
    """Loss weight of this token as a target; 0 = context."""
    control: bool
    """A control token of the template, not text."""


class PreviewExample(BaseModel):
    """An example, or a row that makes none. A row whose turns are spread over several examples has as many of these."""

    id: str
    """`file:line`."""
    tokens: list[PreviewToken] = []
    num_tokens: int = 0
    supervised: int = 0
    notes: list[str] = []
    """What was found in the row or done to it."""
    left_out: str | None = None
    """Why the job trains on without the row."""
    error: dict[str, Any] | None = None
    """Why the job stops at the row, as `{"code", "message", "param"}`."""


class Preview(BaseModel):
    object: Literal["tuneyard.preview"] = "tuneyard.preview"
    model: str
    template: str
    """As the job names it."""
    template_sha256: str
    tokenizer_sha256: str
    max_length: int
    train_on: str
    examples: list[PreviewExample]


def preview(spec: JobSpec, model_dir: Path, limit: int = 3, skip: int = 0, id: str | None = None) -> Preview:
    """The examples of `limit` rows after the first `skip`, or of the one row of this id (`file:line`), made just as preparing makes them.

    What is decided over all rows at once (duplicates, balance, the validation split) is not looked at. Raises UserError where there is
    no such row, where a source cannot be read at all, or where the template cannot be used.
    """
    chat = _chat(model_dir, spec.model.template)
    rules = Rules.of(spec)
    rows: Iterator[Conversation | RowError] = chain.from_iterable(
        first_rows(source, rules.slice_by, rules.class_by) for source in spec.data.train
    )
    if id is not None:
        rows, limit = (row for row in rows if (row.where if isinstance(row, RowError) else row["id"]) == id), 1
    chosen = list(islice(rows, skip, skip + limit))
    if not chosen:
        what = f"row {id}" if id is not None else f"row {skip + 1}"
        raise UserError(f"The data has no {what}.", "Name a row as the data report does (file:line), or a smaller number.")
    return Preview(
        model=spec.model.base,
        template=spec.model.template,
        template_sha256=chat.template_sha256,
        tokenizer_sha256=chat.tokenizer_sha256,
        max_length=spec.model.max_length,
        train_on=spec.data.train_on,
        # One by one: none needs the memory of all.
        examples=[example for row in chosen for made in examine_rows(chat, rules, [_bounded(row)]) for example in _shown(chat, made)],
    )


def _bounded(row: Conversation | RowError) -> Conversation | RowError:
    if isinstance(row, RowError) or (chars := sum(len(message["content"]) for message in row["messages"])) <= MAX_CHARS:
        return row
    return RowError(row["id"], f"has {chars:,} characters, more than a preview looks at", "Look at the whole data with `tuneyard check`.")


@functools.lru_cache(maxsize=4)
def _chat(model_dir: Path, template: str) -> Chat:
    """Kept between calls: reading a large vocabulary takes a second."""
    return Chat.load(model_dir, template)


def _shown(chat: Chat, row: Row) -> list[PreviewExample]:
    notes = [f"{note.step}: {note.kind} ({note.text})" for note in row.notes or ()]
    if row.error is not None:
        return [PreviewExample(id=row.id, notes=notes, error=row.error.to_dict())]
    if row.dropped is not None:
        return [PreviewExample(id=row.id, notes=notes, left_out=row.dropped)]
    control = set(chat.control.values())
    out = []
    for example in chain.from_iterable(row.examples or ()):
        ids = example.ids.tolist()
        tokens = [
            PreviewToken(id=id, text=text, weight=weight, control=id in control)
            for id, text, weight in zip(ids, texts(chat, ids), example.weights, strict=True)
        ]
        supervised = sum(token.weight > 0 for token in tokens)
        out.append(PreviewExample(id=row.id, tokens=tokens, num_tokens=len(tokens), supervised=supervised, notes=notes))
    return out


def texts(chat: Chat, ids: list[int]) -> list[str]:
    """What each token says; joined, what all of them decode to."""
    names = {id: text for text, id in chat.control.items()}
    stream = DecodeStream(skip_special_tokens=False)
    out = [""] * len(ids)
    first = 0  # of the tokens that wait for the rest of their character
    said = 0
    for at, id in enumerate(ids):
        text = stream.step(chat.tokenizer, id)
        if text is None:
            continue
        said += len(text)
        if first < at and id in names:  # bytes that are no character end where the template goes on
            out[first], text = text.removesuffix(names[id]), names[id]
            first = at
        out[first] = text
        first = at + 1
    if first < len(ids):
        out[first] = chat.tokenizer.decode(ids, skip_special_tokens=False)[said:]
    return out
