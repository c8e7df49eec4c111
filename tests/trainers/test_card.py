"""The model card says what the run's records say, and nothing in them can break it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainers.card import card, write_card
from trainers.curve import loss_curve
from trainers.records import (
    DataReport,
    EvaluationRecord,
    ModelRecord,
    PrepareRecord,
    RunDir,
    SourceReport,
    SplitReport,
    StepRecord,
    TaskResult,
)
from trainers.spec import JobSpec


def step(number: int, **more: object) -> StepRecord:
    told = {"num_steps": 10, "epoch": 0.1, "train_loss": 1.5, "train_accuracy": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0}
    return StepRecord.model_validate({"step": number, "tokens": 1, "supervised_tokens": 1, "seconds": 1.0, **told, **more})


def model(base: str = "smollm2-135m-instruct", step: int = 5, adapter: str | None = "adapters/step-000005") -> ModelRecord:
    return ModelRecord(base=base, adapter=adapter, merged="model", step=step, kl=1.4e-4, effect=1.5)


def a_run(folder: Path, **sections: Any) -> RunDir:
    run = RunDir(folder, 1, "driver")
    source = SourceReport(
        name="a|b\n.jsonl", url="s3://x", format="alpaca", bytes=1, sha256="ab" * 32, licence="cc-by-4.0", read=9, kept=8, examples=8
    )
    split = SplitReport(examples=8, tokens=1234)
    run.write(
        "data_report.json", DataReport(sources=[source], train=split, validation=SplitReport(), template_sha256="", tokenizer_sha256="")
    )
    slices = {"hard": {"loss": 2.5, "accuracy": 0.25, "supervised_tokens": 4.0}}
    run.append("metrics", [step(1), step(5, valid_loss=1.25, valid_accuracy=0.75, valid_slices=slices), step(10, valid_loss=9.0)])
    spec = JobSpec.parse({"data": {"train": [{"path": "x"}]}, "optim": {"learning_rate": 0.001, "batch_size": 8}, **sections})
    run.path("resolved.json").write_text(spec.to_json())
    return run


def test_a_card_of_a_whole_run(tmp_path: Path) -> None:
    run = a_run(tmp_path, method={"rslora": True})
    run.write("prepare.json", PrepareRecord(store="s", key="f00d", cached=False, seconds=1))
    text = card(run, model())
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "smollm2-135m-instruct" and front["license"] == "apache-2.0"
    assert front["tags"] == ["lora", "merged", "tuneyard"] and front["data_licences"] == ["cc-by-4.0"]
    assert "| 5 | 1.5000 | 1.2500 | 75.0% |" in text and "| hard | 2.5000 | 25.0% |" in text and "9.0" not in text
    assert "| a\\|b .jsonl | alpaca | 8 of 9 | cc-by-4.0 | `abababababababab` |" in text and "`f00d`" in text
    assert "rank 16, alpha 32, rank-stabilised" in text and "learning rate | 0.001" in text
    assert "licence: apache-2.0" in text and "0.0001 nats per token from base and adapter apart" in text
    assert "Evaluation" not in text


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"type": "full"}, "full fine-tuning: every weight was trained"),
        ({"type": "qlora", "r": 8}, "QLoRA (NF4, double quantisation), rank 8"),
        ({"dora": True, "modules_to_save": ["norm"]}, "DoRA, rank 16, alpha 32, targets all-linear, trained whole: norm"),
        ({"targets": ["q_proj", "v_proj"], "dropout": 0.1}, "LoRA, rank 16, alpha 32, dropout 0.1, targets q_proj, v_proj"),
    ],
)
def test_every_method_is_told(tmp_path: Path, method: dict[str, Any], told: str) -> None:
    run = a_run(tmp_path, method=method)
    whole = method.get("type") == "full"
    text = card(run, model(adapter=None) if whole else model())
    assert told in text and ("what NF4 leaves" in text) == (method.get("type") == "qlora")
    assert ("adapter" in text) != whole and ("full-fine-tuning" in text) == whole


def test_a_card_is_written_again_after_an_evaluation(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (folder := run.path("model")).mkdir()
    write_card(run, model(), folder)
    before = (folder / "README.md").read_text()
    task = TaskResult(name="held|out", metric="exact_match", examples=40, base={"exact_match": 0.125}, tuned={"exact_match": 0.9})
    run.write("evaluation.json", EvaluationRecord(tasks=[task], seconds=1))
    write_card(run, model(), folder)
    after = (folder / "README.md").read_text()
    assert "| held\\|out | exact_match | 40 | 12.5% | 90.0% |" in after and "Evaluation" not in before
    assert "(loss.svg)" in after
    picture = ElementTree.parse(folder / "loss.svg").getroot()
    assert len(picture.findall(".//{*}circle")) == 3  # two validations, and the legend's


def test_a_card_of_a_bare_run(tmp_path: Path) -> None:
    text = card(RunDir(tmp_path), model("b", 3))
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "b" and "step 3" in text
    assert "license" not in text.split("---")[1] and "licence: not known here" in text
    write_card(RunDir(tmp_path), model("b", 3), tmp_path)
    assert not (tmp_path / "loss.svg").exists()


@pytest.mark.parametrize("losses", [[1.0], [2.0, 2.0], [1e-9, 3e-9], [0.0], [5 / (i + 1) for i in range(5000)], [1e6, float("nan"), 3.0]])
def test_any_losses_make_a_picture(losses: list[float]) -> None:
    text = loss_curve([step(i + 1, train_loss=loss) for i, loss in enumerate(losses)])
    assert len(text) < 12_000 and "nan" not in text
    line = ElementTree.fromstring(text).find(".//{*}polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert points and all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points)
