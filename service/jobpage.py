"""A job as one HTML page that needs nothing else: what it is, its losses, what its evaluation found, and what happened to it. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service import evaluationreport
from service.datareport import pages
from service.report import curves, when
from trainers.records import EvaluationRecord, StepRecord

WIDE, HIGH = 640.0, 220.0
MOST_POINTS = 800
"""Of a curve; more than a screen shows."""


def facts(wire: dict[str, Any], detail: dict[str, Any], data: str | None) -> dict[str, str]:
    """What `/v1/fine_tuning/jobs/ID` and `/v1/tuneyard/jobs/ID` tell, and the data in one line; what is empty is left out."""
    told = {
        "job": wire["id"],
        "status": wire["status"],
        "base": wire["model"],
        "model": wire["fine_tuned_model"],
        "waits for": detail["queue_reason"],
        "stage": detail["stage"],
        "attempt": detail["attempt"],
        "created": when(wire["created_at"]),
        "finished": when(wire["finished_at"]),
        "trained tokens": wire["trained_tokens"],
        "hyperparameters": ", ".join(f"{k} {v}" for k, v in wire["hyperparameters"].items()),
        "data": data,
        "error": (wire["error"] or {}).get("message"),
        "files": detail["run_dir"],
    }
    return {name: str(value) for name, value in told.items() if value not in (None, "")}


@dataclass(frozen=True)
class Plot:
    """Losses by step, in the picture's own units; the origin is at the top left."""

    train: str
    """Points of a line, as SVG wants them."""
    valid: list[tuple[float, float, str]]
    """(x, y, what it says)."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def plot(steps: Sequence[StepRecord]) -> Plot | None:
    """None where there is nothing to show."""
    (x, train), (vx, valid) = curves(steps)
    if not x:
        return None
    last, top = max(x), max(*train, *valid, 1e-9)
    unit = 10 ** math.floor(math.log10(top))
    tick = next(unit * part for part in (0.25, 0.5, 1, 2) if top / (unit * part) <= 5)
    top = tick * math.ceil(top / tick)

    def at(step: float, loss: float) -> tuple[float, float]:
        return round(WIDE * step / last, 1), round(HIGH * (1 - loss / top), 1)

    shown = range(0, len(x), math.ceil(len(x) / MOST_POINTS))
    return Plot(
        train=" ".join("{},{}".format(*at(x[i], train[i])) for i in (*shown, len(x) - 1)),
        valid=[(*at(step, loss), f"step {step}: validation loss {loss:.4f}") for step, loss in zip(vx, valid, strict=True)],
        x_ticks=[(at(step, 0)[0], f"{step:,}") for step in sorted({round(last * part / 4) for part in range(5)})],
        y_ticks=[(at(0, tick * i)[1], f"{tick * i:g}") for i in range(round(top / tick) + 1)],
    )


def page(told: dict[str, str], steps: Sequence[StepRecord], events: Sequence[dict[str, Any]], evaluation: EvaluationRecord | None) -> str:
    """`events` as `/v1/fine_tuning/jobs/ID/events` lists them, oldest first."""
    return pages().get_template("job.html").render(
        facts=told,
        plot=plot(steps),
        wide=WIDE,
        high=HIGH,
        rows=evaluationreport.rows(evaluation) if evaluation else [],
        compared=evaluation,
        events=[(when(event["created_at"]), event["level"], event["message"]) for event in events],
    )  # fmt: skip
