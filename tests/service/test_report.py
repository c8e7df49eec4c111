"""What the demo shows, made from records alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from service import evaluationreport, report
from trainers.records import EvaluationRecord, JudgeResult, StepRecord, TaskResult


def rendered(table: RenderableType, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table)
    console.file.close()
    return console.export_text()


def steps(count: int) -> list[StepRecord]:
    return [
        StepRecord(
            step=s,
            num_steps=count,
            epoch=s / count,
            train_loss=3 / s,
            train_accuracy=0.5,
            learning_rate=1e-3,
            grad_norm=1.0,
            tokens=100,
            supervised_tokens=30,
            seconds=0.1,
            valid_loss=2.5 / s if s % 5 == 0 else None,
        )
        for s in range(1, count + 1)
    ]


TASK = TaskResult(
    name="test.jsonl",
    metric="json_match",
    examples=40,
    base={"json_match": 0.025, "valid_json": 0.1},
    tuned={"json_match": 0.95, "valid_json": 1.0},
    failed_requests={"base": 2, "tuned": 0},
    slices={"create": {"examples": 30, "base": {"json_match": 0.0}, "tuned": {"json_match": 0.9}}},
    samples=[{"id": "t:1", "prompt": "add [bold]milk[/bold]", "reference": "{}", "base": "Sure!\n\n" + "x" * 300, "tuned": '{"a":[1]}'}],
)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (83, "1:23"), (3700, "1:01:40")])
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_progress_says_what_is_known_and_no_more() -> None:
    numbers = {"done": 23, "total": 60, "train_loss": 0.21, "valid_loss": None, "tokens_per_s": 1430.4, "left_s": 80}
    assert report.progress_line("train", numbers) == "train     23/60  loss 0.210  1,430 tokens/s  1:20 left"
    assert report.progress_line("merge", {}) == "merge"


def test_the_comparison_shows_every_number_and_slice() -> None:
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in rendered(report.comparison(TASK)).splitlines() if "│" in line]
    assert rows == [
        ["Valid JSON", "10.0%", "100.0%"],
        ["Exact match (JSON)", "2.5%", "95.0%"],
        ["create (30)", "0.0%", "90.0%"],
        ["Failed requests (counted as wrong)", "2", "0"],
    ]


def test_a_judge_that_could_not_be_read_leaves_no_empty_table() -> None:
    judge = JudgeResult(model="umpire", cases=2, unparsable=12)
    told = rendered(evaluationreport.renderable(EvaluationRecord(tasks=[], seconds=0, judge=judge)))
    assert "Judge umpire: 2 cases. No case got a full verdict.\n12 verdicts could not be read" in told and "┏" not in told, told


def test_samples_are_cut_and_never_read_as_markup() -> None:
    text = rendered(report.samples(TASK), width=200)
    assert "add [bold]milk[/bold]" in text and '{"a":[1]}' in text
    assert "x..." in text and "x" * 300 not in text.replace("\n", "")


def test_the_curve_in_the_terminal_is_plain_text() -> None:
    text = report.curve_text(steps(20), width=60, height=12)
    assert "\x1b" not in text and "training loss" in text and "validation loss" in text
    assert max(map(len, text.splitlines())) <= 60
    assert "validation" not in report.curve_text(steps(3))  # and a run without any validation is drawn too


def test_the_curve_as_an_image(tmp_path: Path) -> None:
    path = tmp_path / "run" / "loss.png"
    report.curve_image(steps(20), path, "ft:base:me:job:1")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_the_four_lines_are_python_that_runs(tmp_path: Path) -> None:
    (tmp_path / "a key").write_text("secret")
    lines = report.python_lines("http://127.0.0.1:9/v1", tmp_path / "a key", "ft:b:o:s:1", [{"role": "user", "content": 'it\'s "urgent"'}])
    assert len(lines) == 4
    code = "\n".join(lines).replace("OpenAI(", "OpenAI(max_retries=0, ")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1].startswith("openai.APIConnectionError")  # it came as far as asking
