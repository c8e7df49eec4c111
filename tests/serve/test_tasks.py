"""Held-out tasks: what is asked, and what counts as right."""

import json
from pathlib import Path

import pytest

from serve.tasks import load, mean, parse_json, same_json, score
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


@pytest.mark.parametrize(("answer", "right"), [("yes", 1.0), (" yes\n", 1.0), ("Yes", 0.0), ("", 0.0), (None, 0.0)])
def test_exact_match_sets_outer_blanks_aside(answer: str | None, right: float) -> None:
    assert score("exact_match", answer, "yes ") == {"exact_match": right}


@pytest.mark.parametrize(
    ("answer", "right", "valid"),
    [
        ('{"b": [1, null], "a": "x"}', 1.0, 1.0),
        ('\n{"a":"x","b":[1.0,null]} ', 1.0, 1.0),
        ('{"a":"x","b":[true,null]}', 0.0, 1.0),
        ('{"a":"x","b":[null,1]}', 0.0, 1.0),
        ('{"a":"x"}', 0.0, 1.0),
        ('{"a":"x","b":[1,null]} and more', 0.0, 0.0),
        ('{"a":"x","b":[NaN,null]}', 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
        (None, 0.0, 0.0),
    ],
)
def test_json_match_compares_values(answer: str | None, right: float, valid: float) -> None:
    assert score("json_match", answer, '{"a":"x","b":[1,null]}') == {"json_match": right, "valid_json": valid}


def test_true_is_not_one_at_any_depth() -> None:
    assert same_json(parse_json("[1, 2.0]"), parse_json("[1.0, 2]"))
    assert not same_json({"a": [True]}, {"a": [1]})
    assert not same_json(0, False)


def test_mean_is_over_examples() -> None:
    scores = [score("json_match", answer, "1") for answer in ("1", "2", "x", "1")]
    assert mean("json_match", scores) == {"json_match": 0.5, "valid_json": 0.75}
