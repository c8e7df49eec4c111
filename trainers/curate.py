"""What one row tells about itself: the checks of `data.curate`, and fingerprints for the choice over all rows (trainers/select.py).

The checks are rules, not models (but for the language): cheap, the same on every machine, and each with a reason to show. They look at
the last 200,000 characters of a text, where a run-away answer ends.
"""

from __future__ import annotations

import difflib
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import ftfy
import numpy as np
import xxhash
from ftfy.badness import is_bad
from numpy.typing import NDArray
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  (a native module without stubs)

from trainers.chat import Message
from trainers.errors import SpecError
from trainers.personal import TAGS, mask
from trainers.refusals import count_apologies, declines
from trainers.repetition import LOOP_WORDS, WORD, repeats
from trainers.sources import Conversation
from trainers.spec import Curate

CURATE_VERSION = 1  # raise it whenever a check, fingerprint or choice changes: it is part of every token store's key
SKETCH_DTYPE = np.dtype(np.uint16)
SKETCH_VALUES = 128
_SKETCH_SEED = 0
_LOOK_CHARS = 200_000
_TEXT_CHARS = 200

Action = Literal["report", "drop", "mask", "refuse"]


class Note(NamedTuple):
    """One thing found in a row."""

    step: str
    """The option of `data.curate` that looked."""
    action: Action
    kind: str
    """A few words for people, the same for every row of its kind."""
    text: str
    """At most 200 characters of what was found, personal data masked."""


Hit = tuple[str, str]  # kind, text
Check = Callable[[Conversation], Iterator[Hit]]


class RowChecks:
    """All that `data.curate` asks of a single row. False where it asks nothing.

    Raises SpecError for a language that cannot be told apart.
    """

    def __init__(self, curate: Curate) -> None:
        self._personal_data: Literal["off", "report", "mask", "refuse"] = curate.personal_data
        checks: list[tuple[str, Literal["off", "report", "drop"], Check]] = [
            ("min_answer_chars", "drop" if curate.min_answer_chars else "off", functools.partial(_too_short, curate.min_answer_chars)),
            ("max_answer_chars", "drop" if curate.max_answer_chars else "off", functools.partial(_too_long, curate.max_answer_chars or 0)),
            ("max_turns", "drop" if curate.max_turns else "off", functools.partial(_too_many_turns, curate.max_turns or 0)),
            ("junk", curate.junk, _junk),
            ("languages", "drop" if curate.languages else "off", functools.partial(_other_language, _known(curate.languages))),
            ("refusals", curate.refusals, _refusals),
            ("repetition", curate.repetition, _repetition),
        ]
        self._checks: list[tuple[str, Action, Check]] = [(step, action, check) for step, action, check in checks if action != "off"]

    def __bool__(self) -> bool:
        return bool(self._checks) or self._personal_data != "off"

    def __call__(self, conversation: Conversation) -> tuple[Conversation, list[Note]]:
        """The conversation (personal data masked where asked) and what was found; the first note that drops or refuses is the last."""
        notes = []
        for step, action, check in self._checks:
            for kind, text in check(conversation):
                notes.append(Note(step, action, kind, text))
                if action == "drop":
                    return conversation, notes
        if self._personal_data != "off":
            masked, found = _without_personal_data(conversation)
            notes += [Note("personal_data", self._personal_data, kind, text) for kind, text in found]
            if self._personal_data == "mask":
                conversation = masked
        return conversation, notes


def _answers(conversation: Conversation) -> list[Message]:
    return [message for message in conversation["messages"] if message["role"] == "assistant" and message.get("weight", 1)]


_LAST_WORD = re.compile(r"\s\S*\Z")


