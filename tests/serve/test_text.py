from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text import BROKEN, AnswerText
from trainers.chat import Chat


@pytest.fixture(scope="module")
def chat(tiny: Path) -> Chat:
    return Chat.load(tiny)


def deltas(text: AnswerText, ids: list[int]) -> list[str]:
    return [text.push(id) for id in ids] + [text.flush()]


@pytest.mark.parametrize("answer", ["naïve café", "漢字かな交じり文", "🙂 is 4 bytes, 👩‍👩‍👧‍👦 is 25", "plain", ""])
def test_no_half_characters(chat: Chat, answer: str) -> None:
    parts = deltas(AnswerText(chat.decode), chat.tokenizer.encode(answer, add_special_tokens=False).ids)
    assert "".join(parts) == answer
    assert not any(BROKEN in part for part in parts)


def test_joined_deltas_are_the_decoded_whole(chat: Chat) -> None:
    @given(st.lists(st.integers(4, 299), max_size=60))
    def check(ids: list[int]) -> None:
        assert "".join(deltas(AnswerText(chat.decode), ids)) == chat.decode(ids)

    check()


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings(answer: str, stops: list[str]) -> None:
    text = AnswerText(lambda ids: "".join(map(chr, ids)), tuple(stops))
    shown = ""
    for character in answer:
        shown += text.push(ord(character))
        if text.stopped:
            break
    else:
        shown += text.flush()
    # The first moment at which the text read so far holds a stop decides where it is cut.
    for end in range(len(answer) + 1):
        found = [answer[:end].find(s) for s in stops if s in answer[:end]]
        if found:
            assert shown == answer[: min(found)] and text.stopped
            return
    assert shown == answer and not text.stopped


def test_text_that_may_become_a_stop_waits() -> None:
    text = AnswerText(lambda ids: "".join(map(chr, ids)), ("\n\nUser:",))
    assert [text.push(ord(c)) for c in "Hi\n\nUs"] == ["H", "i", "", "", "", ""]
    assert text.push(ord("a")) == "\n\nUsa"
