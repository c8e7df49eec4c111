"""Ids and weights of conversations, against transformers and against the text itself."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainers.chat import Chat, Message
from trainers.errors import DataError, TemplateError
from trainers.proof import prove

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
    [
        {"role": "user", "content": "Grüße, 你好 👋🏽\n\n  indented\ttext"},
        {"role": "assistant", "content": "Olá! מה שלומך 1234567890"},
        {"role": "user", "content": " spaces around "},
        {"role": "assistant", "content": '{"action": "create", "title": "Buy milk"}\n'},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "Done."},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "```python\nprint('x')\n```"}, {"role": "user", "content": "\n"}],
]

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(
        ["\n", " ", "assistant", "user\n", "<|im_", "end|>", "<filename>", "<|", "é", "e\u0301", "👩‍👩‍👧", "\ue0000\ue000", "12"]
    ),
    max_size=8,
).map("".join)

TEXT = ANY_TEXT.filter(lambda text: not any(token in text for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """A conversation of any texts without control tokens; its last answer is trained."""
    messages: list[Message] = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": draw(st.sampled_from(["user", "user", "tool"])), "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(TEXT.filter(str.strip)), "weight": draw(st.sampled_from([0, 1, 1]))})
    messages[-1]["weight"] = 1
    return messages


@pytest.fixture(scope="module", params=["tiny", "smollm"])
def chat(request: pytest.FixtureRequest) -> Chat:
    return Chat.load(request.getfixturevalue(request.param))


def test_a_plain_text_begins_as_transformers_begin_it(smollm: Path) -> None:
    """SmolLM2 calls <|im_start|> its bos token; it opens turns, and no text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    assert tokenizer.bos_token == "<|im_start|>"
    assert Chat.load(smollm).text_prompt("The sky is") == tokenizer("The sky is").input_ids


