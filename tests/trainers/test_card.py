"""The model card says what the run's records say, and nothing in them can break it."""

from __future__ import annotations

from pathlib import Path

import yaml

from trainers.card import card
from trainers.records import DataReport, RunDir, SourceReport, SplitReport, StepRecord
from trainers.spec import JobSpec


def step(number: int, **more: object) -> StepRecord:
    told = {"num_steps": 10, "epoch": 0.1, "train_loss": 1.5, "train_accuracy": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0}
    return StepRecord.model_validate({"step": number, "tokens": 1, "supervised_tokens": 1, "seconds": 1.0, **told, **more})


def test_a_card_of_a_whole_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path, 1, "driver")
    source = SourceReport(
        name="a|b\n.jsonl", url="s3://x", format="alpaca", bytes=1, sha256="ab" * 32, licence="cc-by-4.0", read=9, kept=8, examples=8
    )
    split = SplitReport(examples=8, tokens=1234)
    run.write(
        "data_report.json", DataReport(sources=[source], train=split, validation=SplitReport(), template_sha256="", tokenizer_sha256="")
    )
    slices = {"hard": {"loss": 2.5, "accuracy": 0.25, "supervised_tokens": 4.0}}
    run.append("metrics", [step(1), step(5, valid_loss=1.25, valid_accuracy=0.75, valid_slices=slices), step(10, valid_loss=9.0)])
    spec = JobSpec.parse(
        {"data": {"train": [{"path": "x"}]}, "optim": {"learning_rate": 0.001, "batch_size": 8}, "method": {"rslora": True}}
    )
    run.path("resolved.json").write_text(spec.to_json())
    text = card(run, "smollm2", 5)
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"base_model": "smollm2", "tags": ["lora", "merged", "tuneyard"], "data_licences": ["cc-by-4.0"]}
    assert "| 5 | 1.5000 | 1.2500 | 75.0% |" in text and "| hard | 2.5000 | 25.0% |" in text and "9.0" not in text
    assert "| a\\|b .jsonl | alpaca | 8 of 9 | cc-by-4.0 | `abababababababab` |" in text
    assert "rank 16, alpha 32, rank-stabilised" in text and "learning rate 0.001" in text


def test_a_card_of_a_bare_run(tmp_path: Path) -> None:
    text = card(RunDir(tmp_path), "b", 3)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "b" and "step 3" in text
