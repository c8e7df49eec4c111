"""Faults that can be told without a judge."""

from __future__ import annotations

import pytest

from serve.faults import MOST_CASES, Said, analyse, faults_of, form_of
from serve.tasks import Case

LOOP = "I went to the market to buy some bread and then I came home again. " * 6
LONG = " ".join(f"word{i}" for i in range(60))


def case(reference: str, number: int = 0) -> Case:
    return Case(f"t:{number}", [{"role": "user", "content": f"question {number}"}], reference, None)


@pytest.mark.parametrize(
    ("answer", "reference", "kinds"),
    [
        (Said("Paris."), "Paris.", set()),
        (Said(LOOP), LONG, {"repetition"}),
        (Said("I'm sorry, but I cannot help with that."), "Mix flour and water.", {"refusal"}),
        (Said("I cannot help with that."), "I'm sorry, but I can't assist with that.", set()),
        (Said(LONG), "Two words.", {"verbosity"}),
        (Said(" ".join(["several", *LONG.split()[:18]])), "Two words, nine of them at least, as in this.", set()),  # not 20 more
        (Said("The answer is 4."), '{"n": 4}', {"format"}),
        (Said('{"n": 5}'), '{"n": 4}', set()),
        (Said("It is 4."), "4", {"format"}),
        (Said("cut", "length"), "cut here", {"cut_off"}),
        (Said("  \n"), "text", {"empty"}),
    ],
)
def test_each_fault(answer: Said, reference: str, kinds: set[str]) -> None:
    assert set(faults_of(answer, case(reference))) == kinds


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('{"a": 1}', "json"), ("[1, 2]", "json"), ("[see below]", "text"), ("```py\nx\n```", "code"), ("- a\n- b", "list"),
        ("1. a\n2. b", "list"), ("- only one", "text"), ("-12.5%", "number"), ("$1,000", "number"), ("12 apples", "text"), ("", "text"),
    ],
)  # fmt: skip
def test_the_form_of_an_answer(text: str, form: str) -> None:
    assert form_of(text) == form


def test_one_answer_for_everything_is_a_fault_of_all_who_got_it() -> None:
    cases = [case(f"reference {i}", i) for i in range(10)]
    told = [Said(f"reference {i}") for i in range(10)]
    same = [Said("It depends.") if i < 6 else said for i, said in enumerate(told)]
    (fault,) = analyse(told, same, cases)
    assert (fault.kind, fault.base, fault.tuned) == ("same_answer", 0, 6)
    assert fault.p == pytest.approx(2 / 2**6) and len(fault.cases) == MOST_CASES
    # Where the references are alike too, the same answer is just right.
    assert analyse(told, [Said("yes")] * 10, [case("yes", i) for i in range(10)]) == []


def test_counts_are_paired_and_the_worst_come_first() -> None:
    cases = [case("short", i) for i in range(4)]
    base = [Said("short"), Said(LONG), None, Said("short")]
    tuned = [Said(LONG), Said(f"{LONG} {LONG.upper()}"), Said(LONG.replace("word", "other")), None]
    found = {fault.kind: fault for fault in analyse(base, tuned, cases)}
    verbose = found["verbosity"]
    assert (verbose.base, verbose.tuned) == (1, 3)
    assert [c.id for c in verbose.cases] == ["t:1", "t:0", "t:2"]
    assert verbose.cases[0].detail == "120 words, reference 1"
    assert verbose.p == 0.5  # two cases with one fault more, none with one less: chance can do that
