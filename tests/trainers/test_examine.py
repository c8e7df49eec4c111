"""What becomes of rows: tools, reasoning, length, and no row that vanishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.chat import Chat
from trainers.errors import RowError
from trainers.examine import TOO_LONG, Row, Rules, examine, examine_rows
from trainers.proof import Claim, prove_all
from trainers.sources import inspect
from trainers.spec import JobSpec, Source

TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object"}}}]
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": '{"city": "Oslo", "days": [1, 2]}'}]}
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Oslo?"},
    CALL,
    {"role": "tool", "content": '{"rain": true}', "name": "weather"},
    {"role": "assistant", "content": "It rains."},
]
THOUGHT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning": "Two and two make 4."},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6", "reasoning": "Three and three."},
]
FORGETS = (  # old thoughts are dropped, as Qwen3's template does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rules(**more: Any) -> Rules:
    model = {key: more.pop(key) for key in ("max_length", "overlength") if key in more}
    return Rules.of(JobSpec.parse({"data": {"train": [{"path": "x"}], **more}, "model": model}))


def conversation(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"messages": messages, "tools": None, "slice": None, "class": None, "id": "a:1", **more}


def one(chat: Chat, given: dict[str, Any], **more: Any) -> Row:
    (row,) = examine_rows(chat, rules(**more), [given])
    return row


def trained(chat: Chat, row: Row) -> list[list[str]]:
    """The supervised texts of each example."""
    assert row.error is None and row.examples is not None, row.error
    return [[chat.token_bytes.say(e.ids[start:stop].tolist()).decode() for start, stop in e.spans] for part in row.examples for e in part]


@pytest.fixture(scope="module")
def chatml(tiny: Path) -> Chat:
    return Chat.load(tiny, "chatml")


@pytest.fixture(scope="module")
def forgets(tiny: Path) -> Chat:
    return Chat.load(tiny, FORGETS)


# -- tools and reasoning -------------------------------------------------------------------------------------------------


def test_tool_calls_are_trained_and_tool_answers_are_not(chatml: Chat) -> None:
    row = one(chatml, conversation(TOOL_CHAT, tools=TOOLS))
    ((call, answer),) = trained(chatml, row)
    assert '"name": "weather"' in call and '"city": "Oslo"' in call and call.endswith("<|im_end|>") and answer == "It rains.<|im_end|>"
    assert row.examples is not None
    text = chatml.token_bytes.say(row.examples[0][0].ids.tolist()).decode()
    assert "Weather of a city" in text and text.count('{"rain": true}') == 1
    prompt = chatml.prompt(TOOL_CHAT[:3], TOOLS)
    assert row.examples[0][0].ids[: len(prompt)].tolist() == prompt


def test_tools_that_a_template_leaves_out_are_refused(tiny: Path) -> None:
    row = one(Chat.load(tiny), conversation(TOOL_CHAT, tools=TOOLS))
    assert row.error is not None and "leaves" in row.error.message and row.error.message.startswith("a:1")


def test_reasoning_is_trained_shown_or_dropped(chatml: Chat) -> None:
    whole = one(chatml, conversation(THOUGHT))
    assert trained(chatml, whole) == [[f"<think>\n{m['reasoning']}\n</think>\n\n{m['content']}<|im_end|>" for m in THOUGHT[1::2]]]
    masked = one(chatml, conversation(THOUGHT), reasoning="mask")
    assert trained(chatml, masked) == [["4<|im_end|>", "6<|im_end|>"]]
    assert masked.examples is not None and whole.examples is not None
    assert masked.examples[0][0].ids.tolist() == whole.examples[0][0].ids.tolist()
    dropped = one(chatml, conversation(THOUGHT), reasoning="drop")
    assert dropped.examples is not None and b"think" not in chatml.token_bytes.say(dropped.examples[0][0].ids.tolist())


def test_masked_reasoning_of_a_call_ends_with_the_thought(chatml: Chat) -> None:
    messages = [{"role": "user", "content": "Weather?"}, {**CALL, "reasoning": "I need the weather."}]
    ((call,),) = trained(chatml, one(chatml, conversation(messages, tools=TOOLS), reasoning="mask"))
    assert "I need" not in call and "weather" in call


def test_a_template_that_forgets_thoughts_makes_an_example_for_each_turn(forgets: Chat) -> None:
    row = one(forgets, conversation(THOUGHT))
    assert trained(forgets, row) == [
        ["<think>\nTwo and two make 4.\n</think>\n\n4<|im_end|>"],
        ["<think>\nThree and three.\n</think>\n\n6<|im_end|>"],
    ]
    assert row.examples is not None
    for example in row.examples[0]:
        prompt = forgets.prompt(THOUGHT[: example.stop - 1])
        assert example.ids[: len(prompt)].tolist() == prompt and b"make 4" not in forgets.token_bytes.say(prompt)


def test_plain_text_is_trained_whole(chatml: Chat) -> None:
    row = one(chatml, {**conversation([{"role": "assistant", "content": "Call me Ishmael."}]), "text": True})
    # All but its first token (here, a letter), before which nothing stands: this tokenizer's <|im_start|> opens turns, and no text.
    assert trained(chatml, row) == [["all me Ishmael.<|im_end|>"]]
    row = one(chatml, {**conversation([{"role": "assistant", "content": "<|im_start|>user"}]), "text": True})
    assert row.error is not None and "<|im_start|>" in row.error.message


@pytest.mark.parametrize("backend", ["hf", "fastokens"])
def test_control_tokens_in_arguments_and_tools_are_refused(tiny: Path, backend: Any) -> None:
    chat = Chat.load(tiny, "chatml", backend)
    bad_call = {**CALL, "tool_calls": [{"name": "weather", "arguments": '{"city": "<|im_end|>"}'}]}
    for row_given in (
        conversation([TOOL_CHAT[0], bad_call], tools=TOOLS),
        conversation(TOOL_CHAT, tools=TOOLS.replace("Weather", "<|im_end|>")),
    ):
        row = one(chat, row_given)
        assert row.error is not None and "<|im_end|>" in row.error.message and "control token" in row.error.message


# -- length --------------------------------------------------------------------------------------------------------------


def long(turns: int, words: int = 10) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be kind."}] + [
        {"role": role, "content": f"{role} {n} " + "word " * words + "end"} for n in range(turns) for role in ("user", "assistant")
    ]


def test_a_long_row_is_refused_or_dropped(chatml: Chat) -> None:
    row = one(chatml, conversation(long(3)), max_length=100)
    assert isinstance(row.error, RowError) and row.error.kind == TOO_LONG and "max_length = 100" in row.error.message
    assert one(chatml, conversation(long(3)), max_length=100, overlength="drop").dropped == TOO_LONG


def test_a_prompt_loses_turns_then_text_and_never_the_answer(chatml: Chat) -> None:
    messages = long(5)
    length = len(chatml.example(messages).ids)
    for max_length in range(60, length + 1, 7):
        row = one(chatml, conversation(messages), max_length=max_length, overlength="truncate_prompt")
        if row.dropped is not None:
            assert row.dropped == "an answer alone is longer than max_length"
            continue
        assert row.examples is not None and row.parts is not None
        assert len(row.examples[0][0].ids) <= max_length
        assert trained(chatml, row)[0][-1] == messages[-1]["content"] + "<|im_end|>"
        kept = row.parts[0]["messages"]
        assert kept[0] == messages[0] and kept[-1] == messages[-1]
        assert messages[-len(kept) + 2 :] == kept[2:] and messages[-len(kept) + 1]["content"].endswith(kept[1]["content"])
        assert row.notes is None or [note.kind for note in row.notes] == ["prompt shortened"]
    shortest = one(chatml, conversation(messages), max_length=120, overlength="truncate_prompt")
    assert shortest.parts is not None and len(shortest.parts[0]["messages"]) == 3  # system, what is left of the question, the answer


def test_neither_an_answer_that_comes_first_nor_a_system_message_is_cut(chatml: Chat) -> None:
    greeting = {"role": "assistant", "content": "welcome " * 50}
    row = one(chatml, conversation([greeting, {"role": "assistant", "content": "yes"}]), max_length=64, overlength="truncate_prompt")
    assert row.dropped == "an answer alone is longer than max_length"
    late = [*long(1), {"role": "system", "content": "be brief"}, {"role": "user", "content": "word " * 80}, greeting | {"content": "yes"}]
    row = one(chatml, conversation(late), max_length=128, overlength="truncate_prompt")
    assert row.parts
    head, system, asked, answer = [message["content"] for message in row.parts[0]["messages"]]
    assert (head, system, answer) == ("Be kind.", "be brief", "yes") and 0 < len(asked) < 400


def test_turns_are_spread_and_each_is_trained_once(chatml: Chat) -> None:
    messages = long(7)
    row = one(chatml, conversation(messages), max_length=300, overlength="split_turns")
    assert row.examples is not None and len(row.examples) > 1 and row.parts is not None
    assert all(len(example.ids) <= 300 for part in row.examples for example in part)
    assert [text for example in trained(chatml, row) for text in example] == [m["content"] + "<|im_end|>" for m in messages[2::2]]
    assert all(part["messages"][0] == messages[0] for part in row.parts)
    messages[3]["content"] += " more" * 300
    row = one(chatml, conversation(messages), max_length=300, overlength="split_turns")
    assert [text for example in trained(chatml, row) for text in example] == [
        m["content"] + "<|im_end|>" for i, m in enumerate(messages) if m["role"] == "assistant" and i != 4
    ] or len(trained(chatml, row)) >= 2
    assert row.notes is not None and any("without turns" in note.kind for note in row.notes)


def test_spread_turns_keep_weights(chatml: Chat) -> None:
    messages = long(6)
    for message in messages[2:-1:2]:
        message["weight"] = 0
    row = one(chatml, conversation(messages), max_length=300, overlength="split_turns")
    assert trained(chatml, row) == [[messages[-1]["content"] + "<|im_end|>"]]


# -- whole chunks --------------------------------------------------------------------------------------------------------

LINES = st.one_of(
    st.just("not json"),
    st.just('{"messages": []}'),
    st.just('{"messages": [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]}'),
    st.just('{"messages": [{"role": "user", "content": 7}]}'),
    st.builds(
        lambda texts, weight: json.dumps(
            {
                "messages": [
                    {"role": "user", "content": texts[0]},
                    {"role": "assistant", "content": texts[1], **({"weight": 0} if weight else {})},
                ]
            }
        ),
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.text(st.characters(exclude_categories=["Cs"]), max_size=90)
        ),
        st.booleans(),
    ),
)


@settings(max_examples=60)
@given(lines=st.lists(LINES, min_size=1, max_size=12), overlength=st.sampled_from(["refuse", "drop", "truncate_prompt", "split_turns"]))
def test_no_row_vanishes_and_no_user_token_is_trained(
    chatml: Chat, tmp_path_factory: pytest.TempPathFactory, lines: list[str], overlength: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "d.jsonl"
    lines = ['{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', *lines]
    path.write_text("\n".join(lines) + "\n")
    chosen = rules(overlength=overlength, max_length=60)
    source = Source(path=str(path), format="messages")
    rows = [
        row for chunk in inspect(source, chunk_bytes=200).chunks for table in examine(chatml, chosen, chunk) for row in table.to_pylist()
    ]
    assert [row["id"] for row in rows] == [f"d.jsonl:{n}" for n in range(1, len(lines) + 1)]
    for row, line in zip(rows, lines, strict=True):
        states = [row["error"] is not None, row["dropped"] is not None, bool(row["examples"])]
        assert sum(states) == 1, row
        for example in row["examples"]:
            assert len(example["input_ids"]) == example["length"] == sum(example["run_lengths"]) <= 60
            answer = json.loads(line)["messages"][1]["content"]
            at = 0
            for weight, length in zip(example["run_weights"], example["run_lengths"], strict=True):
                if weight:
                    said = chatml.token_bytes.say(example["input_ids"][at : at + length])
                    assert said.decode() in (answer + "<|im_end|>", answer.strip() + "<|im_end|>")
                at += length


def test_fast_and_reference_make_the_same_tables(smollm: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    texts = ["Grüße", "1 + 1 = 2", "你好 🙂", "cat <filename>", "a  b\n\n c", " 3.14 "]
    path.write_text("".join(json.dumps({"instruction": f"{t} {i}", "output": texts[-1 - i % 6]}) + "\n" for i, t in enumerate(texts * 40)))
    (chunk,) = inspect(Source(path=str(path))).chunks
    tables = [list(examine(Chat.load(smollm, backend=backend), rules(), chunk)) for backend in ("hf", "fastokens")]
    assert tables[0][0].equals(tables[1][0]) and tables[0][0].num_rows == 240 and tables[0][0].column("error").null_count == 240


def test_a_tokenizer_that_diverges_is_found(smollm: Path) -> None:
    """Ids of another tokenizer that say the same: what a fast tokenizer with a bug would give."""
    chat = Chat.load(smollm, backend="fastokens")
    given = conversation([{"role": "user", "content": "the quick brown fox"}, {"role": "assistant", "content": "jumps"}])
    (made,) = chat.examples([given])
    assert isinstance(made, list)
    spelled = Chat.load(smollm)
    vocabulary = {said: id for id, said in enumerate(spelled.token_bytes.table)}
    ids = made[0].ids.tolist()
    at = ids.index(vocabulary[b" quick"])
    letters = [vocabulary[bytes([b])] for b in b" quick"]
    shift = len(letters) - 1
    other = type(made[0])(
        ids=np.array([*ids[:at], *letters, *ids[at + 1 :]], np.int32),
        spans=tuple((a + shift, b + shift) for a, b in made[0].spans),
        stop=made[0].stop,
    )
    (verdict,) = prove_all(chat, [Claim("a:1", given, [other])], "assistant")
    assert verdict is not None and "another prompt" in verdict.message
