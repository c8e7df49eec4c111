"""The proof accepts what Chat builds, and nothing else: any changed weight or id is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.chat import Chat, Example, Message
from trainers.errors import DataError
from trainers.proof import locate_answers, prove

MESSAGES: list[Message] = [
    {"role": "system", "content": "assistant"},  # texts that look like the template's own words
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "user"},
    {"role": "user", "content": "and 你好 🙂?"},
    {"role": "assistant", "content": "skipped", "weight": 0},
    {"role": "user", "content": "assistant\n"},
    {"role": "assistant", "content": "\n Grüße\n"},
]


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


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_single_change_is_found(chat: Chat, data: st.DataObject) -> None:
    example = chat.example(MESSAGES)
    at = data.draw(st.integers(0, len(example.ids) - 1))
    ids, weights = list(example.ids), list(example.weights)
    if data.draw(st.booleans()):
        weights[at] = 1.0 - weights[at]
    else:
        ids[at] = data.draw(st.integers(0, chat.tokenizer.get_vocab_size() - 1).filter(lambda i: i != ids[at]))
    with pytest.raises(DataError, match=r"^b.jsonl:7: "):
        prove(chat, MESSAGES, Example(ids, weights), "assistant", "b.jsonl:7")


def _runs(chat: Chat) -> tuple[Example, list[int]]:
    example = chat.example(MESSAGES)
    return example, [t for t, w in enumerate(example.weights) if w]


def test_a_mask_shifted_by_one_names_turn_and_token(chat: Chat) -> None:
    example, supervised = _runs(chat)
    with pytest.raises(DataError, match=rf"message 3 \(assistant\): token {supervised[0] - 1} "):
        prove(chat, MESSAGES, Example(example.ids, [*example.weights[1:], 0.0]), "assistant", "b:1")


def test_a_missing_end_of_turn_names_turn_and_tokens(chat: Chat) -> None:
    example, supervised = _runs(chat)
    weights = list(example.weights)
    weights[supervised[-1]] = 0.0
    with pytest.raises(DataError, match=rf"message 7 \(assistant\): supervised tokens \d+ to {supervised[-1] - 1} are not"):
        prove(chat, MESSAGES, Example(example.ids, weights), "assistant", "b:1")


def test_a_trained_turn_that_should_not_be_is_found(chat: Chat) -> None:
    everything = chat.example([{**m, "weight": 1} if m["role"] == "assistant" else m for m in MESSAGES])
    with pytest.raises(DataError):
        prove(chat, MESSAGES, everything, "assistant", "b:1")
    with pytest.raises(DataError, match="is trained, but has no supervised token"):
        prove(chat, MESSAGES, Example(everything.ids, [0.0] * len(everything.ids)), "assistant", "b:1")


def test_the_same_text_in_other_tokens_is_another_prompt(tiny: Path) -> None:
    chat = Chat.load(tiny)
    example = chat.example(MESSAGES)
    letters = chat.tokenizer.encode("the", add_special_tokens=False).ids
    assert len(letters) == 1  # one token, which a prompt spelled letter by letter does not have
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "x"}]
    example = chat.example(messages)
    at = example.ids.index(letters[0])
    spelled = [chat.tokenizer.token_to_id(c) for c in "the"]
    ids = [*example.ids[:at], *spelled, *example.ids[at + 1 :]]
    weights = [*example.weights[:at], 0.0, 0.0, 0.0, *example.weights[at + 1 :]]
    with pytest.raises(DataError, match=f"from token {at} on, training sees another prompt"):
        prove(chat, messages, Example(ids, weights), "assistant", "b:1")


@pytest.mark.parametrize("lost", ["\x13", "\U00040000"])
def test_a_character_that_the_tokenizer_drops_is_named(smollm: Path, lost: str) -> None:
    chat = Chat.load(smollm)
    messages = [{"role": "user", "content": f"é🙂{lost}"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(DataError, match=rf"b:1: message 1 \(user\) contains U\+{ord(lost):04X}, which the tokenizer cannot write"):
        prove(chat, messages, chat.example(messages), "assistant", "b:1")


@pytest.mark.parametrize(
    "content", ["(message['content'] | replace('skip', ''))", "(message['content'] if loop.last or message['role'] == 'user' else '...')"]
)
def test_a_template_that_changes_text_is_refused(tiny: Path, content: str) -> None:
    """A word is taken out; all but the last answer is dropped, as templates of reasoning models do."""
    good = Chat.load(tiny)
    chat = Chat(good._source[0], good._source[1], good.template.replace("message['content']", content))
    with pytest.raises(DataError, match="changes the text of message"):
        prove(chat, MESSAGES, chat.example(MESSAGES), "assistant", "b:1")


def test_a_template_that_strips_text_passes(tiny: Path) -> None:
    good = Chat.load(tiny)
    chat = Chat(good._source[0], good._source[1], good.template.replace("message['content']", "(message['content'] | trim)"))
    prove(chat, MESSAGES, chat.example(MESSAGES), "assistant", "b:1")
