"""What a row means: every layout that users of other trainers have becomes the same messages, and what cannot is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainers.formats import REQUIRED, SHAPES, Bad, check_columns, detect, normalise, rename, suggest

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WEATHER = {"name": "weather", "description": "Now", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"name": "weather", "arguments": '{"city": "Zürich"}'}


def of(row: dict[str, Any], format: str | None = None) -> list[dict[str, Any]]:
    return normalise(row, format or str(detect(row)))["messages"]


def messages(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


# -- layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", REQUIRED)
def test_the_row_that_errors_show_for_a_format_is_one(format: str) -> None:
    row = json.loads(SHAPES[format].replace(", ...]", ', {"role": "assistant", "content": [{"text": "..."}]}]'))
    assert detect(row) == format
    assert normalise(row, format)["messages"][-1] == {"role": "assistant", "content": "..."}


SAME = {
    "messages": messages(USER, ANSWER),
    "messages as text": {"messages": json.dumps([USER, ANSWER])},
    "messages with other keys": messages({**USER, "id": 3}, {**ANSWER, "refusal": None, "tool_calls": None}, parallel_tool_calls=True),
    "from and value under messages": messages({"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}),
    "roles in capitals": messages({"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}),
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "sharegpt with other keys": {"conversations": [{"from": "user", "value": "q", "x": 1}, {"from": "chatgpt", "value": "a"}], "id": "1"},
    "conversations of role and content": {"conversations": [USER, ANSWER], "system": ""},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "text": "rendered"},
    "alpaca without input": {"instruction": "q", "output": "a"},
    "alpaca with a blank input": {"instruction": "q", "input": " \n", "output": "a", "system": None, "history": []},
    "alpaca with nothing but input": {"instruction": "", "input": "q", "output": "a"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "prompt and completion as messages": {"prompt": [USER], "completion": [ANSWER]},
    "prompt as messages": {"prompt": [USER], "completion": "a"},
    "bedrock": {
        "schemaVersion": "bedrock-conversation-2024",
        "messages": [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}],
    },
    "content parts": messages({"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER),
}


@pytest.mark.parametrize("layout", SAME)
def test_layouts_mean_the_same(layout: str) -> None:
    row = SAME[layout]
    assert normalise(row, str(detect(row))) == {"messages": [USER, ANSWER], "tools": None}


def test_text_is_trained_as_it_stands() -> None:
    text = "<|im_start|>user\nq<|im_end|>\n<think>x</think>"
    assert normalise({"text": text}, "text") == {"messages": [{"role": "assistant", "content": text}], "tools": None, "text": True}


def test_alpaca_input_system_and_history() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]]}
    assert [(m["role"], m["content"]) for m in of(row)] == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]


def test_of_prompt_messages_only_the_completion_is_trained() -> None:
    row = {"prompt": [{"role": "system", "content": "S"}, USER, ANSWER, USER], "completion": [ANSWER]}
    assert [m.get("weight") for m in of(row)] == [None, None, 0, None, None]


def test_an_answer_that_looks_like_json_stays_text() -> None:
    for answer in ('[{"role": "user", "content": "x"}]', '{"a": 1}', "[1]"):
        assert of({"prompt": answer, "completion": answer}) == [
            {"role": "user", "content": answer},
            {"role": "assistant", "content": answer},
        ]


def test_roles_names_and_weights() -> None:
    row = messages(
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "q", "name": "Ana"},
        {"role": "assistant", "content": "a", "weight": 0, "name": "bot"},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "b", "weight": 1.0},
    )
    assert of(row) == [
        {"role": "system", "content": "D"},
        {"role": "user", "content": "q", "name": "Ana"},
        {"role": "assistant", "content": "a", "weight": 0, "name": "bot"},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "assistant", "content": "b", "weight": 1},
    ]
    assert type(of(row)[-1]["weight"]) is int


# -- tools -----------------------------------------------------------------------------------------------------------------

ASKS = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}
TELLS = {"role": "tool", "content": "18 °C", "tool_call_id": "c1"}

WITH_TOOLS = {
    "openai": messages(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        TELLS,
        ANSWER,
        tools=[TOOL],
    ),
    "arguments as an object, tools as text, no content": messages(
        USER,
        {"role": "assistant", "tool_calls": [{"id": "c1", "function": {**CALL, "arguments": json.loads(CALL["arguments"])}}]},
        TELLS,
        ANSWER,
        tools=json.dumps([TOOL]),
    ),
    "bare tools and calls": messages(
        USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}, TELLS, ANSWER, tools=[WEATHER]
    ),
    "bedrock": {
        "schemaVersion": "bedrock-conversation-2024",
        "toolConfig": {"tools": [{"toolSpec": {**WEATHER, "inputSchema": {"json": WEATHER["parameters"]}}}]},
        "messages": [
            {"role": "user", "content": [{"text": "q"}]},
            {"role": "assistant", "content": [{"toolUse": {"toolUseId": "c1", "name": "weather", "input": {"city": "Zürich"}}}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "c1", "content": [{"text": "18 °C"}]}}]},
            {"role": "assistant", "content": [{"text": "a"}]},
        ],
    },
}


@pytest.mark.parametrize("layout", WITH_TOOLS)
def test_tool_layouts_mean_the_same(layout: str) -> None:
    row = WITH_TOOLS[layout]
    found = normalise(row, str(detect(row)))
    assert found["messages"] == [USER, ASKS, TELLS, ANSWER]
    assert json.loads(found["tools"]) == [TOOL] and "Zürich" in found["messages"][1]["tool_calls"][0]["arguments"]
    assert list(json.loads(found["tools"])[0]["function"]) == ["name", "description", "parameters"]


def test_sharegpt_tools() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps([CALL, {"name": "f", "arguments": {}}])},
        {"from": "observation", "value": "o"},
        {"from": "gpt", "value": "a", "weight": 0},
    ]
    found = normalise({"conversations": turns, "tools": json.dumps([WEATHER]), "system": "S"}, "sharegpt")
    assert found["messages"] == [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, {"name": "f", "arguments": "{}"}]},
        {"role": "tool", "content": "o"},
        {**ANSWER, "weight": 0},
    ]
    assert json.loads(found["tools"]) == [TOOL]


def test_functions_under_their_old_name() -> None:
    row = messages(USER, {"role": "assistant", "content": None, "function_call": CALL}, functions=[WEATHER])
    found = normalise(row, "messages")
    assert found["messages"][1]["tool_calls"] == [CALL] and json.loads(found["tools"]) == [TOOL]


def test_arguments_given_as_text_are_not_rewritten() -> None:
    text = '{ "n": 123456789012345678901234567890, "b":1.0 }'
    assert (
        of(messages(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": text}]}))[1]["tool_calls"][0]["arguments"] == text
    )


@pytest.mark.parametrize("empty", [None, [], "", "[]"])
def test_no_tools_are_none(empty: Any) -> None:
    assert normalise(messages(USER, ANSWER, tools=empty), "messages")["tools"] is None


# -- reasoning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_key(key: str) -> None:
    assert of(messages(USER, {**ANSWER, key: "because"}))[1] == {**ANSWER, "reasoning": "because"}
    assert of(messages(USER, {**ANSWER, key: None}))[1] == ANSWER


@pytest.mark.parametrize(
    "row", [lambda a: {"instruction": "q", "output": a}, lambda a: messages(USER, {"role": "assistant", "content": a})]
)
def test_leading_thoughts_are_reasoning(row: Any) -> None:
    assert of(row("<think>\nbecause\n</think>\n\na"))[1] == {**ANSWER, "reasoning": "because"}
    assert of(row("<think>\n\n</think>\n\na"))[1] == ANSWER
    assert of(row("say <think>x</think>"))[1]["content"] == "say <think>x</think>"
    assert of(row("<think> never closed"))[1] == {"role": "assistant", "content": "<think> never closed"}


def test_bedrock_reasoning_system_and_results() -> None:
    row = {
        "schemaVersion": "bedrock-conversation-2024",
        "system": [{"text": "S"}, {"cachePoint": {"type": "default"}}][:1],
        "messages": [
            {"role": "user", "content": [{"text": "q"}, {"cachePoint": {"type": "default"}}]},
            {"role": "assistant", "content": [{"reasoningContent": {"reasoningText": {"text": "because"}}}, {"text": "a"}]},
            {"role": "user", "content": [{"toolResult": {"toolUseId": "1", "content": [{"json": {"ö": 1}}]}}, {"text": "and?"}]},
            {"role": "assistant", "content": [{"text": "b"}]},
        ],
    }
    assert of(row) == [
        {"role": "system", "content": "S"},
        USER,
        {**ANSWER, "reasoning": "because"},
        {"role": "tool", "content": '{"ö": 1}', "tool_call_id": "1"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "b"},
    ]


# -- columns -----------------------------------------------------------------------------------------------------------------


def test_columns_are_renamed_also_nested_and_inside_messages() -> None:
    row = {"data": {"q": "q"}, "answer": "a", "output": "other", "id": 7}
    assert rename(row, {"instruction": "data.q", "output": "answer"}) == {"data": {"q": "q"}, "output": "a", "id": 7, "instruction": "q"}
    row = {"dialog": [{"speaker": "user", "says": "q"}, {"speaker": "assistant", "says": "a", "train": False}]}
    renamed = rename(row, {"messages": "dialog", "role": "speaker", "content": "says", "weight": "train"})
    assert of(renamed) == [USER, {**ANSWER, "weight": 0}]


def test_a_name_that_the_format_does_not_know_is_refused() -> None:
    check_columns({"instruction": "q", "history": "h"}, "alpaca")
    with pytest.raises(Bad) as error:
        check_columns({"instrction": "q"}, "alpaca")
    assert error.value.what == "cannot map `instrction`: the alpaca format has no such column"
    assert error.value.remedy == "Did you mean `instruction`?"


@pytest.mark.parametrize(
    ("keys", "map"),
    [
        (["question", "answer"], "{instruction: question, output: answer}"),
        (["Instruction", "Response", "id"], "{instruction: Instruction, output: Response}"),
        (["instructions", "outputs"], "{instruction: instructions, output: outputs}"),
        (["id", "conversation"], "{messages: conversation}"),
        (["prompt", "chosen", "rejected"], "{instruction: prompt, output: chosen}"),
        (["x", "y"], "{instruction: <its question>, output: <its answer>}"),
    ],
)
def test_the_map_to_write_is_shown(keys: list[str], map: str) -> None:
    assert f"`columns: {map}`" in suggest(keys)


# -- what cannot be used -------------------------------------------------------------------------------------------------------


def asks(call: Any) -> dict[str, Any]:
    return messages(USER, {"role": "assistant", "content": None, "tool_calls": [call]})


def bedrock(*content: Any, role: Any = "assistant", **more: Any) -> dict[str, Any]:
    first = {"role": "user", "content": [{"text": "q"}]}
    return {"schemaVersion": "bedrock-conversation-2024", "messages": [first, {"role": role, "content": list(content)}], **more}


BAD = {
    "no list": (messages() | {"messages": "hello"}, "has a string as `messages`", "has no list of messages as `messages`"),
    "no messages": (messages(), "has an empty list as `messages`", "has no list of messages as `messages`"),
    "a number as message": (messages(USER, 7), "has a number as message 2", "has a message that is no object"),
    "no role": (messages(USER, {"content": "a"}), "has no `role` in message 2", "has a message without role"),
    "no content": (messages(USER, {"role": "assistant"}), "has no `content` in message 2", "has a message without content"),
    "unknown role": (messages({"role": "usr", "content": ""}), 'has the unknown role "usr" in message 1', "has an unknown role"),
    "role is a list": (messages({"role": ["user"], "content": ""}), 'has the unknown role ["user"] in message 1', "has an unknown role"),
    "number as content": (
        messages({"role": "user", "content": 5}),
        "has a number where message 1 needs text",
        "has a number where text belongs",
    ),
    "boolean as content": (messages(USER, {"role": "assistant", "content": True}), "has a boolean where message 2 needs text", None),
    "number as instruction": ({"instruction": 5, "output": "a"}, "has a number where `instruction` needs text", None),
    "number as output": ({"instruction": "q", "output": 5}, "has a number where `output` needs text", None),
    "number as input": ({"instruction": "q", "output": "a", "input": 5}, "has a number where `input` needs text", None),
    "number as value": ({"conversations": [{"from": "human", "value": 5}]}, "has a number where message 1 needs text", None),
    "number as completion": ({"prompt": "q", "completion": 5}, "has a number where `completion` needs text", None),
    "number as text": ({"text": 5}, "has a number where `text` needs text", None),
    "null": (messages(USER, {"role": "assistant", "content": None}), "has a null where message 2 needs text", None),
    "an image": (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        'has a content part in message 1 that is no text: "image_url"',
        "has a content part that is no text",
    ),
    "images beside the text": (
        {"instruction": "<image>?", "output": "a", "images": ["x.png"]},
        "has `images`, which cannot be trained",
        None,
    ),
    "empty answer": (messages(USER, {"role": "assistant", "content": " \n"}), "has an empty answer in message 2", "has an empty answer"),
    "nothing but thoughts": (
        messages(USER, {"role": "assistant", "content": "<think>x</think>"}),
        "has an empty answer in message 2",
        None,
    ),
    "reasoning twice": (
        messages(USER, {"role": "assistant", "content": "<think>x</think>a", "reasoning": "y"}),
        "has reasoning of its own and a <think> in message 2",
        "has its reasoning twice",
    ),
    "reasoning is a list": (messages(USER, {**ANSWER, "reasoning": ["x"]}), "has a list where the reasoning of message 2 needs text", None),
    "empty text": ({"text": ""}, "has an empty answer in `text`", None),
    "empty instruction": ({"instruction": "", "output": "a"}, "has an empty `instruction`", None),
    "history": ({"instruction": "q", "output": "a", "history": [["q"]]}, "has a `history` that is not a list of", None),
    "no assistant": (messages(USER), "has no assistant turn", None),
    "assistant first": (messages(ANSWER), "begins with an assistant turn", None),
    "weight": (
        messages(USER, {**ANSWER, "weight": 0.5}),
        "has a weight in message 2 that is neither 0 nor 1: 0.5",
        "has a weight other than 0 or 1",
    ),
    "weight of a user": (messages({**USER, "weight": 1}, ANSWER), "has a weight in message 1", None),
    "name is a number": (messages({**USER, "name": 5}, ANSWER), "has a number where `name` of message 1 needs text", None),
    "tool call of a user": (messages({**USER, "tool_calls": [CALL]}, ANSWER), "has a tool call in message 1", "has a misplaced tool call"),
    "call without name": (asks({"function": {"arguments": "{}"}}), "has a tool call without a function's name in message 2", None),
    "call is text": (asks("weather()"), "has a tool call without a function's name in message 2", None),
    "arguments are no JSON": (
        asks({"name": "f", "arguments": "city=x"}),
        'has tool arguments in message 2 that are no JSON object: "city=x"',
        "has tool arguments that are no JSON object",
    ),
    "arguments are NaN": (asks({"name": "f", "arguments": '{"a": NaN}'}), "has tool arguments in message 2 that are no JSON object", None),
    "arguments hold half a character": (
        asks({"name": "f", "arguments": '{"a": "\\ud800"}'}),
        "has tool arguments in message 2 that are no JSON",
        None,
    ),
    "arguments are a list": (asks({"name": "f", "arguments": []}), "has a list as tool arguments in message 2", None),
    "tools are text": (messages(USER, ANSWER, tools="weather"), "has `tools` that are no list", None),
    "tool without name": (
        messages(USER, ANSWER, tools=[{"type": "function", "function": {}}]),
        "has a tool without a name in `tools`",
        None,
    ),
    "function call is no JSON": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
        "has a tool call without a function's name in message 2",
        None,
    ),
    "other schema": (bedrock({"text": "a"}) | {"schemaVersion": "x"}, 'has an unknown schemaVersion "x"', None),
    "bedrock role": (bedrock({"text": "a"}, role="system"), "has no role `user` or `assistant` in message 2", "has an unknown role"),
    "bedrock image": (bedrock({"image": {}}), 'has a content block without text in message 2: "image"', None),
    "bedrock without content": (bedrock(), "has an empty list where message 2 needs a list", None),
    "bedrock text": (bedrock() | {"messages": ["x"]}, "has no role `user` or `assistant` in message 1", None),
    "bedrock tools": (bedrock({"text": "a"}, toolConfig={"tools": [{}]}), "has a tool without a name in `toolConfig`", None),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_used_is_named(bad: str) -> None:
    row, what, kind = BAD[bad]
    with pytest.raises(Bad) as error:
        of(row)
    assert error.value.what.startswith(what), error.value.what
    assert error.value.remedy and error.value.kind
    if kind is not None:
        assert error.value.kind == kind
    assert "message 1" not in error.value.kind and "message 2" not in error.value.kind
