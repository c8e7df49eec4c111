"""What counts as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.metrics import METRICS, choose, mean, own_code, parse_json, same_json, score, scorer
from trainers.errors import DataError, SpecError, UserError
from trainers.spec import EvalTask, JobSpec


def scored(metric: str, answer: str | None, reference: str, **more: Any) -> dict[str, float]:
    return score(scorer(EvalTask(path="p", metric=metric, **more)), METRICS[metric], answer, reference)  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "right"), [("yes", 1.0), (" yes\n", 1.0), ("Yes", 0.0), ("", 0.0), (None, 0.0)])
def test_exact_match_sets_outer_blanks_aside(answer: str | None, right: float) -> None:
    assert scored("exact_match", answer, "yes ") == {"exact_match": right}
    assert scored("exact_match", "YES", "yes", ignore_case=True) == {"exact_match": 1.0}


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
    assert scored("json_match", answer, '{"a":"x","b":[1,null]}') == {"json_match": right, "valid_json": valid}


def test_true_is_not_one_at_any_depth() -> None:
    assert same_json(parse_json("[1, 2.0]"), parse_json("[1.0, 2]"))
    assert not same_json({"a": [True]}, {"a": [1]})
    assert not same_json(0, False)


def test_mean_is_over_examples() -> None:
    scores = [scored("json_match", answer, "1") for answer in ("1", "2", "x", "1")]
    assert mean(METRICS["json_match"], scores) == {"json_match": 0.5, "valid_json": 0.75}


SCHEMA = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "$defs": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("answer", "right", "valid"), [('{"n": 3}', 1.0, 1.0), ('{"n": "3"}', 0.0, 1.0), ("[]", 0.0, 1.0), ("{n: 3}", 0.0, 0.0)]
)
def test_json_schema_holds_the_answer_to_the_schema(answer: str, right: float, valid: float) -> None:
    assert scored("json_schema", answer, "", json_schema=SCHEMA) == {"json_schema": right, "valid_json": valid}


def test_a_schema_that_cannot_be_used_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(DataError, match="is no JSON schema"):
        scorer(EvalTask(path="p", metric="json_schema", json_schema={"type": "objekt"}))


def test_a_schema_never_reaches_out() -> None:
    outside = {"type": "object", "properties": {"n": {"$ref": "http://127.0.0.1:9/schema.json"}}}
    assert scored("json_schema", '{"n": 1}', "", json_schema=outside)["json_schema"] == 0.0
    with pytest.raises(DataError, match="refers to what is not in it"):
        scorer(EvalTask(path="p", metric="json_schema", json_schema={"$ref": "http://127.0.0.1:9/schema.json"}))


def test_regex_finds_a_pattern_and_compares_its_group() -> None:
    assert scored("regex", "It is 42.", "", pattern=r"\d+") == {"regex": 1.0}
    assert scored("regex", "Answer: B, I think", "B", pattern=r"Answer: (\w)") == {"regex": 1.0}
    assert scored("regex", "Answer: C", "B", pattern=r"Answer: (\w)") == {"regex": 0.0}
    assert scored("regex", "answer: b", "B", pattern=r"ANSWER: (\w)", ignore_case=True) == {"regex": 1.0}
    with pytest.raises(DataError, match="no regular expression"):
        scorer(EvalTask(path="p", metric="regex", pattern="("))


def test_a_pattern_that_runs_away_is_stopped() -> None:
    assert scored("regex", "a" * 5000 + "!", "", pattern=r"(?:(a|aa)+)+$") == {"regex": 0.0}


def test_contains_looks_for_the_reference() -> None:
    assert scored("contains", "It is Paris, of course.", " Paris ") == {"contains": 1.0}
    assert scored("contains", "It is paris.", "Paris") == {"contains": 0.0}
    assert scored("contains", "It is STRASSE.", "straße", ignore_case=True) == {"contains": 1.0}


def test_rouge_is_the_share_of_words_in_common() -> None:
    found = scored("rouge", "the cat sat on the mat", "the cat was on the mat")
    # 5 of 6 words on both sides; of 5 pairs, "the cat", "on the" and "the mat"; longest common subsequence of 5.
    assert found == {"rouge": pytest.approx(5 / 6), "rouge1": pytest.approx(5 / 6), "rouge2": pytest.approx(3 / 5)}
    assert scored("rouge", "η γάτα", "η γάτα")["rouge"] == 1.0
    assert scored("rouge", None, "x")["rouge"] == 0.0


def test_bleu_and_chrf_are_sacrebleus() -> None:
    import sacrebleu

    answer, reference = "the quick brown fox leaps over the dog", "the quick brown fox jumps over the lazy dog"
    assert scored("bleu", answer, reference)["bleu"] == pytest.approx(sacrebleu.sentence_bleu(answer, [reference]).score / 100)
    assert scored("chrf", answer, reference)["chrf"] == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score / 100)
    for metric in ("bleu", "chrf"):
        assert scored(metric, reference, reference)[metric] == pytest.approx(1.0)
        assert scored(metric, "", reference)[metric] == 0.0


def test_the_likeliest_option_is_chosen_and_long_ones_are_not_at_a_disadvantage() -> None:
    assert choose(["yes", "certainly not"], [-3.0, -4.0], "certainly not") == {"choice": 0.0, "choice_by_length": 1.0}
    assert choose(["a", "b"], [-1.0, -2.0], "a") == {"choice": 1.0, "choice_by_length": 1.0}


def test_own_code_is_named_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mymetric_for_test.py").write_text(
        "def same_length(answer, reference):\n    return len(answer) == len(reference)\n"
        "def two(answer, reference):\n    return {'a': 0.5, 'b': float('nan')}\n"
        "def fails(answer, reference):\n    raise KeyError('title')\n"
        "not_a_function = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert own_code("mymetric_for_test:same_length")("abc", "xyz") == {"same_length": 1.0}
    with pytest.raises(UserError, match="returned nan as b"):
        own_code("mymetric_for_test:two")("", "")
    with pytest.raises(UserError, match=r"failed on the answer 'abc': KeyError: 'title' \(mymetric_for_test.py, line 6\)"):
        own_code("mymetric_for_test:fails")("abc", "")
    (tmp_path / "mybroken_for_test.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="cannot be loaded: SyntaxError"):
        own_code("mybroken_for_test:f")
    for wrong in ("mymetric_for_test:gone", "mymetric_for_test", "no_such_module_here:f", "mymetric_for_test:not_a_function"):
        with pytest.raises(UserError):
            own_code(wrong)


@pytest.mark.parametrize(
    "task", [{"metric": "regex"}, {"metric": "exact_match", "pattern": "x"}, {"metric": "choice"}, {"metric": "json_schema"}]
)
def test_a_metric_and_what_it_needs_belong_together(task: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="belong together"):
        JobSpec.parse({"data": {"train": [{"path": "x"}]}, "evaluate": {"tasks": [{"path": "p", **task}]}})


def test_tasks_go_through_json_unchanged() -> None:
    task = EvalTask(path="p", metric="json_schema", json_schema=SCHEMA)
    assert EvalTask.model_validate_json(json.dumps(task.model_dump(mode="json"))) == task
