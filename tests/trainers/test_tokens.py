"""Both backends give the same ids, and ids say what was said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.tokens import Encoder, TokenBytes, parity

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\t",
            "1",
            "23",
            "٣",
            "½",
            "a",
            "it's",
            "S",
            "é",
            "e\u0301",
            "你",
            "👋🏽",
            ".",
            "!?",
            "\u00a0",
            "<filename>",
            "<|im_end|>",
        ]
    ),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module", params=["tiny", "smollm"])
def tokenizer_json(request: pytest.FixtureRequest) -> str:
    return (request.getfixturevalue(request.param) / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def encoders(tokenizer_json: str) -> tuple[Encoder, Encoder]:
    return Encoder(tokenizer_json), Encoder(tokenizer_json, "fastokens")


@pytest.fixture(scope="module")
def token_bytes(tokenizer_json: str) -> TokenBytes:
    return TokenBytes(tokenizer_json)


@settings(max_examples=400)
@given(texts=st.lists(TEXTS, max_size=6))
def test_the_fast_tokenizer_gives_the_reference_s_ids(encoders: tuple[Encoder, Encoder], texts: list[str]) -> None:
    reference, fast = encoders
    for encoder in encoders:
        ids, offsets = encoder.encode_all(texts)
        assert ids.dtype == np.int32 and offsets.dtype == np.int64 and len(offsets) == len(texts) + 1
        for i, text in enumerate(texts):
            assert ids[offsets[i] : offsets[i + 1]].tolist() == encoder.encode(text) == reference.encode(text)
    assert fast.backend == "fastokens"


@settings(max_examples=300)
@given(text=TEXTS, data=st.data())
def test_ids_say_their_text_and_no_other(
    token_bytes: TokenBytes, encoders: tuple[Encoder, Encoder], text: str, data: st.DataObject
) -> None:
    ids = np.array(encoders[0].encode(text), np.int32)
    said = token_bytes.say(ids.tolist())
    assert token_bytes.says(ids, said) and (said == text.encode() or set(said) < set(text.encode()))  # SmolLM2 lacks a few bytes
    if len(ids):
        at = data.draw(st.integers(0, len(ids) - 1))
        other = data.draw(st.integers(0, len(token_bytes.table) - 1))
        changed = ids.copy()
        changed[at] = other
        assert token_bytes.says(changed, said) == (token_bytes.say(changed.tolist()) == said)
        byte = data.draw(st.integers(0, len(said) - 1)) if said else None
        if byte is not None:
            assert not token_bytes.says(ids, said[:byte] + bytes([said[byte] ^ 1]) + said[byte + 1 :])
    assert not token_bytes.says(ids, said + b"x")


def test_long_tokens_are_compared_to_their_last_byte(smollm: Path) -> None:
    token_bytes = TokenBytes((smollm / "tokenizer.json").read_text())
    longest = int(np.argmax(token_bytes.sizes))
    said = token_bytes.table[longest]
    assert len(said) > 16 and token_bytes.says(np.array([longest], np.int32), said)
    for at in range(len(said)):
        assert not token_bytes.says(np.array([longest], np.int32), said[:at] + b"\0" + said[at + 1 :])


def test_parity_says_why_not(smollm: Path) -> None:
    source = (smollm / "tokenizer.json").read_text()
    assert parity(source, ["Hello"]) is None
    config = json.loads(source)
    config["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False  # "123" in one piece: rare enough to read the same elsewhere
    config["model"]["dropout"] = 0.5
    assert "fastokens" in str(parity(json.dumps(config), ["the quick brown fox " * 50]))
    broken = {**json.loads(source), "model": {**json.loads(source)["model"], "type": "Unheard"}}
    with pytest.raises(Exception, match=r"."):
        Encoder(json.dumps(broken))


def _sentencepiece(normalizer: object, pre_tokenizer: object) -> str:
    """A small vocabulary made the way SentencePiece makes them: a mark for each space, bytes for what is unknown."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefgh", "▁a", "ab"])
    }
    added = [
        {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for t, i in list(vocab.items())[:3]
    ]
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": [["▁", "a"], ["a", "b"]],
        "byte_fallback": True,
        "unk_token": "<unk>",
        "fuse_unk": True,
    }
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "model": model,
            "decoder": decoder,
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
    )


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SCHEMES = {
    "prepended by the normaliser": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}, None),
    "first": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "always": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}),
    "never": (REPLACE, None),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_space_is_put_where_the_whole_text_has_one(scheme: str) -> None:
    """Pieces encoded apart, each for its place, are what the tokenizer makes of the whole."""
    from tokenizers import Tokenizer

    source = _sentencepiece(*SCHEMES[scheme])
    encoder, token_bytes = Encoder(source), TokenBytes(source)
    whole = Tokenizer.from_str(source)
    for text in ("ab a", "a", " b", "é a"):
        one, two = whole.token_to_id("<s>"), whole.token_to_id("</s>")
        pieces = [*encoder.encode(text, "start"), one, *encoder.encode(text, "after"), *encoder.encode(" cab", "continue"), two]
        assert pieces == whole.encode(f"{text}<s>{text} cab</s>", add_special_tokens=False).ids
        for place in ("start", "after", "continue"):
            assert token_bytes.say(encoder.encode(text, place)) == encoder.said(text, place)
