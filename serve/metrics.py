"""How an answer is scored against its reference. Pure; the numbers of one answer lie between 0 and 1, and none depends on another answer.

An answer that never came (None) scores 0 everywhere.
"""

from __future__ import annotations

import functools
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from trainers.errors import DataError, UserError
from trainers.spec import EvalTask

Scores = dict[str, float]
Scorer = Callable[[str, str], Scores]
"""(answer, reference) -> each number."""

METRICS: dict[str, tuple[str, ...]] = {
    "exact_match": ("exact_match",),
    "json_match": ("json_match", "valid_json"),
    "json_schema": ("json_schema", "valid_json"),
    "regex": ("regex",),
    "contains": ("contains",),
    "choice": ("choice", "choice_by_length"),
    "rouge": ("rouge", "rouge1", "rouge2"),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
}
"""What a task of each metric reports, the deciding number first. `rouge` is ROUGE-L; BLEU and chrF are means over sentences."""

PATTERN_S = 1.0  # a pattern that takes longer on one answer has run away: no match


def scorer(task: EvalTask) -> Scorer:
    """The task's metric as a function; raises DataError for a pattern or schema that cannot be used."""
    match task.metric:
        case "json_match":
            return _json_match
        case "json_schema":
            return _json_schema(task.json_schema or {})
        case "regex":
            return _regex(task.pattern or "", task.ignore_case)
        case "contains":
            return lambda answer, reference: {"contains": float(_cased(reference.strip(), task) in _cased(answer, task))}
        case "rouge":
            return _rouge
        case "bleu":
            return lambda answer, reference: {"bleu": _bleu().sentence_score(answer, [reference]).score / 100}
        case "chrf":
            return lambda answer, reference: {"chrf": _chrf().sentence_score(answer, [reference]).score / 100}
        case "exact_match" | "choice":  # a choice is scored by `choose`; its text, if it has one, like any answer's
            return lambda answer, reference: {"exact_match": float(_cased(answer.strip(), task) == _cased(reference.strip(), task))}


def score(scorer: Scorer, names: Sequence[str], answer: str | None, reference: str) -> Scores:
    """Each number of one answer; 0 where there is no answer, and for what the scorer does not name."""
    found = {} if answer is None else scorer(answer, reference)
    return {name: found.get(name, 0.0) for name in names}


def mean(names: Sequence[str], scores: Sequence[Scores]) -> Scores:
    """The mean of each number over at least one score."""
    return {name: sum(score[name] for score in scores) / len(scores) for name in names}


def _cased(text: str, task: EvalTask) -> str:
    return text.casefold() if task.ignore_case else text


# -- JSON ----------------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """The JSON value that a whole text is, blanks around it aside; raises ValueError otherwise (NaN and Infinity are no JSON)."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON value")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:  # a model that repeats "[[[[" for ever
        raise ValueError("nested too deep") from None


def same_json(a: Any, b: Any) -> bool:
    """Equal as JSON: keys in any order, 1 equals 1.0, but true is not 1 (in Python it is)."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b


def _json_match(answer: str, reference: str) -> Scores:
    try:
        value = parse_json(answer)
    except ValueError:
        return {}
    return {"json_match": float(same_json(value, parse_json(reference))), "valid_json": 1.0}


def _json_schema(schema: Mapping[str, Any]) -> Scorer:
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema, registry=Registry())  # an empty registry: no reference is ever fetched
        validator.is_valid(None)
    except SchemaError as error:
        raise DataError(f"`json_schema` is no JSON schema: {error.message}.", "Correct it.", "evaluate.tasks") from None
    except Unresolvable as error:
        raise DataError(f"`json_schema` refers to what is not in it: {error}.", "Put it into `$defs`.", "evaluate.tasks") from None

    def check(answer: str, _: str) -> Scores:
        try:
            value = parse_json(answer)
        except ValueError:
            return {}
        try:
            return {"json_schema": float(validator.is_valid(value)), "valid_json": 1.0}
        except (Unresolvable, RecursionError):
            return {"valid_json": 1.0}

    return check


# -- text ----------------------------------------------------------------------------------------------------------------


def _regex(pattern: str, ignore_case: bool) -> Scorer:
    import regex  # unlike `re`, it can be told when to stop

    try:
        compiled = regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except regex.error as error:
        raise DataError(f"`pattern` is no regular expression: {error}.", "Correct it.", "evaluate.tasks") from None

    def check(answer: str, reference: str) -> Scores:
        try:
            found = compiled.search(answer, timeout=PATTERN_S)
        except TimeoutError:
            return {}
        right = found is not None
        if found and compiled.groups:
            got, want = (found[1] or "").strip(), reference.strip()
            right = got.casefold() == want.casefold() if ignore_case else got == want
        return {"regex": float(right)}

    return check


class _Words:
    """Words of any script (ROUGE's own splitter knows only a-z and 0-9, and would score Greek 0)."""

    def tokenize(self, text: str) -> list[str]:
        import regex

        return regex.findall(r"[\p{L}\p{M}\p{N}]+", text.lower())


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL", "rouge1", "rouge2"], tokenizer=_Words())


def _rouge(answer: str, reference: str) -> Scores:
    found = _rouge_scorer().score(reference, answer)
    return {"rouge": found["rougeL"].fmeasure, "rouge1": found["rouge1"].fmeasure, "rouge2": found["rouge2"].fmeasure}


@functools.cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU  # type: ignore[attr-defined]

    return BLEU(effective_order=True)  # as sacrebleu advises for single sentences


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF  # type: ignore[attr-defined]

    return CHRF()


# -- multiple choice -----------------------------------------------------------------------------------------------------


def choose(options: Sequence[str], log_likelihoods: Sequence[float], reference: str) -> Scores:
    """Whether the reference is the likeliest option: by log-likelihood, and by log-likelihood per byte (long options are less likely)."""
    right = options.index(reference)
    per_byte = [value / max(1, len(option.encode())) for option, value in zip(options, log_likelihoods, strict=True)]
    found = {"choice": log_likelihoods, "choice_by_length": per_byte}
    return {name: float(max(range(len(options)), key=values.__getitem__) == right) for name, values in found.items()}


# -- the user's own ------------------------------------------------------------------------------------------------------


def own_code(entry_point: str) -> Scorer:
    """A function `(answer, reference) -> bool | float | dict of floats`, named as `module:function`. It runs in this process, as this user:
    from the command line only, never from the wire. Raises UserError where there is none."""
    module, _, name = entry_point.partition(":")
    try:
        function = getattr(import_module(module), name) if module and name else None
    except Exception as error:  # whatever the module does when it is imported
        cause = f"{type(error).__name__}: {error}"
        remedy = "Name it as module:function; the module must lie here, or be installed."
        raise UserError(f"`{entry_point}` cannot be loaded: {cause}.", remedy) from None
    if not callable(function):
        raise UserError(f"`{entry_point}` is no function.", "Name it as module:function.")
    label = name.rsplit(".", 1)[-1]

    def check(answer: str, reference: str) -> Scores:
        try:
            made = function(answer, reference)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__}: {error} ({Path(line.filename).name}, line {line.lineno})"
            raise UserError(f"`{entry_point}` failed on the answer {answer[:200]!r}: {cause}.", "Mend the function.") from error
        found: dict[Any, Any] = made if isinstance(made, dict) else {label: made}
        for key, value in found.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"`{entry_point}` returned {value!r} as {key}.", "Return a finite number, a bool, or a dict of them.")
        return {str(key): float(value) for key, value in found.items()}

    return check
