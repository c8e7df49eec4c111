"""Text -> token ids, always as plain text: a special string inside it (`<filename>`) is read as the characters it is.

Two backends give the same ids: `hf`, the tokenizers library, is the reference; `fastokens` is many times faster, but diverges on
some tokenizers, so it is used for a data set only where `parity` finds no difference on a sample of that very data.
"""

from __future__ import annotations

import functools
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from trainers.errors import TemplateError

Backend = Literal["hf", "fastokens"]
Place = Literal["start", "after", "continue"]
PLACES: tuple[Place, ...] = ("start", "after", "continue")

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_SHORT = 1024  # characters; shorter texts repeat (system prompts, the template's own words) and are remembered

# Strings that tell tokenizers apart: white space of all kinds, digits, contractions, scripts, combining marks, emoji, code.
_NASTY = (
    "",
    " ",
    "\n",
    " \n\n  \t x",
    "a  b   c\u00a0d\u2003e\r\nf",
    "it's I'LL we'd 'S '' ''' don’t",
    "1 12 123 1234 12345 3.14159 1,000,000 ١٢٣ ½ Ⅻ ² 一二三",
    " 1  2\t3\n4 a1b22c333",
    "Grüße, naïve façade, e\u0301 é, ﬁ ﷺ Å Å",
    "你好，世界。こんにちは 안녕하세요 สวัสดี नमस्ते שלום مرحبا",
    "👩‍👩‍👧‍👦 👋🏽 🇩🇪 ☺️ \U0001f9d1\u200d\U0001f680",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # $%^&*()_+-=[]|\\:;<>,./?`~\n\n\n",
    "https://example.org/a?b=c&d=%20#e  <a href='x'>&nbsp;</a>",
    "<|im_start|> <|endoftext|> <s> </s> [INST] <filename> <think> <|",
    "ALLCAPS CamelCase snake_case kebab-case ﷽ " + "word " * 50,
    "a" * 300 + "!" * 300 + " " * 300 + "\n" * 50,
)


