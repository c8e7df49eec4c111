"""The evaluate stage: base and tuned model answer the same held-out cases through the endpoint, and the record says how well.

Killed and started again on the same run directory, it asks only what is missing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve import faults, judge, metrics, stats
from serve.asking import CONCURRENCY, PROGRESS_S, TRIES, Asker, Endpoint, Model, Peer, Question, chat_question, likelihood_question
from serve.faults import Said
from serve.metrics import METRICS, Scorer, Scores
from serve.tasks import Case, load
from trainers.chat import Chat
from trainers.errors import DataError, Unavailable, UserError
from trainers.records import Difference, EvaluationRecord, JudgeResult, LossResult, RunDir, TaskResult, write_atomic
from trainers.spec import EvalTask, Judge
from trainers.store import TokenStore

__all__ = ["CONCURRENCY", "TRIES", "Endpoint", "HeldOut", "Model", "compare", "evaluate", "held_out"]

NUM_SAMPLES = 3
MOST_HELD_OUT = 300
"""Examples whose loss is measured at most, spread evenly over those that there are."""
ALPHA = 0.05
ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class HeldOut:
    """An example that was kept from training, as the trainer read it."""

    id: str
    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    """Supervised stretches [start, stop)."""
    slice: str | None = None


def held_out(store: TokenStore) -> list[HeldOut]:
    """The validation split of a job."""
    return [_example(store, i) for i in spread(len(store), MOST_HELD_OUT)]


def _example(store: TokenStore, i: int) -> HeldOut:
    ids, weights = store.get(i)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (weights > 0).astype(np.int8), [0]])))
    spans = tuple((int(start), int(stop)) for start, stop in edges.reshape(-1, 2))
    return HeldOut(store.example_id(i), ids.tolist(), spans, store.slice(i))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly from the whole range."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def evaluate(
    run: RunDir,
    tasks: list[EvalTask],
    endpoint: Endpoint,
    base: Model,
    tuned: Model,
    slice_by: str | None = None,
    *,
    validation: Sequence[HeldOut] = (),
    judged_by: Judge | None = None,
    judging: Model | None = None,
) -> EvaluationRecord:
    """Ask both models every case of every task, write `evaluation.json` and `answers.jsonl`, and return the record.

    A judge without a URL is `judging`, or the base model. Loss is measured on `validation`, else on the tasks' references where both
    models have a `chat`. A request that fails for good counts as a wrong answer, and in `failed_requests`. Raises DataError for a task
    that cannot be read, and Unavailable if a model gave no answer at all; what goes wrong with the loss or the judge is a
    warning, in an event and in the record.
    """
    start = time.monotonic()
    work = [_Work(task, load(task, slice_by), metrics.scorer(task)) for task in tasks]
    record = EvaluationRecord(tasks=[], seconds=0.0, base=base.name, tuned=tuned.name)

    def warn(message: str) -> None:
        run.event(message, "warn")
        record.warnings.append(message)

    if slice_by and work and not any(case.slice for part in work for case in part.cases):
        warn(f"No case of the tasks has `{slice_by}`: there are no slices.")
    asyncio.run(_evaluate(run, record, warn, work, endpoint, base, tuned, list(validation), judged_by, judging))
    record.seconds = time.monotonic() - start
    run.write("evaluation.json", record)
    return record


Warn = Callable[[str], None]


@dataclass(frozen=True)
class _Work:
    task: EvalTask
    cases: list[Case]
    scorer: Scorer


async def _evaluate(
    run: RunDir,
    record: EvaluationRecord,
    warn: Warn,
    work: list[_Work],
    endpoint: Endpoint,
    base: Model,
    tuned: Model,
    validation: list[HeldOut],
    judged_by: Judge | None,
    judging: Model | None,
) -> None:
    peers = [Peer.of(endpoint, base), Peer.of(endpoint, tuned)]
    # All that is asked is known before anything is asked, so that progress has a total and bad input stops at once.
    asked = [[_questions(part, peer, model) for peer, model in zip(peers, (base, tuned), strict=True)] for part in work]
    lossy, losses = _loss_questions(peers, (base, tuned), work, validation)
    total = sum(len(questions) for both in asked for questions in both) + sum(map(len, losses))
    pairs_judged = sum(min(len(part.cases), judged_by.cases) for part in work) if judged_by else 0
    total += judge.REQUESTS_PER_CASE * pairs_judged
    done, shown = 0, 0.0

    def tick() -> None:
        nonlocal done, shown
        done += 1
        if done == total or time.monotonic() - shown >= PROGRESS_S:
            shown = time.monotonic()
            run.progress("evaluate", done=min(done, total), total=total)

    run.progress("evaluate", done=0, total=total)
    async with Asker(run, endpoint.timeout_s, endpoint.backoff_s, tick) as asker:
        said: list[list[list[Any]]] = []
        for part, both in zip(work, asked, strict=True):
            answers = [await asker.ask_all(questions) for questions in both]
            for model, of_model in zip((base, tuned), answers, strict=True):
                _refuse_silence(model, of_model)
            said.append(answers)
            record.tasks.append(_result(part, answers))
            _tell_failures(run, record.tasks[-1])
        _write_answers(run, work, said)
        if losses[0]:
            record.loss = _loss(warn, lossy, [await asker.ask_all(questions) for questions in losses], bool(validation))
        if judged_by is not None:
            record.judge = await _judge(warn, asker, judged_by, endpoint, judging, work, said)
    run.progress("evaluate", done=total, total=total)


def _questions(part: _Work, peer: Peer, model: Model) -> list[Question]:
    if part.task.metric != "choice":
        return [chat_question(peer, case.messages, part.task.max_tokens) for case in part.cases]
    if model.chat is None:
        raise UserError(f"{part.task.shown}: the tokens of {model.name} are not known here.", "A multiple choice needs its tokenizer.")
    return [_choice_question(peer, model.chat, case) for case in part.cases]


def _choice_question(peer: Peer, chat: Chat, case: Case) -> Question:
    """Every option as the answer, in one request: their common prompt is computed once."""
    made = [_answered(chat, case, option) for option in case.options]
    return likelihood_question(peer, [ids for ids, _ in made], [spans for _, spans in made])


def _answered(chat: Chat, case: Case, answer: str) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """(ids, supervised spans) of the case with this answer."""
    example = chat.example([*case.messages, {"role": "assistant", "content": answer}], "last_assistant")
    return example.ids.tolist(), example.spans


def _refuse_silence(model: Model, answers: list[Any]) -> None:
    failures = [answer for answer in answers if isinstance(answer, Unavailable)]
    if answers and len(failures) == len(answers):
        refused = all(failure.message.startswith("HTTP 4") for failure in failures)  # asking again would change nothing
        kind = UserError if refused else Unavailable
        raise kind(f"{model.name} answered none of {len(answers)} requests: {failures[0].message}", "See the serving app's log.")


def _tell_failures(run: RunDir, result: TaskResult) -> None:
    for model, count in result.failed_requests.items():
        if count:
            run.event(f"{count} of {result.examples} requests to the {model} model failed in {result.name}; they count as wrong.", "warn")
    for warning in result.warnings:
        run.event(f"{result.name}: {warning}", "warn")


# -- tasks ---------------------------------------------------------------------------------------------------------------


def _result(part: _Work, answers: list[list[Any]]) -> TaskResult:
    """Score both models' answers to the same cases (Unavailable where a request failed)."""
    names = METRICS[part.task.metric]
    if part.task.metric == "choice":
        scores = [[_chosen(case, value) for case, value in zip(part.cases, values, strict=True)] for values in answers]
    else:
        scores = [
            [metrics.score(part.scorer, names, _text(value), case.reference) for case, value in zip(part.cases, values, strict=True)]
            for values in answers
        ]
    failed = {model: sum(isinstance(v, Unavailable) for v in values) for model, values in zip(("base", "tuned"), answers, strict=True)}
    result = compare(part.task.shown, part.task.metric, names, part.cases, scores[0], scores[1])
    texts = [[_text_or_choice(case, value) for case, value in zip(part.cases, values, strict=True)] for values in answers]
    update: dict[str, Any] = {"failed_requests": failed, "samples": _samples(part.cases, *texts)}
    if part.task.metric != "choice":
        said = [[_as_said(value) for value in values] for values in answers]
        update["faults"] = faults.analyse(said[0], said[1], part.cases)
    return result.model_copy(update=update)


