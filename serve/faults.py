"""Error analysis: faults that can be told from an answer alone, or from an answer beside its reference. Deterministic and pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from serve.metrics import parse_json
from serve.stats import mcnemar
from serve.tasks import Case
from trainers.records import Fault, FaultCase
from trainers.refusals import declines
from trainers.repetition import repeats

KINDS = {
    "repetition": "The same passage again and again.",
    "refusal": "Declines to answer, where the reference does not.",
    "verbosity": "More than twice as long as the reference, by at least 20 words.",
    "format": "Another form than the reference: JSON, code, list or number expected.",
    "same_answer": "The same answer as to many other requests whose references differ.",
    "cut_off": "Ran into the limit of tokens.",
    "empty": "No text at all.",
}
MOST_CASES = 5
_SHOWN_CHARS = 400
_SAME_SHARE, _SAME_LEAST = 0.2, 5
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d,._]*%?")
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    finish: str | None = None


Found = dict[str, tuple[float, str]]
"""Kind -> (how bad, what was seen)."""


def faults_of(said: Said, case: Case) -> Found:
    """What is wrong with one answer."""
    found: Found = {}
    text, reference = said.text.strip(), case.reference.strip()
    if not text:
        return {"empty": (1.0, "no text")}
    if loop := repeats(text):
        found["repetition"] = (float(len(text)), loop[0])
    if declines(text) and not declines(reference):
        found["refusal"] = (1.0, "declines")
    words, expected = len(text.split()), len(reference.split())
    if words > 2 * expected and words - expected >= 20:
        found["verbosity"] = (words / max(1, expected), f"{words} words, reference {expected}")
    if (form := form_of(reference)) != "text" and form_of(text) != form:
        found["format"] = (float(len(text)), f"{form_of(text)} where {form} was expected")
    if said.finish == "length":
        found["cut_off"] = (float(len(text)), "ended by the limit of tokens")
    return found


def form_of(text: str) -> str:
    """`json`, `code`, `list`, `number` or `text`: the form of a whole answer."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return "number"
    if text[:1] in "{[" and text[-1:] in "}]":
        try:
            parse_json(text)
            return "json"
        except ValueError:
            pass
    if text.startswith("```"):
        return "code"
    return "list" if len(_ITEM.findall(text)) >= 2 else "text"


def same_answers(answers: Sequence[Said | None], cases: Sequence[Case]) -> dict[int, str]:
    """Answers that at least a fifth of all requests (and five) got alike, although their references differ: index -> what was seen."""
    counts = Counter(said.text.strip() for said in answers if said and said.text.strip())
    found = {}
    for text, count in counts.items():
        if count < max(_SAME_LEAST, _SAME_SHARE * len(answers)):
            continue
        members = [i for i, said in enumerate(answers) if said and said.text.strip() == text]
        if len({cases[i].reference.strip() for i in members}) > len(members) / 2:
            found |= {i: f"given to {count} of {len(answers)} requests" for i in members if cases[i].reference.strip() != text}
    return found


def analyse(base: Sequence[Said | None], tuned: Sequence[Said | None], cases: Sequence[Case]) -> list[Fault]:
    """Every kind of fault that either model has, with counts, whether they differ beyond chance, and the tuned model's worst cases."""
    by_model: list[list[Found]] = []
    for answers in (base, tuned):
        found = [faults_of(said, case) if said else {} for said, case in zip(answers, cases, strict=True)]
        for i, seen in same_answers(answers, cases).items():
            found[i]["same_answer"] = (1.0, seen)
        by_model.append(found)
    faults = []
    for kind, told in KINDS.items():
        in_base, in_tuned = ([kind in found for found in model] for model in by_model)
        if not any(in_base) and not any(in_tuned):
            continue
        worst = sorted((i for i, there in enumerate(in_tuned) if there), key=lambda i: (-by_model[1][i][kind][0], i))
        shown = [fault_case(cases[i], tuned[i], by_model[1][i][kind][1]) for i in worst[:MOST_CASES]]
        faults.append(count(kind, told, in_base, in_tuned, shown))
    return faults


def count(kind: str, told: str, in_base: Sequence[bool], in_tuned: Sequence[bool], shown: list[FaultCase]) -> Fault:
    """Base against tuned on the same cases."""
    pairs = Counter(zip(in_base, in_tuned, strict=True))
    p = mcnemar(pairs[False, True], pairs[True, False])
    return Fault(kind=kind, told=told, base=sum(in_base), tuned=sum(in_tuned), p=p, cases=shown)


def fault_case(case: Case, said: Said | None, detail: str) -> FaultCase:
    return FaultCase(id=case.id, prompt=_shown(case.messages[-1]["content"]), answer=_shown(said.text if said else ""), detail=detail)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 60]} ... {text[-50:]}"