class Encoder:
    """One tokenizer.json in one backend. Thread-safe.

    Where a text stands can matter: vocabularies made by SentencePiece put a space before a text at the `start` of all, or `after` a
    control token, that one which `continue`s another (the answer after `[/INST]`, say) must not get.
    """

    def __init__(self, tokenizer_json: str, backend: Backend = "hf") -> None:
        self.backend: Backend = backend
        config = json.loads(tokenizer_json)
        self._normaliser_type = (config.get("normalizer") or {}).get("type")
        self._metaspace = _metaspace(config)
        self._byte_level = (config.get("decoder") or {}).get("type") == "ByteLevel"
        readers: dict[str, _Reader] = {}
        self._readers: dict[Place, _Reader] = {}
        for place in PLACES:
            changed = _placed(config, place)
            form = json.dumps(changed)
            if form not in readers:
                same = all(config.get(key) == value for key, value in changed.items())
                readers[form] = _reader(tokenizer_json if same else json.dumps({**config, **changed}), backend)
            self._readers[place] = readers[form]
        self._same_everywhere = len(readers) == 1
        self._always_literal = self._byte_level and self._same_everywhere and self._normaliser_type is None
        self._encode_short = functools.lru_cache(maxsize=4096)(self._encode)

    def encode(self, text: str, place: Place = "after") -> list[int]:
        """Ids of one text."""
        return self._encode_short(text, place) if len(text) <= _SHORT else self._encode(text, place)

    def _encode(self, text: str, place: Place) -> list[int]:
        return self._readers[place].encode(text)

    def encode_all(self, texts: list[str], places: list[Place] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts: (ids int32 [N], offsets int64 [len(texts) + 1]); text i has ids[offsets[i]:offsets[i + 1]]."""
        if self._same_everywhere or places is None:
            return self._readers["after"].encode_all(texts)
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
        for place in set(places):
            chosen = [i for i, other in enumerate(places) if other == place]
            ids, offsets = self._readers[place].encode_all([texts[i] for i in chosen])
            for i, start, stop in zip(chosen, offsets, offsets[1:], strict=False):
                found[i] = ids[start:stop]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(ids) for ids in found], out=offsets[1:])
        return np.concatenate([np.zeros(0, np.int32), *found]), offsets

    def is_literal(self, text: str) -> bool:
        """Whether the ids of `text` plainly say `text`: byte-level, and nothing for a normaliser to change."""
        if self._always_literal:
            return True
        if not self._byte_level or not self._same_everywhere:
            return False
        kind = self._normaliser_type
        return text.isascii() or (kind in ("NFC", "NFKC") and unicodedata.is_normalized(kind, text))

    def said(self, text: str, place: Place) -> bytes:
        """What the ids of `text` must say: the text after the normaliser, with SentencePiece's marks for spaces."""
        text = self._readers[place].normalise(text)
        if self._metaspace:
            text = text.replace(" ", _SPACE)
            prepended = {"always": ("start", "after"), "first": ("start",)}.get(self._metaspace["prepend_scheme"], ())
            if text and place in prepended and not text.startswith(_SPACE):
                text = _SPACE + text
        return text.encode()


@functools.lru_cache(maxsize=16)
def _reader(tokenizer_json: str, backend: Backend) -> _Reader:
    """One per process: building a tokenizer takes a tenth of a second and more."""
    return _Reader(tokenizer_json, backend)


@functools.lru_cache(maxsize=8)
def whole_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The tokenizer as it is, special strings read as special. Shared: not to be changed."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class _Reader:
    """One tokenizer in one backend, as it reads a text at one place."""

    def __init__(self, tokenizer_json: str, backend: Backend) -> None:
        self._fast: Any = None
        if backend == "fastokens":
            import fastokens

            self._fast = fastokens.Tokenizer.from_json_str(_fused(tokenizer_json))
            self._reference = _reader(tokenizer_json, "hf")._reference
            return
        self._reference = Tokenizer.from_str(tokenizer_json)
        self._reference.encode_special_tokens = True
        self._reference.no_truncation()
        self._reference.no_padding()

    def encode(self, text: str) -> list[int]:
        if self._fast is not None:
            with suppress(ValueError):  # a byte that the vocabulary lacks; the reference drops it, and the proof will name it
                return self._fast.encode(text, split_special_tokens=True).ids
        return self._reference.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is not None:
            with suppress(ValueError):
                ids, offsets = self._fast.encode_batch_flat(texts, split_special_tokens=True)
                return np.frombuffer(ids, np.int32), np.frombuffer(offsets, np.int64)
        found = [e.ids for e in self._reference.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(ids) for ids in found], out=offsets[1:])
        return np.fromiter((i for ids in found for i in ids), np.int32, count=int(offsets[-1])), offsets

    def normalise(self, text: str) -> str:
        normaliser = self._reference.normalizer
        return normaliser.normalize_str(text) if normaliser else text


def parity(tokenizer_json: str, texts: list[str]) -> str | None:
    """Why `fastokens` must not be used for these texts, or None where it gives the reference's ids on every one of them."""
    try:
        import fastokens  # noqa: F401
    except ImportError:
        return "fastokens is not installed"
    try:
        fast = Encoder(tokenizer_json, "fastokens")
    except Exception as error:  # it refuses tokenizers that it does not know, with errors of many kinds
        return f"fastokens cannot read this tokenizer ({str(error).splitlines()[0][:100]})"
    texts = [*_NASTY, *texts]
    (ids, offsets), (wanted, wanted_offsets) = fast.encode_all(texts), Encoder(tokenizer_json).encode_all(texts)
    if np.array_equal(ids, wanted) and np.array_equal(offsets, wanted_offsets):
        return None
    for i, text in enumerate(texts):
        if not np.array_equal(ids[offsets[i] : offsets[i + 1]], wanted[wanted_offsets[i] : wanted_offsets[i + 1]]):
            shown = text if len(text) <= 40 else text[:37] + "..."
            return f"fastokens reads {json.dumps(shown, ensure_ascii=False)} otherwise than the tokenizers library"
    return None


