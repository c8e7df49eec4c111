"""Calls of tools, read from what the model's own template would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.tools import Reader, call_schema, form_of, needed, opening_ids
from tests.conftest import CHATML
from trainers.chat import Chat
from trainers.errors import UserError
from trainers.template import builtin

TOOLS = json.dumps([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])


def chat_of(tiny: Path, template: str) -> Chat:
    """The tiny model's tokenizer with another template and the control tokens that it needs."""
    found = builtin(template)
    assert found is not None
    raw = json.loads((tiny / "tokenizer.json").read_text())
    known = {token["content"] for token in raw["added_tokens"]}
    for token in found.control:
        if token not in known:
            id = 1 + max(t["id"] for t in raw["added_tokens"] + [{"id": max(raw["model"]["vocab"].values())}])
            raw["added_tokens"].append(
                {"id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            )
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return Chat(json.dumps(raw), special, found.source)


CALLS = [
    {"name": "look", "arguments": '{"at": "the \\"fox\\" {x}", "n": [1, {"a": null}]}', "id": "abcdefghi"},
    {"name": "look", "arguments": "{}", "id": "123456789"},
]


def written(chat: Chat, calls: list[dict[str, Any]], said: str = "") -> str:
    """What the template writes as an answer, without the token that ends it."""
    user = {"role": "user", "content": "Hi"}
    turn = {"role": "assistant", "content": said, "tool_calls": calls}
    prompt, whole = chat.render([user], True, TOOLS), chat.render([user, turn], False, TOOLS)
    answer = whole.removeprefix(prompt)
    return answer[: next(m.start() for m in chat.control_pattern.finditer(answer) if m[0] in chat.ends)]


@pytest.mark.parametrize(("template", "num_calls"), [("chatml", 2), ("mistral", 2), ("llama3", 1)])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_a_template_writes_is_read_back(tiny: Path, template: str, num_calls: int, size: int) -> None:
    chat = chat_of(tiny, template)
    form = form_of(chat)
    assert form is not None
    reader, text = Reader(form, ["look"]), written(chat, CALLS[:num_calls])
    said, called = "", []
    for at in range(0, len(text), size):
        more, calls = reader.push(text[at : at + size])
        said, called = said + more, called + calls
    assert said + reader.end() == ""
    assert [(c.name, json.loads(c.arguments)) for c in called] == [(c["name"], json.loads(c["arguments"])) for c in CALLS[:num_calls]]
    assert len({c.id for c in called}) == num_calls
    again = [{"name": c.name, "arguments": c.arguments, "id": c.id} for c in called]
    assert "look" in written(chat, again)  # the ids that we give are ids that the template takes


def test_text_and_calls(tiny: Path) -> None:
    form = needed(chat_of(tiny, "chatml"), "tools")
    text = 'Let me see.\n<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>\nDone <tool> now. '
    for size in (1, 5, 1000):
        reader, said, called = Reader(form, ["look"]), "", 0
        for at in range(0, len(text), size):
            more, calls = reader.push(text[at : at + size])
            said, called = said + more, called + len(calls)
        assert (said + reader.end(), called) == ("Let me see.\nDone <tool> now. ", 1)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nlook\n</tool_call> and on",
        '<tool_call>\n{"name": 3}\n</tool_call>',
        '<tool_call>\n{"name": "look", "argum',
        "1 < 2 <tool",
    ],
)
def test_what_only_looks_like_a_call_is_text(tiny: Path, text: str) -> None:
    reader = Reader(needed(chat_of(tiny, "chatml"), "tools"), ["look"])
    said, calls = reader.push(text)
    assert (said + reader.end(), calls) == (text, [])


@pytest.mark.parametrize("text", ['{"answer": 3}', '{"name": "Ann", "parameters": {"age": 3}}', "{not json", 'It is {"name": "look"}.'])
def test_json_without_a_marker_is_a_call_only_by_a_known_name(tiny: Path, text: str) -> None:
    reader = Reader(needed(chat_of(tiny, "llama3"), "tools"), ["look"])
    said, calls = reader.push(text)
    assert (said + reader.end(), calls) == (text, [])


def test_templates_without_tools(tiny: Path) -> None:
    assert form_of(Chat.load(tiny)) is None
    with pytest.raises(UserError, match="knows no tools") as caught:
        needed(Chat.load(tiny), "tools")
    assert caught.value.param == "tools" and "chatml" in caught.value.remedy
    xml = CHATML.replace("{{ message['content'] }}", "").replace(
        "message['content']", "message['content'] ~ ('<f>' if message.tool_calls else '') ~ (tools | string if tools else '')"
    )
    assert form_of(Chat.load(tiny, xml)) is None  # it shows tools, but writes calls in no form that we can read


@pytest.mark.parametrize("template", ["chatml", "mistral", "llama3"])
def test_a_forced_call_goes_on_where_the_prompt_ends(tiny: Path, template: str) -> None:
    chat = chat_of(tiny, template)
    form = needed(chat, "tools")
    prompt = chat.prompt([{"role": "user", "content": "Hi"}], TOOLS)
    opened = chat.tokenizer.decode(prompt + opening_ids(chat, form), skip_special_tokens=False)
    assert written(chat, CALLS[:1]).startswith(opened.removeprefix(chat.tokenizer.decode(prompt, skip_special_tokens=False)))
    reader = Reader(form, ["look"], opened=True)
    _, [call] = reader.push('{"name": "look", "' + form.arguments + '": {"a": 1}}')
    assert (call.name, call.arguments, reader.end()) == ("look", '{"a": 1}', "")


def test_grammar_of_forced_calls(tiny: Path) -> None:
    form = needed(chat_of(tiny, "chatml"), "tools")
    parameters = {"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "string"}}}
    one = json.loads(call_schema(form, [{"name": "f", "parameters": parameters}]))
    assert one["properties"]["name"] == {"const": "f"} and one["required"] == ["name", "arguments"]
    assert one["properties"]["arguments"]["properties"]["p"]["$ref"] == "#/properties/arguments/$defs/P"
    two = json.loads(call_schema(form, [{"name": "g"}, {"name": "f", "parameters": parameters}]))
    assert two["anyOf"][1]["properties"]["arguments"]["properties"]["p"]["$ref"] == "#/anyOf/1/properties/arguments/$defs/P"
    assert two["anyOf"][0]["properties"]["arguments"] == {"type": "object"}
