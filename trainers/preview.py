"""The first examples of a job as tokens with weights: what training will see, before anything is prepared. Pure.

Only as many rows are read as are shown, whatever the size of the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from tokenizers.decoders import DecodeStream

from trainers.chat import Chat
from trainers.errors import UserError
from trainers.sources import Conversation, conversations
from trainers.spec import JobSpec


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
    id: str
    """`file:line`."""
    tokens: list[PreviewToken] = []
    num_tokens: int = 0
    supervised: int = 0
    error: dict[str, Any] | None = None
    """Why the row cannot be used, as `{"code", "message", "param"}`."""


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
    """`limit` examples after the first `skip` rows, or the one row of this id (`file:line`).

    A row that training would refuse is shown with its error. Raises UserError where there is no such row, where a source cannot be read at
    all, or where the template cannot be used.
    """
    chat = Chat.load(model_dir)
    rows: Iterable[Conversation] = chain.from_iterable(conversations(source, spec.data.slice_by) for source in spec.data.train)
    rows = (row for row in rows if row["id"] == id) if id is not None else islice(rows, skip, None)
    examples = [_example(chat, spec, row) for row in islice(rows, 1 if id is not None else limit)]
    if not examples:
        what = f"row {id}" if id is not None else f"row {skip + 1}"
        raise UserError(f"The data has no {what}.", "Name a row as the data report does (file:line), or a smaller number.")
    return Preview(
        model=spec.model.base,
        template=spec.model.template,
        template_sha256=chat.template_sha256,
        tokenizer_sha256=chat.tokenizer_sha256,
        max_length=spec.model.max_length,
        train_on=spec.data.train_on,
        examples=examples,
    )


def _example(chat: Chat, spec: JobSpec, row: Conversation) -> PreviewExample:
    try:
        example = chat.example(row["messages"], spec.data.train_on)
    except UserError as error:
        return PreviewExample(id=row["id"], error=error.to_dict())
    control = set(chat.control.values())
    tokens = [
        PreviewToken(id=id, text=text, weight=weight, control=id in control)
        for id, text, weight in zip(example.ids, texts(chat, example.ids), example.weights, strict=True)
    ]
    return PreviewExample(id=row["id"], tokens=tokens, num_tokens=len(tokens), supervised=sum(t.weight > 0 for t in tokens))


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
