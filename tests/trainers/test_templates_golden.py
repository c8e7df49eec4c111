"""Built-in templates, token for token, against what the models' own published templates give (tests/golden/make.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.fetch import tokenizer_of
from trainers.chat import Chat
from trainers.errors import TemplateError
from trainers.proof import Claim, prove_all
from trainers.template import Ask, Template, builtin, builtin_names

GOLDEN = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (Path(__file__).parents[1] / "golden").glob("*.json")}
CASES = [(name, case) for name, golden in GOLDEN.items() for case in golden["cases"]]
OURS = {("alpaca", "system"), ("alpaca", "multi_turn")}  # Stanford's format has neither; ours extends it


def ask(case: dict[str, Any], stop: int | None, generation_prompt: bool) -> Ask:
    """The first `stop` messages as templates read them."""

    def call(c: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": {"name": c["name"], "arguments": json.loads(c["arguments"])}, "id": c["id"]}

    messages = [{**m, "tool_calls": [call(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in case["messages"]]
    return Ask(messages[:stop], json.loads(case["tools"]) if "tools" in case else None, generation_prompt)


def test_every_template_has_its_golden_file() -> None:
    assert set(GOLDEN) == set(builtin_names())
    assert all(set(golden["cases"]) == {"single", "system", "multi_turn", "tools"} for golden in GOLDEN.values())


@pytest.mark.parametrize(("name", "case"), CASES)
def test_text_is_the_published_one(name: str, case: str) -> None:
    golden = GOLDEN[name]
    wanted = golden["cases"][case]
    known = builtin(name)
    assert known
    text, prompt = Template(known.source, golden["special"]).render([ask(wanted, None, False), ask(wanted, -1, True)])
    if "refused" in wanted:
        assert isinstance(text, TemplateError) != ((name, case) in OURS)
    else:
        assert text == wanted["text"]
        assert prompt == wanted["prompt"]


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_the_published_ones(name: str) -> None:
    golden = GOLDEN[name]
    chat = Chat.load(tokenizer_of(golden["tokenizer"]), name)
    for case, wanted in golden["cases"].items():
        if "refused" in wanted:
            continue
        assert chat.prompt(wanted["messages"][:-1], wanted.get("tools")) == wanted["prompt_ids"], case
        example = chat.examples([{"messages": wanted["messages"], "tools": wanted.get("tools")}])[0]
        assert isinstance(example, list) and example[-1].ids.tolist() == wanted["ids"], case
        assert wanted["ids"][: len(wanted["prompt_ids"])] == wanted["prompt_ids"]


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_trained_is_proven(name: str) -> None:
    golden = GOLDEN[name]
    chat = Chat.load(tokenizer_of(golden["tokenizer"]), name)
    cases = [{"messages": c["messages"], "tools": c.get("tools")} for c in golden["cases"].values() if "refused" not in c]
    made = chat.examples(cases)
    claims = [Claim("x:1", case, examples) for case, examples in zip(cases, made, strict=True) if isinstance(examples, list)]
    assert len(claims) == len(cases)
    for every in (1, 128):
        assert prove_all(chat, [*claims, *claims], "assistant", every=every) == [None] * 2 * len(claims)


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    ("messages", "takes"),
    [
        ([USER, {**ASSISTANT, "tool_calls": [{**CALL, "id": "x" * 9}]}], {"chatml"}),  # text beside a call, which the others would lose
        ([USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "x" * 9}] * 2}], {"chatml", "mistral"}),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], {"chatml", "llama3"}),  # a call without an id
        ([USER, USER], {"chatml", "llama3"}),
        ([ASSISTANT], {"chatml", "llama3"}),
        ([{"role": "critic", "content": "x"}], set()),
    ],
)
def test_what_a_format_cannot_say_is_refused(name: str, messages: list[dict[str, Any]], takes: set[str]) -> None:
    known = builtin(name)
    assert known
    [answer] = Template(known.source, GOLDEN[name]["special"]).render([Ask(messages, None, False)])
    assert isinstance(answer, str) == (name in takes), answer


def test_mistral_takes_the_end_of_longer_call_ids() -> None:
    known = builtin("mistral")
    assert known
    calls = [{**CALL, "id": "call_0123456789"}]
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "call_0123456789"},
    ]
    assert Template(known.source, GOLDEN["mistral"]["special"]).render([Ask(messages, None, False)]) == [
        '<s>[INST] q[/INST][TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}]</s>'
        '[TOOL_RESULTS] {"content": 1, "call_id": "123456789"}[/TOOL_RESULTS]'
    ]
