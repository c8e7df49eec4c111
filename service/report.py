"""What a finished job looks like: tables, curves and lines made from its records. Pure, but for writing the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trainers.records import StepRecord, TaskResult

NAMES = {
    "exact_match": "Exact match",
    "json_match": "Exact match (JSON)",
    "valid_json": "Valid JSON",
    "json_schema": "Meets the schema",
    "regex": "Matches the pattern",
    "contains": "Holds the reference",
    "choice": "Right choice",
    "choice_by_length": "Right choice (by likelihood per byte)",
    "rouge": "ROUGE-L",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "bleu": "BLEU",
    "chrf": "chrF",
}


def duration(seconds: float) -> str:
    """7.3 -> "7 s", 83 -> "1:23", 3700 -> "1:01:40"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def when(seconds: float | None) -> str:
    """In this machine's time."""
    return "" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def progress_line(stage: str, numbers: dict[str, Any]) -> str:
    """One line of what a run does now, from the numbers of its progress record; what is not known is left out."""
    parts = [f"{stage:<8}"]
    if numbers.get("total"):
        parts.append(f"{numbers.get('done', 0)}/{numbers['total']}")
    if numbers.get("train_loss") is not None:
        parts.append(f"loss {numbers['train_loss']:.3f}")
    if numbers.get("valid_loss") is not None:
        parts.append(f"validation {numbers['valid_loss']:.3f}")
    if numbers.get("tokens_per_s"):
        parts.append(f"{numbers['tokens_per_s']:,.0f} tokens/s")
    if numbers.get("left_s") is not None:
        parts.append(f"{duration(numbers['left_s'])} left")
    return "  ".join(parts).rstrip()


def comparison(task: TaskResult) -> Table:
    """Base against tuned: every number of the task, then the deciding one for each slice."""
    table = Table(title=f"{task.name}: {task.examples} held-out examples", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    for metric in sorted(task.base, key=lambda name: name == task.metric):  # the deciding number last, above its slices
        table.add_row(NAMES.get(metric, metric), f"{task.base[metric]:.1%}", f"{task.tuned[metric]:.1%}")
    for name, slice in task.slices.items():
        table.add_row(f"  {name} ({slice['examples']})", f"{slice['base'][task.metric]:.1%}", f"{slice['tuned'][task.metric]:.1%}")
    if any(task.failed_requests.values()):
        counts = [str(task.failed_requests.get(model, 0)) for model in ("base", "tuned")]
        table.add_row("Failed requests (counted as wrong)", *counts)
    return table


def samples(task: TaskResult, longest: int = 160) -> Table:
    """A few answers of both models side by side."""
    table = Table(title="Sample answers", title_justify="left", show_lines=True)
    for column in ("request", "base", "tuned"):
        table.add_column(column, ratio=1, overflow="fold")
    for sample in task.samples:
        # Text, not str: a model's answer may hold [brackets] that rich would take for markup.
        cells = [re.sub(r"\s+", " ", sample[key]).strip() for key in ("prompt", "base", "tuned")]
        table.add_row(*(Text(cell if len(cell) <= longest else cell[: longest - 3] + "...") for cell in cells))
    return table


def curves(steps: Sequence[StepRecord]) -> tuple[tuple[list[int], list[float]], tuple[list[int], list[float]]]:
    """(steps, training loss) and (steps, validation loss), the latter only where there was a validation."""
    validated = [(s.step, s.valid_loss) for s in steps if s.valid_loss is not None]
    return ([s.step for s in steps], [s.train_loss for s in steps]), ([s for s, _ in validated], [v for _, v in validated])


def curve_text(steps: Sequence[StepRecord], width: int = 90, height: int = 16) -> str:
    """The loss curve as plain text."""
    import plotext

    (x, train), (vx, valid) = curves(steps)
    plotext.clear_figure()
    plotext.plot_size(width, height)
    plotext.theme("clear")
    plotext.plot(x, train, label="training loss")
    if vx:
        plotext.scatter(vx, valid, label="validation loss", marker="o")
    plotext.xlabel("step")
    text = re.sub(r"\x1b\[[0-9;]*m", "", plotext.build())
    return "\n".join(line.rstrip() for line in text.splitlines())


def curve_image(steps: Sequence[StepRecord], path: Path, title: str) -> None:
    """The loss curve as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (x, train), (vx, valid) = curves(steps)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, train, label="training")
    if vx:
        axes.plot(vx, valid, "o-", label="validation")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss per supervised token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def python_lines(base_url: str, key_file: Path, model: str, messages: list[dict[str, str]]) -> list[str]:
    """The four lines that call a model, ready to paste."""
    return [
        "from openai import OpenAI",
        f"client = OpenAI(base_url={base_url!r}, api_key=open({str(key_file)!r}).read())",
        f"answer = client.chat.completions.create(model={model!r}, temperature=0, messages={messages!r})",
        "print(answer.choices[0].message.content)",
    ]
