"""The evaluate stage: base and tuned model answer the same held-out cases through the endpoint, and the record says how well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from serve.tasks import Case, load, mean, score
from trainers.errors import Unavailable
from trainers.records import EvaluationRecord, RunDir, TaskResult
from trainers.spec import EvalTask

CONCURRENCY = 32  # what one replica batches well
TRIES = 4
PROGRESS_S = 0.5  # a progress record is synced to disk; more often would only cost time
NUM_SAMPLES = 3


@dataclass(frozen=True)
class Endpoint:
    """The serving app of a base model, which also answers with adapters over it."""

    url: str
    """For example http://127.0.0.1:8000/smollm2-135m-instruct; `/v1/chat/completions` is added."""
    token: str | None = None
    timeout_s: float = 120.0
    backoff_s: float = 0.5
    """Pause before the second try; twice as long before each further one."""


@dataclass(frozen=True)
class Model:
    """A model as the serving app knows it."""

    name: str
    adapter: str | None = None
    """PEFT folder; None = the app's model as it is."""
    url: str | None = None
    """Its own serving app; None = the endpoint's."""


def evaluate(
    run: RunDir, tasks: list[EvalTask], endpoint: Endpoint, base: Model, tuned: Model, slice_by: str | None = None
) -> EvaluationRecord:
    """Ask both models every case of every task, write `evaluation.json`, and return it.

    A request that fails for good counts as a wrong answer, and in `failed_requests`. Raises DataError for a task that cannot be
    read, and Unavailable if a model gave no answer at all.
    """
    start = time.monotonic()
    cases = [load(task, slice_by) for task in tasks]
    total = 2 * sum(map(len, cases))
    done, shown = 0, 0.0

    def tick() -> None:
        nonlocal done, shown
        done += 1
        if done == total or time.monotonic() - shown >= PROGRESS_S:
            shown = time.monotonic()
            run.progress("evaluate", done=done, total=total)

    run.progress("evaluate", done=0, total=total)
    results = [_evaluate_task(task, asked, endpoint, base, tuned, tick) for task, asked in zip(tasks, cases, strict=True)]
    for result in results:
        for model, count in result.failed_requests.items():
            if count:
                run.event(
                    f"{count} of {result.examples} requests to the {model} model failed in {result.name}; they count as wrong.", "warn"
                )
    record = EvaluationRecord(tasks=results, seconds=time.monotonic() - start)
    run.write("evaluation.json", record)
    return record


def _evaluate_task(
    task: EvalTask, cases: list[Case], endpoint: Endpoint, base: Model, tuned: Model, tick: Callable[[], None]
) -> TaskResult:
    answers = asyncio.run(_ask_all(endpoint, [base, tuned], cases, task.max_tokens, tick))
    return compare(task, cases, answers[0], answers[1])


def compare(task: EvalTask, cases: list[Case], base: list[str | None], tuned: list[str | None]) -> TaskResult:
    """Score two models' answers to the same cases (None where a request failed), as a whole and per slice."""
    scores = {
        model: [score(task.metric, answer, case.reference) for answer, case in zip(answers, cases, strict=True)]
        for model, answers in (("base", base), ("tuned", tuned))
    }
    slices: dict[str, dict[str, Any]] = {}
    for name in sorted({case.slice for case in cases if case.slice is not None}):
        members = [i for i, case in enumerate(cases) if case.slice == name]
        means = {model: mean(task.metric, [every[i] for i in members]) for model, every in scores.items()}
        slices[name] = {"examples": len(members), **means}
    return TaskResult(
        name=task.shown,
        metric=task.metric,
        examples=len(cases),
        base=mean(task.metric, scores["base"]),
        tuned=mean(task.metric, scores["tuned"]),
        failed_requests={"base": base.count(None), "tuned": tuned.count(None)},
        slices=slices,
        samples=[
            {
                "id": cases[i].id,
                "prompt": cases[i].messages[-1]["content"],
                "reference": cases[i].reference,
                "base": base[i] or "",
                "tuned": tuned[i] or "",
            }
            for i in sample_indices(cases)
        ],
    )


def sample_indices(cases: list[Case]) -> list[int]:
    """Which cases are shown: the first of each slice in file order, then the first of the rest, `NUM_SAMPLES` in all."""
    first: dict[str | None, int] = {}
    for i, case in enumerate(cases):
        first.setdefault(case.slice, i)
    rest = [i for i in range(len(cases)) if i not in first.values()]
    return sorted([*first.values(), *rest][:NUM_SAMPLES])


# -- asking --------------------------------------------------------------------------------------------------------------


async def _ask_all(
    endpoint: Endpoint, models: list[Model], cases: list[Case], max_tokens: int, tick: Callable[[], None]
) -> list[list[str | None]]:
    """Every model's answer to every case, in order; None where a request failed. At most CONCURRENCY requests are out at a time."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(timeout=endpoint.timeout_s, trust_env=False) as client:

        async def ask(model: Model, case: Case) -> str | Unavailable:
            async with gate:
                answer = await _ask(client, endpoint, model, case, max_tokens)
                tick()
                return answer

        every = [await asyncio.gather(*(ask(model, case) for case in cases)) for model in models]
    for model, answers in zip(models, every, strict=True):
        failures = [answer for answer in answers if isinstance(answer, Unavailable)]
        if len(failures) == len(answers):
            raise Unavailable(f"{model.name} answered none of {len(answers)} requests: {failures[0].message}", "See the serving app's log.")
    return [[answer if isinstance(answer, str) else None for answer in answers] for answers in every]


async def _ask(client: httpx.AsyncClient, endpoint: Endpoint, model: Model, case: Case, max_tokens: int) -> str | Unavailable:
    """One answer, or why there is none after the last try. What the client itself got wrong (4xx) is not tried again."""
    headers = {"x-tuneyard-model": model.name}
    if endpoint.token:
        headers["authorization"] = f"Bearer {endpoint.token}"
    if model.adapter:
        headers["x-tuneyard-adapter"] = model.adapter
    body = {"model": model.name, "messages": case.messages, "temperature": 0, "max_tokens": max_tokens}
    cause = ""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(endpoint.backoff_s * 2 ** (attempt - 1))
        try:
            response = await client.post(
                f"{model.url or endpoint.url}/v1/chat/completions", json=body, headers={k.encode(): v.encode() for k, v in headers.items()}
            )
        except httpx.HTTPError as error:
            cause = f"{type(error).__name__}: {error}"
            continue
        cause = f"HTTP {response.status_code}: {response.text[:200]}"
        if response.status_code == 200:
            with suppress(ValueError, KeyError, IndexError, TypeError):  # a proxy's page, say, is no chat completion
                return response.json()["choices"][0]["message"]["content"] or ""
        elif response.status_code < 500 and response.status_code not in (408, 409, 429):
            break
    return Unavailable(cause)
