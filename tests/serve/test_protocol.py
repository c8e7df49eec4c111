from __future__ import annotations

import json
from typing import Any

import pytest

from serve.protocol import parse
from trainers.errors import UserError

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def body(**fields: Any) -> bytes:
    return json.dumps({**BASE, **fields}).encode()


def test_defaults_and_unknown_keys() -> None:
    request = parse(body(reasoning_effort="low", metadata={"a": "b"}, user="me", store=False))
    assert (request.limit, request.temperature, request.top_p, request.stops, request.n, request.stream) == (None, 1, 1, (), 1, False)


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(("temperature", "stop", "n", "stream", "max_tokens", "tools", "logprobs", "seed", "stream_options"))
    assert parse(body(**nulls)) == parse(body())


def test_values() -> None:
    request = parse(body(max_tokens=5, max_completion_tokens=7, temperature=0, stop="x", seed=-1, stream_options={"include_usage": True}))
    assert (request.limit, request.temperature, request.stops) == (7, 0, ("x",))
    assert request.seed is not None and 0 <= request.seed < 2**63 and request.stream_options.include_usage
    assert parse(body(stop=["a", "b"])).stops == ("a", "b")
    parse(body(tools=[], response_format={"type": "text"}, logprobs=False, frequency_penalty=0, presence_penalty=0.0, logit_bias={}))


def test_message_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(body(messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts, "name": "ann"}]))
    assert [m.plain() for m in request.messages] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content"),
    ],
)
def test_refusals_name_the_parameter(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(body(**fields))
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert f"`{param}" in caught.value.message and caught.value.status == 400


@pytest.mark.parametrize("raw", [b"", b"not json", b"[1]", b"\xff"])
def test_bodies_that_are_no_object(raw: bytes) -> None:
    with pytest.raises(UserError, match="not a JSON object"):
        parse(raw)


def test_missing_keys() -> None:
    with pytest.raises(UserError, match="`messages` is missing"):
        parse(b'{"model": "m"}')
