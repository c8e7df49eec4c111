"""A job's page, made from records alone."""

from __future__ import annotations

import re

from service import jobpage
from tests.service.test_report import TASK, steps
from trainers.records import BenchmarkResult, Difference, EvaluationRecord, JudgeResult, LossResult

WIRE = {
    "id": "ftjob-1",
    "status": "succeeded",
    "model": "base",
    "fine_tuned_model": "ft:<b>mine</b>",
    "created_at": 1_700_000_000,
    "finished_at": None,
    "trained_tokens": 12,
    "hyperparameters": {"n_epochs": 2},
    "error": None,
}
DETAIL = {"queue_reason": None, "stage": "done", "attempt": 1, "run_dir": "runs/1"}
CHANGE = Difference(difference=0.925, low=0.8, high=1.0, p=0.0001, better=37, worse=0)
EVALUATION = EvaluationRecord(
    tasks=[
        TASK.model_copy(
            update={"differences": {"json_match": Difference(difference=0.925, low=0.8, high=1.0, p=0.0001, better=37, worse=0)}}
        )
    ],
    seconds=1.0,
    base="base",
    tuned="ft:<b>mine</b>",
    loss=LossResult(
        source="validation split",
        examples=5,
        tokens={"base": 9, "tuned": 9},
        base=2.0,
        tuned=2.5,
        intervals={"base": (1.9, 2.1), "tuned": (2.4, 2.6)},
        difference=(0.4, 0.6),
    ),
    judge=JudgeResult(model="judge", cases=4, wins=2, losses=2, win_rate=0.5, win_rate_interval=(0.15, 0.85)),
    benchmarks=[BenchmarkResult(task="mmlu", metric="acc,none", base=0.25, tuned=0.2)],
)


def test_facts_leave_out_what_is_empty() -> None:
    facts = jobpage.facts(WIRE, DETAIL, None)
    assert list(facts) == ["job", "status", "base", "model", "stage", "attempt", "created", "trained tokens", "hyperparameters", "files"]
    assert facts["hyperparameters"] == "n_epochs 2" and facts["trained tokens"] == "12"


def test_the_page_has_curve_rows_and_events() -> None:
    events = [{"created_at": 1_700_000_000, "level": "error", "message": "It went <i>wrong</i>."}]
    text = jobpage.page(jobpage.facts(WIRE, DETAIL, "5 rows"), steps(20), events, EVALUATION)
    assert "<b>mine" not in text and "<i>wrong" not in text and "&lt;i&gt;wrong" in text
    assert "step 20: validation loss 0.1250" in text and text.count("<circle") == 4
    cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", text, re.S)]
    rows = {tuple(cells[i : i + 6]) for i in range(len(cells) - 5)}
    assert ("test.jsonl", "Exact match (JSON)", "2.5%", "95.0%", "+92.5%", "+80.0% to +100.0%, p below 0.001") in rows
    assert ("Held-out answers", "Loss", "2.0000", "2.5000", "+0.5000", "+0.4000 to +0.6000") in rows
    assert ("Judge judge", "Win rate", "", "50%", "", "15% to 85%") in rows
    assert ("mmlu", "acc,none", "0.25", "0.2", "-0.05", "") in rows
    assert re.search(r'<td class="n good">\+92\.5%', text) and re.search(r'<td class="n bad">\+0\.5000', text)


def test_a_job_that_has_not_begun() -> None:
    text = jobpage.page(jobpage.facts(WIRE | {"status": "queued", "fine_tuned_model": None}, DETAIL, None), [], [], None)
    assert "<svg" not in text and "Evaluation" not in text and "ftjob-1" in text


def test_the_curve_stays_in_its_picture() -> None:
    plot = jobpage.plot(steps(5000))
    assert plot is not None
    points = [tuple(map(float, point.split(","))) for point in plot.train.split()]
    assert len(points) <= jobpage.MOST_POINTS + 1 and points[-1][0] == jobpage.WIDE
    assert all(0 <= x <= jobpage.WIDE and 0 <= y <= jobpage.HIGH for x, y in points)
    assert plot.y_ticks[0] == (jobpage.HIGH, "0") and plot.y_ticks[-1] == (0.0, "3") and plot.x_ticks[-1] == (640.0, "5,000")
