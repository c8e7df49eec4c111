"""A preview shows what preparing makes of a row: the same tokens, weights, notes and refusals, in texts that add up."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.chat import Chat
from trainers.errors import DataError, UserError
from trainers.preview import preview, texts
from trainers.spec import JobSpec


def conversation(*said: str, **more: Any) -> dict[str, Any]:
    """User and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)], **more}


def job(folder: Path, rows: list[Any], **sections: Any) -> JobSpec:
    (folder / "rows.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    data = {"train": [{"path": str(folder / "rows.jsonl")}], **sections.pop("data", {})}
    return JobSpec.parse({"model": {"max_length": 512, **sections.pop("model", {})}, "data": data, **sections})


def test_tokens_and_weights_are_what_training_gets(tiny: Path, tmp_path: Path) -> None:
    spec = job(tmp_path, [conversation("Hi", "Hello", "And?", "Done.")], data={"train_on": "last_assistant"})
    seen = preview(spec, tiny)
    chat = Chat.load(tiny)
    wanted = chat.example(conversation("Hi", "Hello", "And?", "Done.")["messages"], "last_assistant")
    [example] = seen.examples
    assert [t.id for t in example.tokens] == wanted.ids.tolist() and [t.weight for t in example.tokens] == wanted.weights
    assert example.supervised == sum(w > 0 for w in wanted.weights) and example.num_tokens == len(wanted.ids)
    assert "".join(t.text for t in example.tokens) == chat.tokenizer.decode(wanted.ids.tolist(), skip_special_tokens=False)
    assert "".join(t.text for t in example.tokens if t.weight) == "Done.<|im_end|>"
    assert {t.text for t in example.tokens if t.control} == {"<|im_start|>", "<|im_end|>"}
    assert (seen.template, seen.train_on, seen.template_sha256) == ("auto", "last_assistant", chat.template_sha256)


@settings(max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_texts_add_up_whatever_is_written(smollm_chat: Chat, text: str) -> None:
    ids = [*smollm_chat.tokenizer.encode(text, add_special_tokens=False).ids, smollm_chat.eos_id, *smollm_chat.encoder.encode("é" + text)]
    assert "".join(texts(smollm_chat, ids)) == smollm_chat.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_character_of_several_tokens_stands_at_the_first(smollm_chat: Chat) -> None:
    ids = [*smollm_chat.encoder.encode("a🎉b"), smollm_chat.eos_id]
    said = texts(smollm_chat, ids)
    assert [t for t in said if t] == ["a", "🎉", "b", "<|im_end|>"] and len(said) == len(ids) > 4
    broken = [*smollm_chat.encoder.encode("🎉")[:-1], smollm_chat.eos_id]  # bytes that never become a character
    assert texts(smollm_chat, broken)[-1] == "<|im_end|>" and texts(smollm_chat, broken[:-1])[0] != ""


@pytest.fixture(scope="module")
def smollm_chat(smollm: Path) -> Chat:
    return Chat.load(smollm)


def test_rows_are_chosen_by_number_and_by_name(tiny: Path, tmp_path: Path) -> None:
    spec = job(tmp_path, [conversation(f"q{n}", f"a{n}") for n in range(9)])
    assert [e.id for e in preview(spec, tiny, limit=2, skip=3).examples] == ["rows.jsonl:4", "rows.jsonl:5"]
    assert [e.id for e in preview(spec, tiny, limit=50).examples] == [f"rows.jsonl:{n}" for n in range(1, 10)]
    assert [e.id for e in preview(spec, tiny, id="rows.jsonl:7").examples] == ["rows.jsonl:7"]
    for skip, id in ((9, None), (0, "rows.jsonl:10")):
        with pytest.raises(UserError, match="has no row"):
            preview(spec, tiny, skip=skip, id=id)


def test_a_row_without_end_costs_nothing(tiny: Path, tmp_path: Path) -> None:
    spec = job(tmp_path, [conversation("word " * 2_000_000, "b"), conversation("a", "b")], model={"overlength": "truncate_prompt"})
    begun = time.thread_time()  # of this thread alone: the machine may be busy
    endless, good = preview(spec, tiny).examples
    assert endless.error and "more than a preview looks at" in endless.error["message"] and good.tokens
    assert time.thread_time() - begun < 3


def test_what_stops_a_job_is_shown_in_its_place(tiny: Path, tmp_path: Path) -> None:
    rows = [conversation("a", "b"), "{broken", conversation("x <|im_end|> y", "z"), {"messages": []}, conversation("word " * 600, "b")]
    shown = preview(job(tmp_path, rows), tiny, limit=9).examples
    assert [e.id for e in shown] == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert shown[0].error is None and all(e.tokens == [] for e in shown[1:])
    for example, told in zip(shown[1:], ("JSON", "<|im_end|>", "messages", "max_length"), strict=True):
        assert example.error and told in example.error["message"] and example.error["code"] == "invalid_training_file"


def test_what_a_job_does_to_a_long_row_is_shown(tiny: Path, tmp_path: Path) -> None:
    rows = [conversation(*(text for n in range(12) for text in (f"question {n}?", f"answer {n}.")))]
    [whole] = preview(job(tmp_path, rows), tiny).examples
    longest = whole.num_tokens // 2
    [left_out] = preview(job(tmp_path, rows, model={"max_length": longest, "overlength": "drop"}), tiny).examples
    assert left_out.left_out and "max_length" in left_out.left_out and not left_out.tokens
    parts = preview(job(tmp_path, rows, model={"max_length": longest, "overlength": "split_turns"}), tiny).examples
    assert len(parts) > 1 and {e.id for e in parts} == {"rows.jsonl:1"} and all(e.num_tokens <= longest and e.notes for e in parts)
    said = "".join(t.text for e in parts for t in e.tokens if t.weight)
    assert [f"answer {n}." in said for n in range(12)] == [True] * 12


def test_what_curation_does_to_a_row_is_shown(tiny: Path, tmp_path: Path) -> None:
    rows = [
        conversation("Who?", "Ask ana.lopez@example.com now."),
        conversation("Help?", "I'm sorry, but I cannot help with that request."),
    ]
    spec = job(tmp_path, rows, data={"curate": {"personal_data": "mask", "refusals": "drop"}})
    masked, dropped = preview(spec, tiny).examples
    assert "[EMAIL]" in "".join(t.text for t in masked.tokens) and "ana.lopez" not in masked.model_dump_json()
    assert masked.notes and masked.notes[0].startswith("personal_data")
    assert dropped.left_out and dropped.left_out.startswith("refusals") and dropped.tokens == []


def test_a_source_that_cannot_be_read(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        preview(job(tmp_path, []), tiny)
    spec = JobSpec.parse({"data": {"train": [{"path": str(tmp_path / "none.jsonl")}]}})
    with pytest.raises(DataError, match="no file"):
        preview(spec, tiny)
