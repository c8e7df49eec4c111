"""The proof accepts what Chat builds, and nothing else: any changed weight or id is found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.chat import Chat, Example, Message
from trainers.errors import DataError, TemplateError
from trainers.proof import Claim, locate_answers, prove, prove_all

MESSAGES: list[Message] = [
    {"role": "system", "content": "assistant"},  # texts that look like the template's own words
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "user"},
    {"role": "user", "content": "and 你好 🙂?"},
    {"role": "assistant", "content": "skipped", "weight": 0},
    {"role": "user", "content": "assistant\n"},
    {"role": "assistant", "content": "\n Grüße\n"},
]


def masked(ids: Sequence[int] | np.ndarray, weights: Sequence[float], stop: int) -> Example:
    """An example with these weights."""
    spans = []
    for t, weight in enumerate(weights):
        if weight and spans and spans[-1][1] == t:
            spans[-1] = (spans[-1][0], t + 1)
        elif weight:
            spans.append((t, t + 1))
    return Example(np.array(ids, np.int32), tuple(spans), stop)


@pytest.fixture(scope="module", params=["tiny", "smollm"])
def chat(request: pytest.FixtureRequest) -> Chat:
    return Chat.load(request.getfixturevalue(request.param))


def test_right_masks_pass(chat: Chat) -> None:
    for train_on in ("assistant", "last_assistant"):
        prove(chat, MESSAGES, chat.example(MESSAGES, train_on), train_on, "a.jsonl:3")


def test_answers_are_located_by_characters(chat: Chat) -> None:
    text = chat.render(MESSAGES)
    found = [text[a.start : a.stop] for a in locate_answers(chat, MESSAGES, text, "x:1")]
    assert found == ["user<|im_end|>", "skipped<|im_end|>", "\n Grüße\n<|im_end|>"]


@settings(max_examples=150)
@given(data=st.data())
def test_every_single_change_is_found(chat: Chat, data: st.DataObject) -> None:
    example = chat.example(MESSAGES)
    at = data.draw(st.integers(0, len(example.ids) - 1))
    ids, weights = example.ids.tolist(), example.weights
    if data.draw(st.booleans()):
        weights[at] = 1.0 - weights[at]
    else:
        ids[at] = data.draw(st.integers(0, chat.tokenizer.get_vocab_size() - 1).filter(lambda i: i != ids[at]))
    with pytest.raises(DataError, match=r"^b.jsonl:7: "):
        prove(chat, MESSAGES, masked(ids, weights, len(MESSAGES)), "assistant", "b.jsonl:7")


def _runs(chat: Chat) -> tuple[Example, list[int]]:
    example = chat.example(MESSAGES)
    return example, [t for t, w in enumerate(example.weights) if w]


def test_a_mask_shifted_by_one_names_turn_and_token(chat: Chat) -> None:
    example, supervised = _runs(chat)
    with pytest.raises(DataError, match=rf"message 3 \(assistant\): token {supervised[0] - 1} "):
        prove(chat, MESSAGES, masked(example.ids, [*example.weights[1:], 0.0], len(MESSAGES)), "assistant", "b:1")


def test_a_missing_end_of_turn_names_turn_and_tokens(chat: Chat) -> None:
    example, supervised = _runs(chat)
    weights = list(example.weights)
    weights[supervised[-1]] = 0.0
    with pytest.raises(DataError, match=rf"message 7 \(assistant\): supervised tokens \d+ to {supervised[-1] - 1} are not"):
        prove(chat, MESSAGES, masked(example.ids, weights, len(MESSAGES)), "assistant", "b:1")


def test_a_trained_turn_that_should_not_be_is_found(chat: Chat) -> None:
    everything = chat.example([{**m, "weight": 1} if m["role"] == "assistant" else m for m in MESSAGES])
    with pytest.raises(DataError):
        prove(chat, MESSAGES, everything, "assistant", "b:1")
    with pytest.raises(DataError, match="is trained, but has no supervised token"):
        prove(chat, MESSAGES, masked(everything.ids, [0.0] * len(everything.ids), len(MESSAGES)), "assistant", "b:1")


def test_the_same_text_in_other_tokens_is_another_prompt(tiny: Path) -> None:
    chat = Chat.load(tiny)
    example = chat.example(MESSAGES)
    letters = chat.tokenizer.encode("the", add_special_tokens=False).ids
    assert len(letters) == 1  # one token, which a prompt spelled letter by letter does not have
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "x"}]
    example = chat.example(messages)
    at = example.ids.tolist().index(letters[0])
    spelled = [chat.tokenizer.token_to_id(c) for c in "the"]
    ids = [*example.ids[:at], *spelled, *example.ids[at + 1 :]]
    weights = [*example.weights[:at], 0.0, 0.0, 0.0, *example.weights[at + 1 :]]
    with pytest.raises(DataError, match=f"from token {at} on, training sees another prompt"):
        prove(chat, messages, masked(ids, weights, 2), "assistant", "b:1")


@pytest.mark.parametrize("lost", ["\x13", "\U00040000"])
def test_a_character_that_the_tokenizer_drops_is_named(smollm: Path, lost: str) -> None:
    chat = Chat.load(smollm)
    messages = [{"role": "user", "content": f"é🙂{lost}"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(DataError, match=rf"b:1: message 1 \(user\) contains U\+{ord(lost):04X}, which the tokenizer cannot write"):
        prove(chat, messages, chat.example(messages), "assistant", "b:1")


def test_a_template_that_changes_text_is_refused(tiny: Path) -> None:
    good = Chat.load(tiny)
    chat = Chat(*good._source[:2], good.template.replace("message['content']", "(message['content'] | replace('skip', ''))"))
    with pytest.raises(DataError, match=r"changes the text of message 5 \(assistant\)"):
        prove(chat, MESSAGES, chat.example(MESSAGES), "assistant", "b:1")


def test_a_template_that_rewrites_history_is_rendered_turn_by_turn(tiny: Path) -> None:
    """All but the last answer is dropped, as templates of reasoning models do with old thoughts."""
    good = Chat.load(tiny)
    forgets = "(message['content'] if loop.last or message['role'] == 'user' else '...')"
    chat = Chat(*good._source[:2], good.template.replace("message['content']", forgets))
    conversation = {"messages": MESSAGES[1:], "tools": None}
    (made,) = chat.examples([conversation])
    assert isinstance(made, list) and [example.stop for example in made] == [2, 6]
    for example, answer in zip(made, ("user", "\n Grüße\n"), strict=True):
        ((start, stop),) = example.spans
        assert chat.decode(example.ids[start:stop].tolist()) == answer
        assert example.ids[:start].tolist() == chat.prompt(MESSAGES[1 : example.stop])
    assert prove_all(chat, [Claim("b:1", conversation, made)], "assistant") == [None]
    (lost,) = prove_all(chat, [Claim("b:1", conversation, made[1:])], "assistant")
    assert lost is not None and "message 2 (assistant)" in lost.message
    (lost,) = prove_all(chat, [Claim("b:1", conversation, made[:1])], "assistant")
    assert lost is not None and "messages [2, 6] are to be trained, but [2] are" in lost.message
    with pytest.raises(TemplateError, match="rewrites earlier turns"):
        chat.example(MESSAGES[1:])


def test_a_template_that_strips_text_passes(tiny: Path) -> None:
    good = Chat.load(tiny)
    chat = Chat(good._source[0], good._source[1], good.template.replace("message['content']", "(message['content'] | trim)"))
    prove(chat, MESSAGES, chat.example(MESSAGES), "assistant", "b:1")


def test_the_space_that_the_template_writes_before_an_answer_is_the_models(smollm: Path) -> None:
    """`[/INST] answer`: the prompt ends before the space."""
    good = Chat.load(smollm)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    chat = Chat(*good._source[:2], template)
    conversation = {"messages": [m for m in MESSAGES if m["role"] != "system"], "tools": None}
    made = chat.examples([conversation] * 3)
    claims = [Claim("b:1", conversation, examples) for examples in made if isinstance(examples, list)]
    assert prove_all(chat, claims, "assistant") == [None] * 3
    (example,) = claims[0].examples
    (start, stop), _ = example.spans
    assert chat.decode(example.ids[start:stop].tolist()) == " user" and example.ids[:start].tolist() == chat.prompt(MESSAGES[1:2])
    late = Example(example.ids, ((start + 1, stop), example.spans[1]), example.stop)
    (verdict,) = prove_all(chat, [Claim("b:1", conversation, [late])], "assistant", every=10**9)
    assert verdict is not None


@pytest.mark.parametrize("answer", ["🧑\u200d🚀 up", "\u1112 x", " \n\u2581<", "plain"])
def test_masked_reasoning_ends_where_the_answer_begins(smollm: Path, answer: str) -> None:
    """Also where the answer's first character is written by several tokens."""
    chat = Chat.load(smollm)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, "reasoning": "let me 🙂 think"}]
    conversation = {"messages": messages, "tools": None}
    (made,) = chat.examples([conversation], reasoning="mask")
    assert isinstance(made, list)
    assert prove_all(chat, [Claim("b:1", conversation, made)], "assistant", "mask") == [None]
    ((start, stop),) = made[0].spans
    assert chat.decode(made[0].ids[start:stop].tolist()).endswith(answer.strip()) and "think" not in chat.decode(
        made[0].ids[start:stop].tolist()
    )
