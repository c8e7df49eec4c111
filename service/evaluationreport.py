"""An evaluation as people read it: lines for a job's events, tables in the terminal, and one HTML page that needs nothing else. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from service import report
from service.datareport import pages, visible
from trainers.records import BenchmarkResult, Difference, EvaluationRecord, Fault, JudgeResult, LossResult, Pair, TaskResult

ALPHA = 0.05
MOST_PARTS = 10
"""Parts of a benchmark's groups that a terminal shows, those forgotten most; MMLU has 57."""


def lines(record: EvaluationRecord) -> list[str]:
    """What came out, one sentence a part."""
    told = []
    for task in record.tasks:
        base, tuned = task.base[task.metric], task.tuned[task.metric]
        change = task.differences.get(task.metric)
        beyond = f"; {said(change)}" if change else ""
        told.append(f"{task.name}: {task.metric} base {base:.1%}, tuned {tuned:.1%} ({task.examples} examples{beyond}).")
    if record.loss:
        told.append(_loss_line(record.loss))
    if record.judge and record.judge.win_rate is not None:
        told.append(_judge_line(record.judge))
    told += [
        f"{row.task}: {metric_text(row)} base {row.base:.4g}, tuned {row.tuned:.4g} (tuned minus base {row.tuned - row.base:+.4g})."
        for row in record.benchmarks
        if row.group is None
    ]
    return told + record.warnings


@dataclass(frozen=True)
class Row:
    """One number of both models, as text."""

    name: str
    metric: str
    base: str
    tuned: str
    difference: str
    """Tuned minus base."""
    interval: str = ""
    verdict: str = "same"
    """`better`, `worse` or `same`, as far as chance allows to say."""


def rows(record: EvaluationRecord) -> list[Row]:
    """What came out, a row a number: each task's deciding one, the loss, the judge, each benchmark as a whole."""
    found = []
    for task in record.tasks:
        base, tuned = task.base[task.metric], task.tuned[task.metric]
        change = task.differences.get(task.metric)
        beyond = f"{change.low:+.1%} to {change.high:+.1%}, p {p_text(change.p)}" if change else ""
        name = report.NAMES.get(task.metric, task.metric)
        found.append(Row(task.name, name, f"{base:.1%}", f"{tuned:.1%}", f"{tuned - base:+.1%}", beyond, verdict_of(change)))
    if loss := record.loss:
        low, high = loss.difference or (0.0, 0.0)
        beyond = f"{low:+.4f} to {high:+.4f}" if loss.difference else "counted in different tokens"
        verdict = "better" if high < 0 else "worse" if low > 0 else "same"
        apart = f"{loss.tuned - loss.base:+.4f}"
        found.append(Row("Held-out answers", "Loss", f"{loss.base:.4f}", f"{loss.tuned:.4f}", apart, beyond, verdict))
    if (judge := record.judge) and judge.win_rate is not None and judge.win_rate_interval:
        low, high = judge.win_rate_interval
        verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "same"
        found.append(Row(f"Judge {judge.model}", "Win rate", "", f"{judge.win_rate:.0%}", "", f"{low:.0%} to {high:.0%}", verdict))
    for row in record.benchmarks:
        if row.group is None:
            values = (f"{row.base:.4g}", f"{row.tuned:.4g}", f"{row.tuned - row.base:+.4g}")
            found.append(Row(row.task, metric_text(row), *values))
    return found


def said(change: Difference) -> str:
    """A difference in words, with its interval."""
    what = f"difference {change.difference:+.1%}, 95% interval {change.low:+.1%} to {change.high:+.1%}, p = {p_text(change.p)}"
    return what if change.p < ALPHA else f"no difference beyond chance: {what}"


def verdict_of(change: Difference | None) -> str:
    """`better`, `worse` or `same`, as far as chance allows to say."""
    if change is None or change.p >= ALPHA:
        return "same"
    return "better" if change.difference > 0 else "worse"


def p_text(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.3f}".rstrip("0").rstrip(".")


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _loss_line(loss: LossResult) -> str:
    both = f"base {loss.base:.3f} (perplexity {perplexity(loss.base):.2f}), tuned {loss.tuned:.3f} ({perplexity(loss.tuned):.2f})"
    return f"Loss on {loss.examples} held-out answers ({loss.source}): {both}."


def _judge_line(judge: JudgeResult) -> str:
    assert judge.win_rate is not None and judge.win_rate_interval is not None
    low, high = judge.win_rate_interval
    pairs = judge.wins + judge.losses + judge.ties
    return (
        f"Judge {judge.model}: the tuned model wins {judge.win_rate:.0%} of {pairs} pairs (95% interval {low:.0%} to {high:.0%}); "
        f"{judge.disagreements} were judged differently in the two orders."
    )


# -- terminal ------------------------------------------------------------------------------------------------------------


def renderable(record: EvaluationRecord) -> RenderableType:
    """For a rich console of any width."""
    parts: list[RenderableType] = [Text(visible(f"{record.tuned} against {record.base}"), style="bold")]
    for task in record.tasks:
        parts += [Text(""), report.comparison(task), *_told(task)]
    if record.loss:
        parts += [Text(""), Text(_loss_line(record.loss))]
    if record.judge:
        parts += [Text(""), _judged(record.judge)]
    if record.benchmarks:
        parts += [Text(""), _benchmarks(record)]
    parts += [Text(visible(warning), style="yellow") for warning in record.warnings]
    return Group(*parts)