def compare(
    name: str, metric: str, names: Sequence[str], cases: Sequence[Case], base: Sequence[Scores], tuned: Sequence[Scores]
) -> TaskResult:
    """Two models' scores of the same cases, as a whole and per slice. `metric` is the deciding one of `names`."""

    def column(scores: Sequence[Scores], number: str, members: Sequence[int] | None = None) -> list[float]:
        return [scores[i][number] for i in (range(len(cases)) if members is None else members)]

    def difference(number: str, members: Sequence[int] | None = None) -> Difference:
        return Difference(**asdict(stats.compare(column(base, number, members), column(tuned, number, members))))

    slices: dict[str, dict[str, Any]] = {}
    groups = {group: [i for i, case in enumerate(cases) if case.slice == group] for group in _groups(cases)}
    for group, members in groups.items():
        of_group = [[scores[i] for i in members] for scores in (base, tuned)]
        slices[group] = {
            "examples": len(members),
            "base": metrics.mean(names, of_group[0]),
            "tuned": metrics.mean(names, of_group[1]),
            "intervals": {m: list(stats.interval(column(scores, metric, members))) for m, scores in (("base", base), ("tuned", tuned))},
            "difference": difference(metric, members).model_dump(),
        }
    return TaskResult(
        name=name,
        metric=metric,
        examples=len(cases),
        base=metrics.mean(names, base),
        tuned=metrics.mean(names, tuned),
        slices=slices,
        intervals={
            model: {number: stats.interval(column(scores, number)) for number in names}
            for model, scores in (("base", base), ("tuned", tuned))
        },
        differences={number: difference(number) for number in names},
        warnings=_warnings(slices, metric, {group: column(tuned, metric, members) for group, members in groups.items()}),
    )