def _shown(text: str, start: int = 0) -> str:
    """The text around `start`, short enough for a report, on one line and without personal data."""
    begin = max(0, start - 40)
    if begin:
        begin = text.find(" ", begin, start) + 1 or begin
    piece = text[begin : begin + 2 * _TEXT_CHARS]
    if begin + len(piece) < len(text):
        piece = _LAST_WORD.sub("", piece)  # half an address would not be seen for what it is
    piece = " ".join(mask(piece)[0].split())
    piece = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in piece)
    return piece if len(piece) <= _TEXT_CHARS else piece[: _TEXT_CHARS - 3] + "..."


# -- length --------------------------------------------------------------------------------------------------------------


def _chars(answer: Message) -> int:
    return len(answer["content"].strip()) + sum(len(call["arguments"]) for call in answer.get("tool_calls", ()))


def _too_short(least: int, conversation: Conversation) -> Iterator[Hit]:
    last = [message for message in conversation["messages"] if message["role"] == "assistant"][-1:]
    if last and (chars := _chars(last[0])) < least:
        yield "the answer is too short", f"{chars:,} characters: {_shown(last[0]['content'])}"[:_TEXT_CHARS]


def _too_long(most: int, conversation: Conversation) -> Iterator[Hit]:
    for message in conversation["messages"]:
        if message["role"] == "assistant" and (chars := _chars(message)) > most:
            yield "an answer is too long", f"{chars:,} characters: {_shown(message['content'])}"[:_TEXT_CHARS]
            return


def _too_many_turns(most: int, conversation: Conversation) -> Iterator[Hit]:
    turns = sum(message["role"] == "assistant" for message in conversation["messages"])
    if turns > most:
        yield "too many turns", f"{turns:,} assistant turns"


# -- junk and languages --------------------------------------------------------------------------------------------------

_REPLACEMENT = re.compile("[\ufffd\ufffe\uffff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_MARKUP = re.compile(r"```.*?(?:```|\Z)|<[^<>]{1,200}>|https?://\S{1,500}", re.DOTALL)  # code, tags, addresses: no prose
_SPEECH = re.compile(r"[\w\s]+")
_MIN_VISIBLE = 40
_MAX_SYMBOLS = 0.6


def _junk(conversation: Conversation) -> Iterator[Hit]:
    for message in conversation["messages"]:
        if message["role"] == "tool":  # what a program printed may look like anything
            continue
        text = message["content"]
        if found := _REPLACEMENT.search(text):
            yield "replacement characters", _shown(text, found.start())
            return
        if found := _CONTROL.search(text):
            yield "control characters", _shown(text, found.start())
            return
        if not text.isascii() and is_bad(look := text[-_LOOK_CHARS:]) and ftfy.fix_encoding(look) != look:
            found = re.search(r"[^\x00-\x7f]{2}", look)
            yield "text decoded the wrong way", _shown(look, found.start() if found else 0)
            return
    for answer in _answers(conversation):
        text = _MARKUP.sub("", answer["content"][-_LOOK_CHARS:])
        visible = len("".join(text.split()))
        symbols = sum(unicodedata.category(c)[0] in "SP" for c in _SPEECH.sub("", text))
        if visible >= _MIN_VISIBLE and symbols > _MAX_SYMBOLS * visible:
            yield "mostly symbols", _shown(answer["content"])
            return


_LANGUAGE_CHARS = 2000
_MIN_LETTER_BYTES = 20  # of UTF-8: a letter says more where there are more of them
_OTHER = 0.01  # the probability of all the wanted languages together, below which a text counts as another's


def _other_language(languages: frozenset[str], conversation: Conversation) -> Iterator[Hit]:
    """Answers in none of the languages. Short ones, names, numbers and code are left alone."""
    for answer in _answers(conversation):
        text = _MARKUP.sub(" ", answer["content"][:_LANGUAGE_CHARS])
        letters = "".join(filter(str.isalpha, text))
        if len(letters.encode()) < _MIN_LETTER_BYTES:
            continue
        ranking = _identifier().rank(text)
        if sum(probability for language, probability in ranking if language in languages) < _OTHER:
            yield f"in another language ({ranking[0][0]})", _shown(answer["content"])
            return