class TokenBytes:
    """What each id of a vocabulary says, as bytes."""

    def __init__(self, tokenizer_json: str) -> None:
        """Raises TemplateError for a vocabulary where that is no fact of the id alone."""
        self.table = _byte_table(tokenizer_json)
        self.sizes = np.array([len(said) for said in self.table], np.int32)
        """Bytes of each id, int32 [vocabulary]."""
        width = -(-int(self.sizes.max(initial=1)) // 8) * 8
        self._words = np.frombuffer(b"".join(said.ljust(width, b"\0") for said in self.table), "<u8").reshape(len(self.table), -1)

    def say(self, ids: Sequence[int]) -> bytes:
        """What these ids say, one after the other."""
        return b"".join(map(self.table.__getitem__, ids))

    def says(self, ids: np.ndarray, said: bytes) -> bool:
        """Whether `say(ids) == said`, for very many ids: each token is compared with its place in `said`, eight bytes at a time."""
        sizes = self.sizes[ids]
        starts = np.cumsum(sizes) - sizes
        if int(sizes.sum(dtype=np.int64)) != len(said):
            return False
        words_at = np.ndarray(len(said) + 1, "<u8", said + bytes(8), strides=(1,))  # the eight bytes from each place on
        for word in range(self._words.shape[1]):
            if word:  # few tokens are that long
                longer = np.flatnonzero(sizes > 8 * word)
                ids, starts, sizes = ids[longer], starts[longer], sizes[longer]
            if not np.array_equal(words_at[starts + 8 * word] & _LOW_BYTES[np.minimum(sizes - 8 * word, 8)], self._words[ids, word]):
                return False
        return True


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer_json: str) -> TokenBytes:
    """One per process and vocabulary."""
    return TokenBytes(tokenizer_json)


_LOW_BYTES = np.array([256**n - 1 for n in range(9)], np.uint64)


def _byte_table(tokenizer_json: str) -> list[bytes]:
    config = json.loads(tokenizer_json)
    tokenizer = whole_tokenizer(tokenizer_json)
    byte_level = (config.get("decoder") or {}).get("type") == "ByteLevel"
    if not byte_level and config["model"].get("type") not in ("BPE", "Unigram"):
        raise TemplateError("This kind of tokenizer cannot be proven to say what was said.", "Choose another base model.")
    to_byte = _byte_of_character()
    table = [b""] * (1 + max(tokenizer.get_vocab().values()))
    for token, id in tokenizer.get_vocab().items():
        if byte_level and all(c in to_byte for c in token):
            table[id] = bytes(to_byte[c] for c in token)
        elif not byte_level and _BYTE_TOKEN.fullmatch(token):
            table[id] = bytes([int(token[3:5], 16)])
        else:
            table[id] = token.encode()
    for id, token in tokenizer.get_added_tokens_decoder().items():
        table[id] = token.content.encode()
    return table


def one_core() -> None:
    """Keep this process's tokenizers on its own core; call before the first text is encoded."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _placed(config: dict[str, Any], place: Place) -> dict[str, Any]:
    """The parts of a tokenizer that make it read a text alone as it reads it at this place."""
    parts = json.loads(json.dumps({key: config.get(key) for key in ("normalizer", "pre_tokenizer")}))
    if place == "continue":
        normaliser = parts["normalizer"] or {}
        if normaliser.get("type") == "Prepend":
            parts["normalizer"] = None
        elif "normalizers" in normaliser:
            normaliser["normalizers"] = [n for n in normaliser["normalizers"] if n["type"] != "Prepend"]
    if (metaspace := _metaspace(parts)) and place != "start" and (place == "continue" or metaspace["prepend_scheme"] == "first"):
        metaspace["prepend_scheme"] = "never"
    return parts


def _metaspace(config: dict[str, Any]) -> dict[str, Any] | None:
    """The pre-tokenizer that marks spaces, where there is one."""
    pre = config.get("pre_tokenizer") or {}
    return next((p for p in [pre, *pre.get("pretokenizers", [])] if p.get("type") == "Metaspace"), None)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each byte; printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    assert set(alphabet) == set(ByteLevel.alphabet())
    return alphabet


# Single digits apart, then GPT-2's pattern, as one pattern: white space before a digit ends with it.
_DIGITS_THEN_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def _fused(tokenizer_json: str) -> str:
    """The same tokenizer, its two splitting passes (digits, then GPT-2's pattern) written as one, which fastokens runs twice as fast."""
    config = json.loads(tokenizer_json)
    passes = (config.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if [p["type"] for p in passes] != ["Digits", "ByteLevel"] or not passes[0]["individual_digits"] or not passes[1]["use_regex"]:
        return tokenizer_json
    split = {"type": "Split", "pattern": {"Regex": _DIGITS_THEN_GPT2}, "behavior": "Isolated", "invert": False}
    config["pre_tokenizer"]["pretokenizers"] = [split, {**passes[1], "use_regex": False}]
    return json.dumps(config)
