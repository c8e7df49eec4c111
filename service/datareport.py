"""A data report as people read it: in the terminal, as one HTML page that needs nothing else, and as JSON for programs.

Pure. What is said here is said about a `DataReport`; where it came from (`tuneyard check`, or a job that prepared) does not matter.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from service.report import duration
from trainers.records import DataReport, Finding, SourceReport, SplitReport
from trainers.spec import JobSpec

NUM_BINS = 12
"""Bars of a length chart, at most."""

CASES = 3
"""Cases of a finding that the terminal shows; those that stop a job are all shown."""

SIZES = (
    (0, "under 50", "Too few to tune on: put the best of them into the prompt instead (few-shot), and collect more."),
    (50, "50 to 99", "The least for a first try; compare with few-shot prompting on examples that were held out."),
    (100, "100 to 499", "Enough to teach a style, a tone or an output format."),
    (500, "500 to 999", "Enough for one narrow task in production."),
    (1_000, "1,000 to 9,999", "Enough for a broad task, or for several at once."),
    (10_000, "10,000 and more", "Broad skills. More rows now help less than better ones: mind duplicates, conflicts and balance."),
)
"""(fewest examples, the range in words, what such a set is good for)."""

DONE = {
    "report": "seen",
    "drop": "left out",
    "mask": "masked",
    "refuse": "stop a job",
    "repeat": "repeated",
    "thin": "left out of an epoch",
    "shorten": "shortened",
    "split": "split",
    "drop turns": "lost turns",
}
"""What `Finding.action` means to the rows."""

TITLES = {
    "refused": "Refused rows",
    "overlength": "Longer than max_length",
    "min_answer_chars": "Short answers",
    "max_answer_chars": "Long answers",
    "max_turns": "Many turns",
    "junk": "Junk text",
    "languages": "Other languages",
    "personal_data": "Personal data",
    "near_duplicates": "Near-duplicates",
    "balance": "Class balance",
    "mixture": "Mixture",
}

REMEDIES = {
    "refused": "A job stops at the first of these: mend the rows, or remove them.",
    "overlength": "Raise model.max_length, or set model.overlength to drop, truncate_prompt or split_turns.",
    "duplicates": "Repeats only weigh a row more: `data.curate.duplicates: drop` keeps the first.",
    "near_duplicates": "Almost the same rows add little: `data.curate.near_duplicates: {action: drop}` keeps the first of each kind.",
    "conflicts": "One prompt with several answers teaches guessing: keep one answer, or set `data.curate.conflicts: drop`.",
    "leakage": "Held-out numbers will look too good: `data.curate.leakage: drop` takes these rows out of training.",
    "refusals": "The model will learn to decline: `data.curate.refusals: drop`, unless declining is the task.",
    "repetition": "The model will learn to repeat itself: `data.curate.repetition: drop`.",
    "junk": "This is no language the model should learn: `data.curate.junk: drop`, or mend the export that made it.",
    "personal_data": "A tuned model can repeat what it saw: `data.curate.personal_data: mask` replaces it.",
}
"""What to do about a finding that was only reported, or that stops a job."""


@dataclass(frozen=True)
class Note:
    """One finding, in words."""

    title: str
    rows: int
    done: str
    """What happens to the rows."""
    what_to_do: str
    """Empty where it has been done."""
    kinds: list[tuple[str, str]]
    """(kind, count), most frequent first, where there are several."""
    cases: list[tuple[str, str]]
    """(`file:line`, what was found there)."""
    stops: bool
    """A job on this data would not start."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training examples costs."""

    examples: int
    tokens: int
    batch_size: int
    steps: int
    tokens_per_s: float | None = None
    """As measured; None where no run is known to go by, because a guess would be none."""
    measured_in: str | None = None
    """The run that it was measured in."""

    @property
    def told(self) -> str:
        text = f"{self.steps:,} step{'' if self.steps == 1 else 's'} of {self.batch_size} examples, {self.tokens:,} tokens"
        if self.tokens_per_s:
            return (
                f"{text}; about {duration(self.tokens / self.tokens_per_s)} at {self.tokens_per_s:,.0f} tokens/s, as {self.measured_in} ran"
            )
        return f"{text}. Its time is known once a job on this base model has run here."


def about(spec: JobSpec) -> dict[str, Any]:
    """What a report is about, beside the data."""
    model = spec.model
    return {"model": model.base, "template": model.template, "max_length": model.max_length, "train_on": spec.data.train_on}