@functools.cache
def _identifier() -> LanguageIdentifier:
    """80 MB and 0.6 s, once per process. Its model is part of the package."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _known(languages: list[str]) -> frozenset[str]:
    if not languages:
        return frozenset()
    labels = _identifier().labels
    for language in languages:
        if language not in labels:
            near = difflib.get_close_matches(language, labels, n=1)
            raise SpecError(
                f"`{language}` is no language that can be told apart.",
                f"Did you mean `{near[0]}`?" if near else "Name ISO 639-1 codes such as en, de or zh.",
                "data.curate.languages",
            )
    return frozenset({*languages, "zxx"})  # zxx: no language at all


# -- refusals and repetition ---------------------------------------------------------------------------------------------

_MAX_APOLOGIES = 2


def _refusals(conversation: Conversation) -> Iterator[Hit]:
    answers = [answer["content"][-_LOOK_CHARS:] for answer in _answers(conversation)]
    for text in answers:
        if declines(text):
            yield "declines to answer", _shown(text)
            return
    apologies = sum(map(count_apologies, answers))
    if apologies > _MAX_APOLOGIES:
        yield "apologises again and again", f"{apologies:,} apologies: {_shown(answers[-1])}"[:_TEXT_CHARS]


def _repetition(conversation: Conversation) -> Iterator[Hit]:
    for answer in _answers(conversation):
        for text in (answer["content"], answer.get("reasoning", "")):
            text = _MARKUP.sub(" ", text[-_LOOK_CHARS:])
            if len(text) >= 2 * LOOP_WORDS and (found := repeats(text)):
                kind, at = found
                yield kind, _shown(text, at)
                return


# -- personal data -------------------------------------------------------------------------------------------------------


def _without_personal_data(conversation: Conversation) -> tuple[Conversation, list[Hit]]:
    """The conversation with tags in place of personal data, and for each kind the text around the first piece, masked."""
    found: dict[str, str] = {}

    def hide(masked: tuple[str, Counter[str]]) -> str:
        text, kinds = masked
        for kind in kinds:
            if kind not in found:
                at = max(0, text.find(TAGS[kind]) - _TEXT_CHARS // 2)
                found[kind] = " ".join(text[at : at + _TEXT_CHARS].split())
        return text

    messages = []
    for message in conversation["messages"]:
        changed: Message = {key: hide(mask(message[key])) for key in ("content", "reasoning") if key in message}
        if "tool_calls" in message:
            changed["tool_calls"] = [{**call, "arguments": hide(mask(call["arguments"]))} for call in message["tool_calls"]]
        messages.append({**message, **changed})
    tools = conversation["tools"] and hide(mask(conversation["tools"]))
    return {**conversation, "messages": messages, "tools": tools} if found else conversation, list(found.items())


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


def sketch(conversation: Conversation) -> NDArray[np.uint16]:
    """[128] MinHash values of the word 3-grams of everything but system messages and tools, which whole data sets share.

    The share of equal values estimates the Jaccard similarity of two rows (Broder, 1997) to about 0.035. Only the low 16 bits of each
    value are kept, which halves the memory and lets unequal values look equal once in 65,536.
    """
    text = "\n".join(_words_of(message) for message in conversation["messages"] if message["role"] != "system")
    words = WORD.findall(text.lower())
    hasher = RMinHash(SKETCH_VALUES, _SKETCH_SEED)
    hasher.update(map(" ".join, zip(words, words[1:], words[2:], strict=False)) if len(words) > 2 else [" ".join(words) or text.strip()])
    return np.array(hasher.digest(), np.uint32).astype(SKETCH_DTYPE)


def _words_of(message: Message) -> str:
    return " ".join([message["content"], *(call["arguments"] for call in message.get("tool_calls", ()))])
