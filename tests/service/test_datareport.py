"""A data report as people and programs get it: what it concludes, and that it shows all there is and nothing that acts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from service import datareport
from trainers.records import Case, DataReport, Finding, SourceReport, SplitReport

ABOUT = {"model": "smollm2-135m-instruct", "template": "auto", "max_length": 2048, "train_on": "assistant"}


def report(*findings: Finding, examples: int = 700, **train: object) -> DataReport:
    lengths = [(64 * i, examples // (2 * i)) for i in range(1, 33)]
    split = SplitReport(
        examples=examples,
        tokens=examples * 120,
        supervised_tokens=examples * 30,
        length_p50=96,
        length_p95=512,
        length_max=2011,
        lengths=lengths,
        slices={"create": examples - 100, "list": 80, "[red]odd[/red]": 20} if examples > 100 else {},
    ).model_copy(update=train)
    source = SourceReport(
        name="train.jsonl",
        url="s3://bucket/train.jsonl",
        format="alpaca",
        bytes=1_234_567,
        sha256="9f3a01bc" * 8,
        licence="MIT",
        weight=2.0,
        read=examples + 3,
        kept=examples,
        dropped={"refused": 3},
        examples=examples,
    )
    return DataReport(
        requested_by="project acme, key_1",
        recipe={"mask": 2},
        sources=[source],
        findings=list(findings),
        train=split,
        validation=SplitReport(),
        template_sha256="t",
        tokenizer_sha256="k",
    )


REFUSED = Finding(
    step="refused",
    action="refuse",
    rows=3,
    detail={"is not JSON": 2, "has no `output`": 1},
    cases=[Case(where="train.jsonl:17", text="is not JSON (Expecting value). Write one JSON object per line.")],
)
CONFLICTS = Finding(
    step="conflicts", action="report", rows=12, cases=[Case(where="train.jsonl:5", text="<b>2+2?</b> \x1b[31mred\x1b[0m [bold]x")]
)
DUPLICATES = Finding(step="duplicates", action="drop", rows=40)
NOTHING = Finding(step="junk", action="report", rows=0)


def shown(report: DataReport, width: int = 100, **more: Any) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(datareport.renderable(report, ABOUT, **more))
    console.file.close()
    return console.export_text()


def test_what_stops_a_job_decides_the_verdict_and_comes_first() -> None:
    bad, good = report(DUPLICATES, CONFLICTS, REFUSED), report(DUPLICATES, CONFLICTS)
    assert not datareport.starts(bad) and datareport.verdict(bad) == "Not ready: refused rows (3 of 703)."
    assert datareport.starts(good) and "700 training" in datareport.verdict(good)
    assert [note.title for note in datareport.notes(bad)] == ["Refused rows", "Duplicates", "Conflicts"]
    assert not datareport.starts(report(examples=0)) and "no example is left" in datareport.verdict(report(examples=0))


def test_a_finding_says_what_to_do_only_while_there_is_something_to_do() -> None:
    refused, duplicates, conflicts = datareport.notes(report(REFUSED, DUPLICATES, CONFLICTS, NOTHING))
    assert "mend the rows" in refused.what_to_do and refused.kinds == [("is not JSON", "2"), ("has no `output`", "1")]
    assert duplicates.done == "left out" and duplicates.what_to_do == ""
    assert "data.curate.conflicts" in conflicts.what_to_do


@pytest.mark.parametrize(
    ("examples", "range"),
    [
        (0, "under 50"),
        (49, "under 50"),
        (50, "50 to 99"),
        (100, "100 to 499"),
        (999, "500 to 999"),
        (1000, "1,000 to 9,999"),
        (10**6, "10,000 and more"),
    ],
)
def test_the_guide_marks_one_row(examples: int, range: str) -> None:
    assert [r for r, _, here in datareport.size_guide(examples) if here] == [range]


def test_the_chart_has_few_bars_and_counts_every_example() -> None:
    split = report().train
    bars = datareport.histogram(split)
    assert len(bars) <= datareport.NUM_BINS and sum(count for _, count in bars) == sum(count for _, count in split.lengths)
    assert bars[0][0] == "1-192" and bars[1][0] == "193-384" and bars[-1][0].endswith("-2,048")
    assert datareport.histogram(SplitReport()) == []


def test_an_epochs_time_is_told_only_if_it_was_measured() -> None:
    assert datareport.epoch_of(report(), 16).steps == 44
    assert (
        datareport.epoch_of(report(), 16).told
        == "44 steps of 16 examples, 84,000 tokens. Its time is known once a job on this base model has run here."
    )
    assert "about 3:30 at 400 tokens/s, as ftjob-x ran" in datareport.epoch_of(report(), 16, (400.0, "ftjob-x")).told


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_the_terminal_shows_all_of_it_at_any_width(width: int) -> None:
    text = shown(report(REFUSED, CONFLICTS, DUPLICATES), width, epoch=datareport.epoch_of(report(), 16))
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text, "data cannot act on the terminal"
    dense = re.sub(r"\s+", "", text)
    assert "[bold]x" in dense and "\\x1b[31mred" in dense, "and is not markup"
    if width < 60:
        return  # cells are folded
    for part in (
        "9f3a01bc",
        "MIT",
        "1.2MB",
        "train.jsonl:17",
        "84,000",
        "21,000(25%)",
        "193-384",
        "Refusedrows:3",
        "44stepsof16",
        "create",
    ):
        assert part in dense, part
    assert "[red]odd[/red]" in dense


def test_a_report_of_nothing_can_be_shown() -> None:
    empty = DataReport(sources=[], train=SplitReport(), validation=SplitReport(), template_sha256="t", tokenizer_sha256="k")
    assert "no example is left" in shown(empty)
    assert "no example is left" in datareport.page(empty, ABOUT)


class Page(HTMLParser):
    """Collects what a page loads, and whether its elements are closed in order."""

    VOID = ("meta", "br", "link", "img", "line", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "rect":
            self.open.append(tag)  # it holds its title

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID or tag == "rect":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_escaped_and_loads_nothing() -> None:
    html = datareport.page(report(REFUSED, CONFLICTS, DUPLICATES), ABOUT, datareport.epoch_of(report(), 16))
    page = Page()
    page.feed(html)
    assert page.open == [] and page.loads == [] and "<script" not in html and "url(" not in html and "@import" not in html
    assert "<b>2+2?</b>" in page.text and "<b>" not in html.replace("<body>", "")
    assert "\x1b" not in html and "\\x1b[31m" in html
    lineage = ("s3://bucket/train.jsonl sha256 " + "9f3a01bc" * 8, "project acme, key_1", '"mask": 2')
    for part in (
        *lineage,
        "train.jsonl:17",
        "Refused rows",
        "44 steps",
        "create",
        "1.2 MB",
    ):
        assert part in page.text, part
    assert html.count("<rect") == len(datareport.histogram(report().train)) and "prefers-color-scheme: dark" in html


def test_the_json_has_conclusions_and_the_report_itself() -> None:
    bad = report(REFUSED)
    told = json.loads(json.dumps(datareport.to_json(bad, ABOUT, datareport.epoch_of(bad, 16))))
    assert told["object"] == "tuneyard.check" and told["starts"] is False and told["max_length"] == 2048
    assert DataReport.model_validate(told["report"]) == bad
    assert told["notes"][0]["cases"] == [["train.jsonl:17", REFUSED.cases[0].text]] and told["epoch"]["steps"] == 44


def test_one_line_for_the_job_page() -> None:
    assert (
        datareport.line(report(REFUSED))
        == "703 rows read, 3 left out; 700 training and 0 validation examples, 84,000 tokens, 25% supervised"
    )


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\u202eevil", "\\u202eevil"),
        ("a\r\x00\ud800", "a\\r\\x00\\ud800"),
        ("naïve 日本 👩\u200d👩", "naïve 日本 👩\u200d👩"),
    ],
)
def test_what_would_act_is_shown_as_an_escape(text: str, seen: str) -> None:
    assert datareport.visible(text) == seen
