"""What a body of /v1/chat/completions may say."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from serve.chat_request import parse, parse_messages
from serve.engine import ANY_OBJECT
from trainers.errors import UserError

BASE: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "integer"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}, "more": 1}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}


def body(**fields: Any) -> bytes:
    return json.dumps({**BASE, **fields}).encode()


def test_defaults_and_unknown_keys() -> None:
    request = parse(body(reasoning_effort="low", metadata={"a": "b"}, user="me", store=False, prediction={"type": "content"}))
    assert (request.limit, request.temperature, request.top_p, request.stops, request.n, request.stream) == (None, 1, 1, (), 1, False)
    assert request.sampling(0, 9) == {
        "temperature": 1,
        "top_p": 1,
        "top_k": None,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "stop": (),
        "seed": None,
    }
    assert request.answer_schema is None and request.forced == []


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(("temperature", "stop", "n", "stream", "max_tokens", "tools", "logprobs", "seed", "stream_options", "functions"))
    assert parse(body(**nulls)) == parse(body())


def test_values() -> None:
    request = parse(body(max_tokens=5, max_completion_tokens=7, temperature=0, stop="x", seed=-1, stream_options={"include_usage": True}))
    assert (request.limit, request.temperature, request.stops) == (7, 0, ("x",))
    assert request.seed is not None and 0 <= request.seed < 2**63 and request.stream_options.include_usage
    assert parse(body(stop=["a", "b"])).stops == ("a", "b")
    parse(body(tools=[], response_format={"type": "text"}, logprobs=False, functions=[], modalities=["text"], min_p=0))
    how = parse(body(top_k=5, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"8": -100}, seed=2**63 - 1)).sampling(1, 9)
    assert (how["top_k"], how["frequency_penalty"], how["presence_penalty"], how["logit_bias"]) == (5, 0.5, -1, {8: -100})
    assert how["seed"] == 0  # the second choice's, and still a seed
    with pytest.raises(UserError, match="names the token 8, and this model has 8"):
        parse(body(logit_bias={"8": 1})).sampling(0, 8)


def test_message_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None, "reasoning_content": "Hm."},
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is 3.", "tool_calls": None},
    ]
    assert parse(body(messages=said)).plain() == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "ab", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Hm.",
            "tool_calls": [{"name": "look", "arguments": '{"a": 1}', "id": "call_1"}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "It is 3."},
    ]


def test_tools_are_passed_on_just_as_they_came() -> None:
    request = parse(body(tools=[TOOL]))
    assert request.tools_text is not None and json.loads(request.tools_text) == [TOOL]
    assert list(json.loads(request.tools_text)[0]["function"]["parameters"]["properties"]) == ["z", "a"]
    assert parse_messages(body(tools=[TOOL])).tools_text == request.tools_text
    other = {"type": "function", "function": {"name": "other"}}
    assert parse(body(tools=[TOOL, other])).forced == []
    assert parse(body(tools=[TOOL, other], tool_choice="required")).forced == [TOOL["function"], other["function"]]
    assert parse(body(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "other"}})).forced == [other["function"]]


def test_forms_of_answers() -> None:
    assert parse(body(response_format={"type": "json_object"})).answer_schema == ANY_OBJECT
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    assert parse(body(response_format=form)).answer_schema == orjson.dumps(SCHEMA).decode()
    assert parse(body(response_format=form, tools=[TOOL], tool_choice="none")).answer_schema


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"properties": {"x": schema}}
    return schema


def schema_form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "strnig"}}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (schema_form({"type": "strnig"}), "response_format.json_schema.schema"),
        (schema_form({"properties": 3}), "response_format.json_schema.schema"),
        (schema_form(deep(450)), "response_format.json_schema.schema"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [str(i) for i in range(10_000)]}, "stop"),
        ({"stop": ["x" * 1001]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_refusals_name_the_parameter(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(body(**fields)).plain()
    assert caught.value.param is not None and caught.value.param.startswith(param)
    assert f"`{param}" in caught.value.message and caught.value.status == 400
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "raw",
    [b"", b"not json", b"[1]", b"\xff", b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"a":' * 100_000, b'{"a": "\\ud800"}'],
)
def test_bodies_that_are_no_object(raw: bytes) -> None:
    with pytest.raises(UserError, match=r"The body is not (JSON: .+|a JSON object)"):
        parse(raw)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stop": ["x"] * 10_000}, "List should have at most 16 items after validation, not 10000"),
        ({"stop": 5}, "`stop` is 5. Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"content\[0\].type` is 'image_url'. Input should"),
        ({"tool_choice": {"type": "function"}}, "`tool_choice.function` is missing"),
    ],
)
def test_of_several_types_the_one_that_was_meant_tells_what_is_wrong(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **given}))


def test_missing_keys() -> None:
    with pytest.raises(UserError, match="`messages` is missing"):
        parse(b'{"model": "m"}')
