"""Benchmarks: the real lm-evaluation-harness on a local task, against the real app of the tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from servicekit import serving

from service.harness import run_benchmarks
from trainers.errors import Unavailable, UserError
from trainers.records import EvaluationRecord

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra [eval] is not installed")

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@needs_harness
def test_a_local_task_is_run_on_both_models(tmp_path: Path, tiny: Path) -> None:
    from serve.app import application
    from serve.chats import Chats
    from serve.transformers_engine import TransformersEngine
    from service import evaluationreport

    rows = [{"question": "the quick brown", "choices": [" fox", " dog"], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK)
    said: list[str] = []
    with serving(application(TransformersEngine(tiny), Chats(tiny), "tiny", "key")) as port:
        url = f"http://127.0.0.1:{port}/v1"
        (row,) = run_benchmarks(url, "key", tiny, [str(tmp_path / "task.yaml")], "base", "tuned", said.append)
        assert (row.task, row.metric, row.base, row.tuned) == (
            "tiny_choice",
            "acc,none",
            0.5,
            0.5,
        )  # the same question, each answer half the time
        assert row.base_error is not None and len(said) == 2
        with pytest.raises(Unavailable, match=r"failed on task\.yaml") as caught:
            run_benchmarks(url, "wrong-key", tiny, [str(tmp_path / "task.yaml")], "base", "tuned", said.append)
        assert "wrong-key" not in caught.value.message
        with pytest.raises(Unavailable, match=r"failed on no_such_task"):  # a name, which only the harness knows
            run_benchmarks(url, "key", tiny, ["no_such_task"], "base", "tuned", said.append, limit=1)
    record = EvaluationRecord(tasks=[], seconds=0, benchmarks=[row])
    assert evaluationreport.lines(record) == ["tiny_choice: acc,none base 0.5, tuned 0.5 (tuned minus base +0)."]
    assert "tiny_choice" in evaluationreport.page(record)


@needs_harness
def test_a_task_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task file"):
        run_benchmarks("http://127.0.0.1:9", "k", tmp_path, [str(tmp_path / "gone.yaml")], "a", "b", print)
