"""What a chat completion can be asked for, log-probabilities, JSON forms, tools."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch

from tests.serve.asking import MESSAGES, ask, client
from trainers.chat import Chat
from trainers.records import TEMPLATE_FILE
from trainers.template import builtin

PARAMETERS = {
    "type": "object",
    "properties": {"animal": {"$ref": "#/$defs/Animal"}, "fast": {"type": "boolean"}},
    "required": ["animal", "fast"],
    "additionalProperties": False,
    "$defs": {"Animal": {"enum": ["fox", "dog"]}},
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look", "description": "Look at it.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "leave", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def with_tools(direct, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that was trained with a template that has tools."""
    folder = Path(shutil.copytree(direct.adapters[0], tmp_path_factory.mktemp("tools") / "adapter"))
    found = builtin("chatml")
    assert found is not None
    (folder / TEMPLATE_FILE).write_text(found.source)
    return str(folder)


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own(direct, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    answer = ask(direct, logprobs=True, top_logprobs=3, temperature=1.5, seed=1, logit_bias={"70": 5}).choices[0]
    told = answer.logprobs.content
    assert len(told) == 12 and b"".join(bytes(t.bytes) for t in told).decode("utf-8", "replace") == answer.message.content
    chat = Chat.load(tiny)
    ids = chat.prompt(MESSAGES)
    texts = {bytes(chat.token_bytes.table[id]): id for id in range(len(chat.token_bytes.table))}
    said = [texts[bytes(t.bytes)] for t in told]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids + said])).logits[0].float().log_softmax(-1)
    for n, (token, id) in enumerate(zip(told, said, strict=True)):
        row_V = logits_TV[len(ids) - 1 + n]
        assert math.isclose(token.logprob, row_V[id].item(), abs_tol=0.1)  # bf16, and another order of sums
        assert len(token.top_logprobs) == 3
        likeliest = [t.logprob for t in token.top_logprobs]
        assert likeliest == sorted(likeliest, reverse=True)
        assert torch.allclose(torch.tensor(likeliest), row_V.topk(3).values, atol=0.1)


def test_streamed_logprobs_are_the_whole_ones(direct) -> None:
    body: dict[str, Any] = {"logprobs": True, "top_logprobs": 2, "seed": 3, "temperature": 1, "n": 2, "stop": "the"}
    whole = ask(direct, **body)
    streamed: list[list[Any]] = [[], []]
    for chunk in ask(direct, stream=True, **body):
        for choice in chunk.choices:
            streamed[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert streamed == [c.logprobs.content for c in whole.choices]
    bare = ask(direct, logprobs=True).choices[0].logprobs.content
    assert bare and all(token.top_logprobs == [] and token.logprob < 0 for token in bare)


def test_top_k_of_one_and_bias_decide(direct) -> None:
    assert ask(direct, temperature=1, extra_body={"top_k": 1}).choices[0].message.content == ask(direct).choices[0].message.content
    only = ask(direct, logit_bias={"70": 100}, max_tokens=3, logprobs=True).choices[0].logprobs.content
    assert len({t.token for t in only}) == 1
    first = [t.token for t in ask(direct, logit_bias={"70": 5}, max_tokens=40, logprobs=True).choices[0].logprobs.content]
    tired = ask(direct, logit_bias={"70": 5}, max_tokens=40, logprobs=True, frequency_penalty=2, presence_penalty=2)
    assert len({t.token for t in tired.choices[0].logprobs.content}) > len(set(first))


def test_the_end_is_ignored_when_asked(direct) -> None:
    body = {"max_tokens": 40, "logit_bias": {"2": 100}}
    assert ask(direct, **body).usage.completion_tokens == 1
    assert ask(direct, **body, extra_body={"ignore_eos": True}).usage.completion_tokens == 40


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_schema(direct, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": PARAMETERS, "strict": True}}
    made = ask(direct, temperature=1, seed=2, max_tokens=100, response_format=form, stream=stream)
    text = "".join(c.choices[0].delta.content or "" for c in made) if stream else made.choices[0].message.content
    jsonschema.validate(json.loads(text), PARAMETERS)


def test_any_json_object(direct) -> None:
    begun = ask(direct, temperature=1, seed=5, max_tokens=30, response_format={"type": "json_object"}).choices[0]
    assert begun.message.content.lstrip().startswith("{")
    if begun.finish_reason == "stop":
        assert isinstance(json.loads(begun.message.content), dict)


def test_a_schema_that_cannot_be_compiled(direct) -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/nowhere"}}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError):
            ask(direct, response_format=form, stream=stream)
    assert ask(direct).choices[0].message.content


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_is_made_where_one_is_wanted(direct, with_tools: str, choice: Any) -> None:
    body = {"tools": TOOLS, "tool_choice": choice, "temperature": 1, "seed": 4, "max_tokens": 100}
    whole = ask(direct, with_tools, **body).choices[0]
    [call] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    named = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    assert call.function.name in (named if choice == "required" else {"look"})
    jsonschema.validate(json.loads(call.function.arguments), named[call.function.name])

    chunks = [c.choices[0] for c in ask(direct, with_tools, stream=True, **body)]
    streamed = [part for c in chunks for part in c.delta.tool_calls or []]
    assert [(s.index, s.function.name, s.function.arguments) for s in streamed] == [(0, call.function.name, call.function.arguments)]
    assert chunks[-1].finish_reason == "tool_calls" and not any(c.delta.content for c in chunks)

    said = [*MESSAGES, whole.message, {"role": "tool", "tool_call_id": call.id, "content": "It ran."}]
    after = ask(direct, with_tools, messages=said, tools=TOOLS)
    assert after.choices[0].message.role == "assistant"


def test_tools_are_shown_as_training_shows_them(direct, tiny: Path, with_tools: str) -> None:
    chat = Chat.load(tiny, Path(with_tools, TEMPLATE_FILE).read_text())
    shown, hidden = (ask(direct, with_tools, tools=TOOLS, tool_choice=choice).usage.prompt_tokens for choice in ("auto", "none"))
    assert shown == len(chat.prompt(MESSAGES, json.dumps(TOOLS))) > hidden == len(chat.prompt(MESSAGES))


def test_the_openai_clients_stream_helper(direct, with_tools: str) -> None:
    with client(direct, with_tools).chat.completions.stream(
        model="m", messages=MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=200, temperature=1, seed=4
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "tool_calls.function.arguments.done"} <= kinds
    calls = final.choices[0].message.tool_calls
    assert calls and calls[0].function.name in ("look", "leave")


def test_templates_without_tools_refuse_them(direct) -> None:
    with pytest.raises(openai.BadRequestError, match=r"knows no tools.*chatml") as caught:
        ask(direct, tools=TOOLS)
    assert caught.value.param == "tools"
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(direct, messages=[*MESSAGES, {"role": "assistant", "tool_calls": [call]}])
    assert caught.value.param == "messages[1].tool_calls"
