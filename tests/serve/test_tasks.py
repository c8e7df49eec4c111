"""Held-out tasks: what is asked."""

import json
from pathlib import Path

import pytest

from serve.tasks import load
from trainers.errors import DataError
from trainers.spec import EvalTask


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_assistant_turn_is_the_reference_and_all_before_it_is_asked(tmp_path: Path) -> None:
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = write(tmp_path / "t.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns], "kind": 3})
    (case,) = load(EvalTask(path=str(path)), slice_by="kind")
    assert [(m["role"], m["content"]) for m in case.messages] == turns[:-1]
    assert (case.reference, case.slice, case.id) == ("d", "3", "t.jsonl:1")


def test_other_formats_give_the_same_cases(tmp_path: Path) -> None:
    messages = write(tmp_path / "t", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]})
    cases = load(EvalTask(path=str(messages)))
    assert cases == load(EvalTask(path=str(write(tmp_path / "a" / "t", {"instruction": "q", "output": "a"}))))
    assert cases == load(
        EvalTask(path=str(write(tmp_path / "s" / "t", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]})))
    )
    assert cases[0].messages == [{"role": "user", "content": "q"}]  # the wire gets no training weights


def test_a_reference_that_is_no_json_is_refused_with_its_line(tmp_path: Path) -> None:
    good, bad = ({"instruction": "q", "output": text} for text in ("{}", "{oops"))
    path = str(write(tmp_path / "t.jsonl", good, bad))
    with pytest.raises(DataError, match=r"t\.jsonl:2: the reference answer is not JSON"):
        load(EvalTask(path=path, metric="json_match"))
    assert len(load(EvalTask(path=path, metric="exact_match"))) == 2


def test_a_choice_takes_its_options_from_the_task_or_from_a_column(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "b", "options": ["a", "b"]}, {"prompt": "r", "completion": "c", "options": ["c", "b", "a"]}]
    path = str(write(tmp_path / "t.jsonl", *rows))
    assert [case.options for case in load(EvalTask(path=path, metric="choice", choices="options"))] == [("a", "b"), ("c", "b", "a")]
    assert {case.options for case in load(EvalTask(path=path, metric="choice", choices=["a", "b", "c"]))} == {("a", "b", "c")}
    with pytest.raises(DataError, match=r"t\.jsonl:2: the reference 'c' is not one of \['a', 'b'\]"):
        load(EvalTask(path=path, metric="choice", choices=["a", "b"]))
    with pytest.raises(DataError, match=r"t\.jsonl:1: `prompt` holds no list"):
        load(EvalTask(path=path, metric="choice", choices="prompt"))
