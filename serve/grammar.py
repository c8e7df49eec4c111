"""Answers of a given form: what a JSON schema lets a model say next, token by token.

llguidance reads the schema and computes which tokens may come. A schema that it cannot follow to the letter is refused: an answer
that was promised to fit must fit. Compiling is for a thread beside the one that decodes; its size is bounded, here and in the library.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from decimal import Decimal

import llguidance
import numpy as np
import torch

from serve.text import pieces
from trainers.chat import Chat
from trainers.errors import UserError

MOST_CHARACTERS = 256_000
"""Of a schema: about a third of a second to compile."""
MOST_DEPTH = 64
MOST_REPEATS = 10_000
"""Of an item or a part of a pattern. The library would take minutes and gigabytes for a billion."""
MOST_NESTED_REPEATS = 100_000
MOST_KEPT = 64
MOST_KEPT_CHARACTERS = 4_000_000
WHITE_SPACE = r"(\n[ \t]{0,40}|[ \t])"  # at each place where JSON allows it, once: a small model would else write spaces for ever

_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=100000, step_max_items=100_000, max_grammar_size=500_000, verbose_errors=False
)


class Follower:
    """One answer's way through its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self, stop_ids: frozenset[int]) -> torch.Tensor:
        """Which tokens may come now: bool, as long as the vocabulary. The ids that end an answer may only once it is complete.

        Raises UserError where no token may come, or finding them out takes too long.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(self._vocab_size, bool)
        found = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        allowed[: len(found)] = found
        allowed[list(stop_ids)] = self._matcher.is_accepting()
        if not allowed.any():
            raise UserError("No token of this model's vocabulary continues the answer in the form asked for.", _LOOSEN, "response_format")
        return torch.from_numpy(allowed)

    def take(self, id: int) -> None:
        """A token that does not end the answer was chosen."""
        self._matcher.consume_token(id)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Nothing more may come."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            cause = _first_line(self._matcher.get_error())
            if cause == "NoExtensionBias":  # the library's word for a form without any text
                raise UserError("Nothing fits the form asked for.", _LOOSEN, "response_format")
            raise UserError(f"The form asked for is too complex to follow: {cause}.", _LOOSEN, "response_format")


_LOOSEN = "Ask for a simpler form."


class Grammars:
    """Compiled grammars over one vocabulary, the most recently used ones kept. Thread-safe."""

    def __init__(self, chat: Chat, vocab_size: int) -> None:
        self._chat = chat
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def follow(self, json_schema: str) -> Follower:
        """A follower at the beginning. Raises UserError for what cannot be compiled."""
        with self._lock:
            if matcher := self._kept.get(json_schema):
                self._kept.move_to_end(json_schema)
        if matcher is None:
            matcher = self._compile(json_schema)
            with self._lock:
                self._kept[json_schema] = matcher
                while len(self._kept) > MOST_KEPT or sum(map(len, self._kept)) > MOST_KEPT_CHARACTERS:
                    self._kept.popitem(last=False)
        return Follower(matcher.deep_copy(), self._vocab_size)

    @functools.cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(_Vocabulary(self._chat), n_vocab=self._vocab_size)  # type: ignore[arg-type]

    def _compile(self, json_schema: str) -> llguidance.LLMatcher:
        if len(json_schema) > MOST_CHARACTERS:
            raise _refusal(f"it has {len(json_schema):,} characters, more than {MOST_CHARACTERS:,}")
        try:
            source = _grammar(json_schema)
        except (ValueError, RecursionError) as error:
            raise _refusal(_first_line(str(error))) from None
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(_first_line(matcher.get_error()))
        Follower(matcher, self._vocab_size).allowed(frozenset())  # the first look takes longest, and copies know what it found
        return matcher


def _grammar(json_schema: str) -> str:
    schema = json.loads(json_schema)
    if not isinstance(schema, dict):
        raise ValueError("it must be a JSON object")
    _refuse_costly(schema)
    schema.pop("x-guidance", None)  # the library's own options are ours to set
    options: llguidance._lib.JsonCompileOptions = {"whitespace_pattern": WHITE_SPACE}
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)


_COUNTS = {"minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties", "minLength", "maxLength"}
_REPEAT = re.compile(r"(\)?)\{(\d+)(?:,(\d*))?\}")


def _refuse_costly(schema: object) -> None:
    """Raises ValueError for what compiles slowly although it is short."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        below: list[object] = []
        for value in level:
            if isinstance(value, list):
                below += value
            elif isinstance(value, dict):
                below += value.values()
                for key, bound in value.items():
                    _refuse_costly_pattern(key)  # those of patternProperties; other names are no patterns, and pass
                    if key == "pattern" and isinstance(bound, str):
                        _refuse_costly_pattern(bound)
                    if key in _COUNTS and isinstance(bound, int | float) and bound > MOST_REPEATS:
                        raise ValueError(f"{key} is {bound}, more than {MOST_REPEATS:,}")
                    if key == "multipleOf" and isinstance(bound, int | float) and _significant(bound) > MOST_REPEATS:
                        raise ValueError(f"multipleOf {bound} has too many digits: at most {MOST_REPEATS:,} without its zeros")
        level = below


def _refuse_costly_pattern(pattern: str) -> None:
    nested, longest = 1, 1
    for closes, low, high in _REPEAT.findall(pattern):
        times = int((high or low)[:12])
        nested, longest = (nested * max(times, 1), longest) if closes else (nested, max(longest, times))
    if longest > MOST_REPEATS or nested * longest > MOST_NESTED_REPEATS:
        raise ValueError(f"the pattern {pattern[:50]!r} repeats too often: at most {MOST_REPEATS:,} times, {MOST_NESTED_REPEATS:,} nested")


def _significant(number: float) -> int:
    digits = Decimal(repr(number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)))


def _refusal(why: str) -> UserError:
    return UserError(
        f"The JSON schema cannot be compiled: {why}.",
        "Answers can be held to type, properties, required, items, enum, const, anyOf, $ref inside the schema, bounds and patterns.",
        "response_format",
    )


def _first_line(text: str) -> str:
    """The library's words for one line of an error: a pattern's errors say what is wrong in their last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["unknown"]
    return lines[-1].removeprefix("error: ").rstrip(".")[:300] if lines[0].startswith("regex parse error") else lines[0].rstrip(".")[:300]


class _Vocabulary(llguidance.TokenizerWrapper):
    """A model's tokens as llguidance wants them. Special tokens are never part of a form."""

    def __init__(self, chat: Chat) -> None:
        table = pieces(chat)
        special = {id for id, token in chat.tokenizer.get_added_tokens_decoder().items() if token.special}
        silent = {id for id, said in enumerate(table) if not said}
        self.eos_token_id = chat.eos_id
        self.bos_token_id = None
        self.tokens = [said or f"<unused {id}>".encode() for id, said in enumerate(table)]
        self.special_token_ids = sorted(special | silent)
        self.is_tokenizer_wrapper = True
        self._encode = chat.encoder.encode

    def __call__(self, text: str | bytes) -> list[int]:  # type: ignore[override]
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"), "continue")