def epoch_of(report: DataReport, batch_size: int, speed: tuple[float, str] | None = None) -> Epoch:
    """The cost of one epoch; `speed` is (tokens/s, the run it was measured in)."""
    train = report.train
    rate, run = speed or (None, None)
    return Epoch(train.examples, train.tokens, batch_size, -(-train.examples // batch_size), rate, run)


def starts(report: DataReport) -> bool:
    """Whether a job on this data would start."""
    return report.train.examples > 0 and not any(note.stops for note in notes(report))


def verdict(report: DataReport) -> str:
    """The report in one line."""
    blocking = [note for note in notes(report) if note.stops]
    read = sum(source.read for source in report.sources)
    if blocking:
        return f"Not ready: {' and '.join(f'{note.title.lower()} ({note.rows:,} of {read:,})' for note in blocking)}."
    if not report.train.examples:
        return "Not ready: no example is left to train on."
    return f"Ready: {report.train.examples:,} training and {report.validation.examples:,} validation examples."


def notes(report: DataReport) -> list[Note]:
    """What was found, first what stops a job, then the largest; what was looked for and not found is left out."""
    found = [_note(finding) for finding in report.findings if finding.rows]
    return sorted(found, key=lambda note: (not note.stops, -note.rows))


def _note(finding: Finding) -> Note:
    stops = finding.action == "refuse"
    title = TITLES.get(finding.step) or finding.step.replace("_", " ").capitalize()
    todo = REMEDIES.get(finding.step, "") if stops or finding.action == "report" else ""
    kinds = sorted(finding.detail.items(), key=lambda kind: -kind[1])
    if [number for _, number in kinds] == [finding.rows]:
        kinds = []  # all of one kind: the title says it
    return Note(
        title=title,
        rows=finding.rows,
        done=DONE.get(finding.action, finding.action),
        what_to_do=todo,
        kinds=[(kind, f"{number:,.6g}") for kind, number in kinds],
        # An error names its row itself.
        cases=[(case.where, " ".join(case.text.removeprefix(case.where).removeprefix(":").split())) for case in finding.cases],
        stops=stops,
    )


def size_guide(examples: int) -> list[tuple[str, str, bool]]:
    """(range, what such a set is good for, whether this set is one)."""
    here = max(fewest for fewest, _, _ in SIZES if fewest <= examples)
    return [(range, text, fewest == here) for fewest, range, text in SIZES]


def histogram(split: SplitReport, bins: int = NUM_BINS) -> list[tuple[str, int]]:
    """(lengths of the bin, examples in it), shortest first, at most `bins` of them; empty ones before the first example are left out."""
    each = -(-len(split.lengths) // bins) or 1
    out, low = [], 1
    for i in range(0, len(split.lengths), each):
        group = split.lengths[i : i + each]
        out.append((f"{low:,}-{group[-1][0]:,}", sum(count for _, count in group)))
        low = group[-1][0] + 1
    return [*itertools.dropwhile(lambda bar: not bar[1], out)]


def left_out(source: SourceReport) -> list[tuple[str, int]]:
    """(reason, rows): the many reasons to refuse a row stand among the findings, here they count as one."""
    reasons: Counter[str] = Counter()
    for reason, count in source.dropped.items():
        reasons[reason.split(":")[0]] += count
    return reasons.most_common()


def lineage(report: DataReport) -> list[tuple[str, str]]:
    """(what, which) of all that went in, by name and hash."""
    return [
        *(("requested by", name) for name in [report.requested_by] if name),
        *((f"source {source.name}", f"{source.url} sha256 {source.sha256}") for source in report.sources),
        ("template", f"sha256 {report.template_sha256}"),
        ("tokenizer", f"sha256 {report.tokenizer_sha256}, read by {report.tokenizer}"),
    ]


def shares(report: DataReport) -> list[tuple[str, int, int, float]]:
    """(slice, training examples, validation examples, its share of all training examples), largest first."""
    train, validation = report.train.slices, report.validation.slices
    names = sorted({*train, *validation}, key=lambda name: (-train.get(name, 0), name))
    total = sum(train.values()) or 1
    return [(name, train.get(name, 0), validation.get(name, 0), train.get(name, 0) / total) for name in names]


def line(report: DataReport) -> str:
    """The report in the space of one table cell."""
    train, read = report.train, sum(source.read for source in report.sources)
    left_out = sum(count for source in report.sources for count in source.dropped.values())
    return (
        f"{read:,} rows read, {left_out:,} left out; {train.examples:,} training and {report.validation.examples:,} validation examples, "
        f"{train.tokens:,} tokens, {_percent(train.supervised_tokens, train.tokens)} supervised"
    )


def to_json(report: DataReport, about: dict[str, Any], epoch: Epoch | None = None) -> dict[str, Any]:
    """The report with what is concluded from it. `about` says what was asked: model, template and the like."""
    return {
        "object": "tuneyard.check",
        "starts": starts(report),
        "verdict": verdict(report),
        **about,
        "notes": [asdict(note) for note in notes(report)],
        "size_guide": [{"examples": range, "good_for": text, "here": here} for range, text, here in size_guide(report.train.examples)],
        "epoch": asdict(epoch) if epoch else None,
        "report": report.model_dump(mode="json"),
    }


def visible(text: str) -> str:
    """`text` with what would act on a terminal, hide, or reorder what is shown, written as escapes."""
    return "".join(c if c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else _escape(c) for c in text)


def readable(text: str) -> str:
    """The same for text that is shown in lines of its own."""
    return "\n".join(map(visible, text.split("\n")))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"


# -- terminal ------------------------------------------------------------------------------------------------------------


def renderable(report: DataReport, about: dict[str, Any], epoch: Epoch | None = None) -> RenderableType:
    """The report for a rich console of any width."""
    good = starts(report)
    parts: list[RenderableType] = [
        Text(verdict(report), style="bold green" if good else "bold red"),
        Text("  ".join(f"{name} {visible(str(value))}" for name, value in about.items() if value is not None), style="dim"),
        *_section("Sources", _sources(report)),
        *_section("Examples and their tokens", _tokens(report)),
    ]
    if report.train.lengths:
        parts += _section("Lengths of training examples, in tokens", _bars(histogram(report.train)))
    parts += _section("Findings", *(_finding(note) for note in notes(report))) if notes(report) else []
    if groups := shares(report):
        parts += _section("Slices", _slices(groups))
    parts += _section("How far this many examples go", _sizes(report.train.examples))
    if epoch:
        parts += _section("One epoch", Text(epoch.told))
    return Group(*parts)


def _section(title: str, *body: RenderableType) -> list[RenderableType]:
    return [Text(""), Text(title, style="bold"), *body]


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        number = name in right
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*(Text(visible(cell)) for cell in cells))  # Text, not str: a name may hold [brackets] that rich would take for markup


def _sources(report: DataReport) -> Table:
    table = _table("source", "read", "kept", "left out", "what it is", right=("read", "kept"))
    for source in report.sources:
        weight = f" x {source.weight:g}" if source.weight != 1 else ""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in left_out(source))
        what = [source.format, _size(source.bytes), f"sha256 {source.sha256[:8]}", *([source.licence] if source.licence else [])]
        _add(table, source.name + weight, f"{source.read:,}", f"{source.kept:,}", dropped or "-", ", ".join(what))
    return table


def _tokens(report: DataReport) -> Table:
    table = _table("", "training", "validation", right=("training", "validation"))
    both = (report.train, report.validation)
    _add(table, "examples", *(f"{split.examples:,}" for split in both))
    _add(table, "tokens", *(f"{split.tokens:,}" for split in both))
    _add(table, "supervised", *(f"{split.supervised_tokens:,} ({_percent(split.supervised_tokens, split.tokens)})" for split in both))
    _add(table, "half of them up to", *(f"{split.length_p50:,}" for split in both))
    _add(table, "95% of them up to", *(f"{split.length_p95:,}" for split in both))
    _add(table, "longest", *(f"{split.length_max:,}" for split in both))
    return table


def _bars(bins: list[tuple[str, int]]) -> Table:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, min_width=10)
    table.add_column(justify="right", no_wrap=True)
    most = max(count for _, count in bins) or 1
    for label, count in bins:
        table.add_row(label, Bar(most, 0, count, color="cyan"), f"{count:,}")
    return table