def _benchmarks(record: EvaluationRecord) -> RenderableType:
    table = Table(title="Benchmarks (lm-evaluation-harness); tuned minus base shows what was forgotten", title_justify="left")
    for name in ("task", "metric", "base", "tuned", "difference", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    groups = {row.group for row in record.benchmarks}
    parts = [row for row in record.benchmarks if row.group is not None and row.task not in groups]
    left_out = sorted(parts, key=lambda row: row.gain)[MOST_PARTS:]
    for row in record.benchmarks:
        if row not in left_out:
            task = visible(row.task) if row.group is None else f"  {visible(row.task)}"
            table.add_row(task, metric_text(row), f"{row.base:.4g}", f"{row.tuned:.4g}", f"{row.tuned - row.base:+.4g}", error_text(row))
    if left_out:
        table.caption = f"{len(left_out)} parts that were forgotten less are left out; --json, and --output FILE.html, have them all."
    return table


def metric_text(row: BenchmarkResult) -> str:
    return f"{row.metric} (less is better)" if row.less_is_better else row.metric


def error_text(row: BenchmarkResult) -> str:
    """Standard error of the difference, as if the two models had answered different questions; it is less, as they answer the same."""
    return "" if row.base_error is None or row.tuned_error is None else f"{math.hypot(row.base_error, row.tuned_error):.2g}"


def _told(task: TaskResult) -> list[RenderableType]:
    style = {"better": "green", "worse": "red", "same": "dim"}
    change = task.differences.get(task.metric)
    told: list[RenderableType] = [Text(f"{task.metric}: {said(change)}.", style=style[verdict_of(change)])] if change else []
    told += [Text(visible(warning), style="yellow") for warning in task.warnings]
    if task.faults:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for name in ("fault", "base", "tuned", "p"):
            table.add_column(name, justify="left" if name == "fault" else "right")
        for fault in task.faults:
            table.add_row(fault.kind.replace("_", " "), str(fault.base), str(fault.tuned), p_text(fault.p))
        told += [table]
    return told


def _judged(judge: JudgeResult) -> RenderableType:
    table = Table(title=f"Judge {visible(judge.model)}: {judge.cases} cases", title_justify="left")
    for name in ("", "base", "tuned", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for criterion, row in judge.rubric.items():
        change = Difference.model_validate(row["difference"])
        table.add_row(criterion, f"{row['base']:.2f}", f"{row['tuned']:.2f}", f"{change.difference:+.2f} (p {p_text(change.p)})")
    if judge.unsupported:
        table.add_row("unsupported claims", str(judge.unsupported.base), str(judge.unsupported.tuned), f"p {p_text(judge.unsupported.p)}")
    lines = [Text(_judge_line(judge))] if judge.win_rate is not None else []
    if judge.unparsable or judge.failed_requests:
        lines.append(Text(f"{judge.unparsable} verdicts could not be read, {judge.failed_requests} requests failed.", style="yellow"))
    return Group(table if table.rows else Text(f"{table.title}. No case got a full verdict."), *lines)


# -- HTML ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One row of a plot: means and intervals of both models, as shares (0-1) of the scale."""

    label: str
    told: dict[str, str]
    at: dict[str, tuple[float, float, float]]
    """Model -> (low, mean, high)."""


def page(record: EvaluationRecord) -> str:
    """One HTML page without any outside part: it can be kept, mailed, or opened from a file."""
    return pages().get_template("evaluation.html").render(
        record=record,
        lines=lines(record),
        tasks=[(task, _marks(task), verdict_of(task.differences.get(task.metric))) for task in record.tasks],
        rubric=_rubric_marks(record.judge) if record.judge else [],
        judge_line=_judge_line(record.judge) if record.judge and record.judge.win_rate is not None else None,
        said=said,
        p_text=p_text,
        perplexity=perplexity,
        names=report.NAMES,
        faults=_all_faults(record),
        error_text=error_text,
        metric_text=metric_text,
    )  # fmt: skip


def _marks(task: TaskResult) -> list[Mark]:
    """Every number of the task, then the deciding one for each slice."""
    found = []
    for name in task.base:
        pairs = {m: task.intervals.get(m, {}).get(name) for m in ("base", "tuned")}
        means = {"base": task.base[name], "tuned": task.tuned[name]}
        found.append(_mark(report.NAMES.get(name, name), means, pairs))
    for name, slice in task.slices.items():
        means = {m: slice[m][task.metric] for m in ("base", "tuned")}
        found.append(_mark(f"{name} ({slice['examples']})", means, slice.get("intervals", {})))
    return found


def _mark(label: str, means: dict[str, float], pairs: dict[str, Any]) -> Mark:
    at = {}
    for model, mean in means.items():
        low, high = pairs.get(model) or (mean, mean)
        at[model] = tuple(min(1.0, max(0.0, value)) for value in (low, mean, high))
    told = {model: f"{label}, {model}: {means[model]:.1%}, 95% interval {a[0]:.1%} to {a[2]:.1%}" for model, a in at.items()}
    return Mark(label, told, at)


def _rubric_marks(judge: JudgeResult) -> list[Mark]:
    found = []
    for criterion, row in judge.rubric.items():
        at, told = {}, {}
        for model in ("base", "tuned"):
            pair: Pair = row["intervals"][model]
            at[model] = tuple((value - 1) / 4 for value in (pair[0], row[model], pair[1]))
            told[model] = f"{criterion}, {model}: {row[model]:.2f}, 95% interval {pair[0]:.2f} to {pair[1]:.2f}"
        found.append(Mark(criterion, told, at))
    return found


def _all_faults(record: EvaluationRecord) -> list[tuple[str, int, Fault]]:
    """(task, cases, fault) of all tasks, and what the judge found."""
    found = [(task.name, task.examples, fault) for task in record.tasks for fault in task.faults]
    if record.judge and record.judge.unsupported:
        found.append(("judged cases", record.judge.cases, record.judge.unsupported))
    return found