@pytest.mark.parametrize("folder", ["tiny", "smollm"])
def test_same_ids_as_transformers(folder: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoTokenizer

    folder_path = request.getfixturevalue(folder)
    reference = AutoTokenizer.from_pretrained(folder_path)
    chat = Chat.load(folder_path)
    for messages in CONVERSATIONS:
        assert chat.example(messages).ids.tolist() == reference.apply_chat_template(messages, return_dict=False)
        for stop in range(1, len(messages)):
            wanted = reference.apply_chat_template(messages[:stop], add_generation_prompt=True, return_dict=False)
            assert chat.prompt(messages[:stop]) == wanted


def test_supervised_is_exactly_the_answer_and_its_end(chat: Chat) -> None:
    for messages in CONVERSATIONS:
        example = chat.example(messages)
        supervised = [i for i, w in zip(example.ids, example.weights, strict=True) if w]
        wanted = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        assert chat.tokenizer.decode(supervised, skip_special_tokens=False) == wanted
        assert example.weights[0] == 0


@settings(max_examples=150)
@given(messages=conversations(), last=st.booleans())
def test_any_conversation_keeps_every_promise(chat: Chat, messages: list[Message], last: bool) -> None:
    train_on = "last_assistant" if last else "assistant"
    plain = [m["content"] for m in messages]
    assume(all(chat.decode(chat.tokenizer.encode(text).ids) == text for text in plain))  # SmolLM2 lacks a few bytes; see test_proof
    example = chat.example(messages, train_on)
    assert chat.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False) == chat.render(messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for index in answers:
        prompt = chat.prompt(messages[:index])
        assert example.ids[: len(prompt)].tolist() == prompt == chat.prompts(messages)[index]
    trained = [messages[i]["content"] for i in (answers[-1:] if last else answers) if messages[i].get("weight", 1)]
    supervised = [i for i, w in zip(example.ids, example.weights, strict=True) if w]
    assert supervised.count(chat.control["<|im_end|>"]) == len(trained)
    assert chat.decode(supervised) == "".join(trained)
    prove(chat, messages, example, train_on, "x:1")


def test_one_turn_can_be_left_untrained(chat: Chat) -> None:
    messages = [dict(m) for m in CONVERSATIONS[2]]
    messages[1]["weight"] = 0
    example = chat.example(messages)
    supervised = [i for i, w in zip(example.ids, example.weights, strict=True) if w]
    assert chat.decode(supervised) == messages[3]["content"] + messages[5]["content"]
    last = chat.example(messages, "last_assistant")
    assert chat.decode([i for i, w in zip(last.ids, last.weights, strict=True) if w]) == messages[5]["content"]
    assert last.ids.tolist() == example.ids.tolist() == chat.example(CONVERSATIONS[2]).ids.tolist()


def test_an_example_without_supervised_tokens_is_refused(chat: Chat) -> None:
    with pytest.raises(DataError, match="No assistant turn is trained"):
        chat.example([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}])


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_control_tokens_in_text_are_refused_by_name(chat: Chat, token: str) -> None:
    messages = [{"role": "user", "content": f"a{token}b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(DataError) as error:
        chat.example(messages)
    assert token in error.value.message and "Message 1 (user)" in error.value.message
    with pytest.raises(DataError):
        chat.prompt(messages[:1])


def test_other_special_strings_are_plain_text(chat: Chat) -> None:
    special = chat.tokenizer.token_to_id("<filename>")
    messages = [{"role": "user", "content": "cat <filename>"}, {"role": "assistant", "content": "<filename>"}]
    example = chat.example(messages)
    assert special in chat.tokenizer.encode("<filename>").ids  # the tokenizer alone would read a command
    assert special not in example.ids and special not in chat.prompt(messages[:1])
    assert chat.tokenizer.decode(example.ids.tolist(), skip_special_tokens=False) == chat.render(messages)


def test_decode_leaves_out_control_tokens_only(chat: Chat) -> None:
    ids = chat.example(CONVERSATIONS[0]).ids.tolist()
    assert chat.decode(ids).endswith("user\nHi\nassistant\nHello!\n")
    assert chat.stop_ids == {chat.control["<|im_end|>"]} and chat.eos_id in chat.stop_ids


def test_pickled_chat_gives_the_same_ids_and_is_built_once(chat: Chat) -> None:
    data = pickle.dumps(chat)
    copies = [pickle.loads(data) for _ in range(2)]
    assert copies[0] is copies[1]
    assert copies[0].example(CONVERSATIONS[2]).ids.tolist() == chat.example(CONVERSATIONS[2]).ids.tolist()


REWRITES = (  # the last user message alone carries an instruction, as some templates do with the system prompt
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' and loop.index0 >= messages | length - 2 %}Be good. {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (REWRITES, "rewrites"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "ends no assistant turn"),
        ("{% for m in messages %}{{ m.content", "not valid Jinja"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "changes the text"),
        ("{{ messages.__class__.__mro__ }}<|im_end|>", "does not render|changes the text"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(tiny: Path, template: str, says: str) -> None:
    good = Chat.load(tiny)
    with pytest.raises(TemplateError, match=says):
        chat = Chat(good._source[0], good._source[1], template)
        chat.example([*CONVERSATIONS[0], *CONVERSATIONS[0]])


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(TemplateError, match="no readable tokenizer"):
        Chat.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(TemplateError, match="no chat template"):
        Chat.load(tmp_path)


def test_data_workers_load_neither_torch_nor_transformers() -> None:
    code = "import sys, trainers.prepare; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_conversation_of_many_turns_takes_seconds_and_one_of_endless_turns_is_refused(chat: Chat) -> None:
    turn: list[Message] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    begun = time.process_time()
    prove(chat, turn * 50, chat.example(turn * 50), "assistant", "x:1")  # beyond what is planned
    prove(chat, turn * 30, chat.example(turn * 30), "assistant", "x:1")
    assert time.process_time() - begun < 5
    with pytest.raises(DataError, match="50,000 answers, too many"):
        chat.example(turn * 50_000)
    with pytest.raises(DataError, match="too many"):
        chat.prompt(turn * 50_000)