def _groups(cases: Sequence[Case]) -> list[str]:
    return sorted({case.slice for case in cases if case.slice is not None})


def _warnings(slices: dict[str, dict[str, Any]], metric: str, tuned: dict[str, list[float]]) -> list[str]:
    """Slices that differ from each other, or became worse, by more than chance explains."""
    found = []
    if len(slices) > 1 and (p := stats.groups_differ(tuned)) < ALPHA:
        by_mean = sorted(slices, key=lambda group: slices[group]["tuned"][metric])
        low, high = (f"{group} {slices[group]['tuned'][metric]:.1%} ({slices[group]['examples']})" for group in (by_mean[0], by_mean[-1]))
        found.append(f"Slices differ in {metric} of the tuned model by more than chance explains (p = {p:.2g}): {low}, {high}.")
    for group, slice in slices.items():
        change = slice["difference"]
        if change["difference"] < 0 and change["p"] < ALPHA / len(slices):  # as many questions as slices (Bonferroni)
            found.append(f"{group} became worse in {metric}: {slice['base'][metric]:.1%} to {slice['tuned'][metric]:.1%}.")
    return found


def _chosen(case: Case, value: Any) -> Scores:
    if isinstance(value, Unavailable):
        return dict.fromkeys(METRICS["choice"], 0.0)
    return metrics.choose(case.options, value, case.reference)


def _text(value: Any) -> str | None:
    return None if isinstance(value, Unavailable) else value["text"]


def _text_or_choice(case: Case, value: Any) -> str | None:
    if isinstance(value, list):
        return case.options[max(range(len(value)), key=value.__getitem__)]
    return _text(value)


def _as_said(value: Any) -> Said | None:
    return None if isinstance(value, Unavailable) else Said(value["text"], value["finish"])


def _samples(cases: list[Case], base: list[str | None], tuned: list[str | None]) -> list[dict[str, str]]:
    return [
        {
            "id": cases[i].id,
            "prompt": cases[i].messages[-1]["content"],
            "reference": cases[i].reference,
            "base": base[i] or "",
            "tuned": tuned[i] or "",
        }
        for i in sample_indices(cases)
    ]


def sample_indices(cases: list[Case]) -> list[int]:
    """Which cases are shown: the first of each slice in file order, then the first of the rest, `NUM_SAMPLES` in all."""
    first: dict[str | None, int] = {}
    for i, case in enumerate(cases):
        first.setdefault(case.slice, i)
    rest = [i for i in range(len(cases)) if i not in first.values()]
    return sorted([*first.values(), *rest][:NUM_SAMPLES])


def _write_answers(run: RunDir, work: list[_Work], said: list[list[list[Any]]]) -> None:
    """Every case with both answers (null where a request failed), one JSON object a line: for people's ratings, and for own code."""
    lines = []
    for part, (base, tuned) in zip(work, said, strict=True):
        for case, of_base, of_tuned in zip(part.cases, base, tuned, strict=True):
            row = {"task": part.task.shown, "id": case.id, "messages": case.messages, "reference": case.reference, "slice": case.slice}
            row |= {"base": _text_or_choice(case, of_base), "tuned": _text_or_choice(case, of_tuned)}
            lines.append(json.dumps(row, ensure_ascii=True))
    run.check_lease()
    write_atomic(run.path(ANSWERS_FILE), "".join(f"{line}\n" for line in lines))