def _finding(note: Note) -> RenderableType:
    head = Text(f"{note.title}: {note.rows:,} {note.done}", style="red" if note.stops else "yellow" if note.what_to_do else "")
    if note.kinds:
        head.append(visible(" (" + ", ".join(f"{number} {kind}" for kind, number in note.kinds) + ")"), style="default")
    body = Text(note.what_to_do, style="green") if note.what_to_do else Text()
    for where, found in note.cases[: None if note.stops else CASES]:
        body.append("\n" if body else "").append(visible(where), style="not green dim").append(f"  {visible(found)}", style="default")
    return Group(head, Padding(body, (0, 0, 0, 2))) if body else head


def _slices(groups: list[tuple[str, int, int, float]]) -> Table:
    right = ("training", "validation", "share")
    table = _table("slice", *right, right=right)
    for name, train, validation, share in groups:
        _add(table, name, f"{train:,}", f"{validation:,}", f"{share:.1%}")
    return table


def _sizes(examples: int) -> Table:
    table = Table.grid(padding=(0, 1))
    for range, text, here in size_guide(examples):
        table.add_row(">" if here else "", Text(range), Text(text), style="bold" if here else "dim")
    return table


# -- HTML ----------------------------------------------------------------------------------------------------------------


def page(report: DataReport, about: dict[str, Any], epoch: Epoch | None = None) -> str:
    """The report as one HTML page without any outside part: it can be kept, mailed, or opened from a file."""
    bins = histogram(report.train)
    most = max((count for _, count in bins), default=0) or 1
    return pages().get_template("report.html").render(
        report=report,
        about={name: value for name, value in about.items() if value is not None},
        verdict=verdict(report),
        starts=starts(report),
        notes=notes(report),
        bins=[(label, count, count / most) for label, count in bins],
        shares=shares(report),
        sizes=size_guide(report.train.examples),
        left_out=left_out,
        lineage=lineage(report),
        recipe=json.dumps(report.recipe, indent=2),
        epoch=epoch.told if epoch else None,
    )  # fmt: skip


@functools.cache
def pages() -> jinja2.Environment:
    """The templates in `pages/`, which escape all that is put into them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": lambda n: f"{n:,}",
        "percent": lambda x: f"{x:.1%}",
        "size": _size,
        "visible": visible,
        "readable": readable,
        "code": _code,
    }
    return environment


def _code(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
