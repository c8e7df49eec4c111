"""/v1/completions: texts and ids as they are, scored and gone on with."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.completions import parse
from tests.serve.asking import complete
from trainers.chat import Chat
from trainers.errors import UserError

TEXT = "the quick brown fox"


def test_a_text_goes_on(direct, tiny: Path) -> None:
    answer = complete(direct, TEXT)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "ft:tiny", "length")
    assert answer.choices[0].text and answer.choices[0].logprobs is None
    ids = Chat.load(tiny).text_prompt(TEXT)
    assert ids == Chat.load(tiny)._plain_text(TEXT).ids[:-1].tolist()  # as a row of text is trained
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == 8
    assert complete(direct, ids).choices[0].text == answer.choices[0].text
    assert complete(direct, TEXT, echo=True).choices[0].text.endswith(TEXT + answer.choices[0].text)


def test_several_prompts_and_choices(direct, tiny: Path) -> None:
    texts = [TEXT, "the lazy dog"]
    alone = [complete(direct, text, temperature=1, seed=1, n=2).choices for text in texts]
    together = complete(direct, texts, temperature=1, seed=1, n=2).choices
    assert [c.index for c in together] == [0, 1, 2, 3]
    assert [c.text for c in together] == [c.text for choices in alone for c in choices]
    ids = [Chat.load(tiny).text_prompt(text) for text in texts]
    assert [c.text for c in complete(direct, ids, temperature=1, seed=1, n=2).choices] == [c.text for c in together]
    streamed = [""] * 4
    for chunk in complete(direct, texts, temperature=1, seed=1, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [c.text for c in together]


def test_what_lm_evaluation_harness_asks(direct, tiny: Path) -> None:
    """The body of its `local-completions` for a log-likelihood, and how it reads the answer."""
    chat = Chat.load(tiny)
    context, whole = chat.text_prompt("the quick"), chat.text_prompt("the quick brown fox")
    assert whole[: len(context)] == context
    body = {"model": "m", "prompt": [whole, whole], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    response = httpx.post(f"{direct.url}/v1/completions", json=body, headers={"authorization": f"Bearer {direct.token}"}).json()
    for choice in sorted(response["choices"], key=lambda c: c["index"]):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(whole) + 1  # its slice leaves out the one generated token
        scores, tops = told["token_logprobs"][len(context) : -1], told["top_logprobs"][len(context) : -1]
        assert all(score < 0 for score in scores)
        assert all(score <= max(top.values()) for score, top in zip(scores, tops, strict=True))
        assert all(top[token] == score for token, score, top in zip(told["tokens"][len(context) :], scores, tops, strict=False))


def test_scoring_alone_says_what_generating_says(direct, tiny: Path) -> None:
    made = complete(direct, TEXT, logprobs=2, temperature=1, seed=9).choices[0]
    ids = Chat.load(tiny).text_prompt(TEXT)
    generated = [i for token in made.logprobs.tokens for i in _ids(tiny, token)]
    scored = complete(direct, ids + generated, max_tokens=0, echo=True, logprobs=2)
    told = scored.choices[0].logprobs
    assert scored.usage.completion_tokens == 0 and scored.choices[0].finish_reason == "length"
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.tokens[len(ids) :] == made.logprobs.tokens
    assert told.token_logprobs[len(ids) :] == pytest.approx(made.logprobs.token_logprobs, abs=0.15)  # bf16
    assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == len(ids) + len(generated)
    text = complete(direct, ids, max_tokens=0, echo=True).choices[0].text
    assert text.endswith(TEXT)


def test_offsets_find_each_token_in_the_text(direct) -> None:
    choice = complete(direct, TEXT, echo=True, logprobs=0, logit_bias={"70": 100}).choices[0]
    told = choice.logprobs
    for (start, end), token in zip(pairwise([*told.text_offset, len(choice.text)]), told.tokens, strict=True):
        assert choice.text[start:end] == token
    assert all(len(top) == 1 for top in told.top_logprobs[1:])


def test_streamed_with_echo_and_usage(direct) -> None:
    whole = complete(direct, TEXT, echo=True, logprobs=1)
    chunks = list(complete(direct, TEXT, echo=True, logprobs=1, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [t for c in chunks if c.choices for t in c.choices[0].logprobs.tokens] == whole.choices[0].logprobs.tokens
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a <|im_end|> b"}, "prompt"),
        ({"prompt": [[1, 99_999]]}, "prompt"),
        ({"prompt": "x " * 3000}, "prompt"),
        ({"prompt": [5] * 2048}, "prompt"),
        ({"prompt": [[5], []]}, "prompt"),
        ({"prompt": "x", "max_tokens": 2048}, "max_tokens"),
    ],
)
def test_bad_prompts(direct, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(direct, **body)
    assert caught.value.param == param and caught.value.code == "invalid_request"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
    ],
)
def test_refusals_name_the_parameter(body: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(json.dumps({"model": "m", **body}).encode())
    assert caught.value.param is not None and caught.value.param.startswith(param) and f"`{param}" in caught.value.message


def _ids(tiny: Path, token: str) -> list[int]:
    """The id that this text is told for."""
    table = Chat.load(tiny).token_bytes.table
    said = bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token.startswith("bytes:") else token.encode()
    return [table.index(said)]
