"""What one row tells about itself: fingerprints for the choice over all rows (trainers/select.py)."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (a native module without stubs)

from trainers.chat import Message
from trainers.sources import Conversation
from trainers.spec import Curate

SKETCH_DTYPE = np.dtype(np.uint16)
SKETCH_VALUES = 128
_SKETCH_SEED = 0


class Note(NamedTuple):
    """One thing found in a row."""

    step: str
    """The option of `data.curate` that looked."""
    action: Literal["report", "drop", "mask", "refuse"]
    kind: str
    """A few words for people, the same for every row of its kind."""
    text: str
    """At most 200 characters of what was found, personal data masked."""


class RowChecks:
    """All that `data.curate` asks of a single row. False where it asks nothing."""

    def __init__(self, curate: Curate) -> None:
        self._checks = []

    def __bool__(self) -> bool:
        return bool(self._checks)

    def __call__(self, conversation: Conversation) -> tuple[Conversation, list[Note]]:
        """The conversation (personal data masked where asked) and what was found; the first note that drops or refuses is the last."""
        return conversation, []


# -- fingerprints --------------------------------------------------------------------------------------------------------


def fingerprints(conversation: Conversation) -> tuple[int, int]:
    """64-bit hashes (of all that is said, of what stands before the last answer): roles, texts, tool calls and tools, but no weights,
    names or call ids. Blanks around a text and its Unicode form (NFC) make no difference.

    A row that asks nothing (plain text, or an answer after a system message) counts as its own prompt.
    """
    messages = conversation["messages"]
    last = next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "assistant"), 0)
    before = "".join([_said(message) for message in messages[:last]])
    if conversation["tools"]:
        before = conversation["tools"] + before
    hasher = xxhash.xxh3_64(_bytes(before))
    prompt = hasher.intdigest()
    hasher.update(_bytes("".join([_said(message) for message in messages[last:]])))
    digest = hasher.intdigest()
    asks = any(message["role"] in ("user", "tool") for message in messages[:last])
    return digest, prompt if asks else digest


def _said(message: Message) -> str:
    text = f"\x1e{message['role']}\x1f{message['content'].strip()}"
    if reasoning := message.get("reasoning"):
        text += f"\x1d{reasoning.strip()}"
    for call in message.get("tool_calls", ()):
        text += f"\x1c{call['name']}\x1f{call['arguments'].strip()}"
    return text


def _bytes(text: str) -> bytes:
    return (text if text.isascii() else unicodedata.normalize("NFC", text)).encode()


# Scripts that put no blanks between words (Thai, Lao, Burmese, Khmer, kana, Han): each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def sketch(conversation: Conversation) -> NDArray[np.uint16]:
    """[128] MinHash values of the word 3-grams of everything but system messages and tools, which whole data sets share.

    The share of equal values estimates the Jaccard similarity of two rows (Broder, 1997) to about 0.035. Only the low 16 bits of each
    value are kept, which halves the memory and lets unequal values look equal once in 65,536.
    """
    text = "\n".join(_words_of(message) for message in conversation["messages"] if message["role"] != "system")
    words = _WORD.findall(text.lower())
    hasher = RMinHash(SKETCH_VALUES, _SKETCH_SEED)
    hasher.update(map(" ".join, zip(words, words[1:], words[2:], strict=False)) if len(words) > 2 else [" ".join(words) or text.strip()])
    return np.array(hasher.digest(), np.uint32).astype(SKETCH_DTYPE)


def _words_of(message: Message) -> str:
    return " ".join([message["content"], *(call["arguments"] for call in message.get("tool_calls", ()))])