# -- loss ----------------------------------------------------------------------------------------------------------------


def _loss_questions(
    peers: list[Peer], models: tuple[Model, Model], work: list[_Work], validation: list[HeldOut]
) -> tuple[list[list[HeldOut]], list[list[Question]]]:
    """(the examples as each model reads them, what each is asked): nothing where tokens are not known."""
    if validation:
        examples = [validation, validation]
    elif all(model.chat for model in models):
        cases = [case for part in work for case in part.cases]
        chosen = [cases[i] for i in spread(len(cases), MOST_HELD_OUT)]
        examples = [_read_by(model.chat, chosen) for model in models if model.chat]
        both = {example.id for example in examples[0]} & {example.id for example in examples[1]}
        examples = [[example for example in of_model if example.id in both] for of_model in examples]
    else:
        return [[], []], [[], []]
    asked = [
        [likelihood_question(peer, [example.ids], [example.spans]) for example in of_model]
        for peer, of_model in zip(peers, examples, strict=True)
    ]
    return examples, asked


def _read_by(chat: Chat, cases: list[Case]) -> list[HeldOut]:
    """The cases' references as this model's tokens; a case that its template refuses is left out."""
    found = []
    for number, case in enumerate(cases):
        try:
            ids, spans = _answered(chat, case, case.reference)
        except DataError:
            continue
        found.append(HeldOut(f"{number} {case.id}", ids, spans, case.slice))
    return found


def _loss(warn: Warn, examples: list[list[HeldOut]], values: list[list[Any]], from_split: bool) -> LossResult | None:
    """Mean loss per supervised token of each model over the examples that both have scored."""
    whole = [i for i in range(len(values[0])) if not any(isinstance(of_model[i], Unavailable) for of_model in values)]
    if not whole:
        first = next(value for of_model in values for value in of_model if isinstance(value, Unavailable))
        warn(f"The loss on held-out answers could not be measured: {first.message}")
        return None
    if len(whole) < len(values[0]):
        warn(f"{len(values[0]) - len(whole)} of {len(values[0])} held-out answers could not be scored; the loss leaves them out.")
    sums = [[-of_model[i][0] for i in whole] for of_model in values]
    counts = [[sum(stop - start for start, stop in of_model[i].spans) for i in whole] for of_model in examples]
    same = counts[0] == counts[1]
    slices = {}
    for group in sorted({s for i in whole if (s := examples[0][i].slice) is not None}):
        at = [n for n, i in enumerate(whole) if examples[0][i].slice == group]
        slices[group] = {"examples": float(len(at)), **{m: _ratio(sums[k], counts[k], at) for k, m in enumerate(("base", "tuned"))}}
    return LossResult(
        source="validation split" if from_split else "references of the tasks",
        examples=len(whole),
        tokens={"base": sum(counts[0]), "tuned": sum(counts[1])},
        base=_ratio(sums[0], counts[0]),
        tuned=_ratio(sums[1], counts[1]),
        intervals={m: stats.bootstrap_mean(sums[k], counts[k]) for k, m in enumerate(("base", "tuned"))},
        difference=stats.paired_bootstrap(sums[0], sums[1], counts[0]) if same else None,
        slices=slices,
    )


def _ratio(sums: list[float], counts: list[int], at: Sequence[int] | None = None) -> float:
    chosen = range(len(sums)) if at is None else at
    return sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen)


# -- judge ---------------------------------------------------------------------------------------------------------------


async def _judge(
    warn: Warn, asker: Asker, judged_by: Judge, endpoint: Endpoint, judging: Model | None, work: list[_Work], said: list[list[list[Any]]]
) -> JudgeResult | None:
    pairs: list[judge.Pair] = []
    for part, (base, tuned) in zip(work, said, strict=True):
        if part.task.metric == "choice":
            continue
        both = [
            judge.Pair(case, of_base, of_tuned)
            for case, value, other in zip(part.cases, base, tuned, strict=True)
            if (of_base := _as_said(value)) and (of_tuned := _as_said(other))
        ]
        pairs += judge.spread(both, judged_by.cases)
    try:
        return await judge.judge(asker, judge.peer_of(judged_by, endpoint, judging), pairs) if pairs else None
    except (Unavailable, UserError) as error:
        warn(f"The answers could not be judged: {error}")
        return None
