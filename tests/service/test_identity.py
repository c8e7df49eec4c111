"""What the deploy stage replays: examples of a real token store, scored by the trained model, with the rows that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from service.identity import COUNT, replays
from tests.serve.conftest import make_adapter
from trainers.chat import Chat
from trainers.prepare import prepare
from trainers.records import ModelRecord, RunDir
from trainers.spec import JobSpec


def prepared(tmp_path: Path, tiny: Path, **data: Any) -> tuple[JobSpec, RunDir, Path]:
    rows = [{"prompt": f"the quick brown {i}", "completion": f"fox jumps {i} times"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [{"path": str(tmp_path / "rows.jsonl")}]
    spec = JobSpec.parse({"model": {"base": str(tiny), "max_length": 256}, "data": {"train": source, "validation": 0.4, **data}})
    run = RunDir(tmp_path / "run", 1, "driver")
    record = prepare(spec, tiny, tmp_path / "stores", run, executor="local")
    return spec, run, Path(record.store)


def test_held_out_examples_are_scored_by_what_was_trained(tmp_path: Path, tiny: Path) -> None:
    spec, run, store = prepared(tmp_path, tiny)
    adapter = make_adapter(tiny, run.path("adapter"), seed=5)
    model = ModelRecord(base="tiny", adapter="adapter", merged=None, step=1)
    found = replays(spec, tiny, model, store, Chat.load(tiny), run)
    assert 0 < len(found) <= COUNT
    base: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, adapter).eval()
    for replay in found:
        assert replay.messages is not None and replay.prompt_ids is not None
        assert replay.prompt_ids == Chat.load(tiny).prompt(replay.messages)
        with torch.no_grad():
            logprobs = trained(torch.tensor([replay.ids])).logits[0].log_softmax(-1)
        assert len(replay.logprobs) > 3
        for at, value in replay.logprobs.items():
            assert at >= len(replay.prompt_ids)  # an answer's token
            assert value == pytest.approx(logprobs[at - 1, replay.ids[at]].item(), abs=1e-4)


def test_without_held_out_examples_those_of_training_are_taken(tmp_path: Path, tiny: Path) -> None:
    spec, run, store = prepared(tmp_path, tiny, validation=0.0)
    make_adapter(tiny, run.path("adapter"), seed=5)
    assert len(replays(spec, tiny, ModelRecord(base="tiny", adapter="adapter", merged=None, step=1), store, Chat.load(tiny), run)) == COUNT


def test_a_row_that_was_changed_by_preparation_is_compared_by_its_ids_alone(tmp_path: Path, tiny: Path) -> None:
    spec, run, store = prepared(tmp_path, tiny)
    make_adapter(tiny, run.path("adapter"), seed=5)
    source = Path(spec.data.train[0].path)
    source.write_text(source.read_text().replace("quick", "slow"))
    found = replays(spec, tiny, ModelRecord(base="tiny", adapter="adapter", merged=None, step=1), store, Chat.load(tiny), run)
    assert found and all(replay.messages is None and replay.logprobs for replay in found)
