"""`tuneyard eval`: ask the service for an evaluation, follow it, and add here what must not leave this machine: a judge's key, own code."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from serve import judge, metrics
from serve.asking import Asker, Endpoint
from serve.evaluate import compare
from serve.faults import Said
from serve.tasks import Case, load
from service.client import Client, Json
from trainers.errors import SpecError, TuneyardError, UserError
from trainers.records import EvaluationRecord, JudgeResult, RunDir
from trainers.spec import EvalTask, Judge, explain

Show = Callable[[int, int], None]
"""(requests done, in all)."""


def tasks_of(files: list[str], metric: str | None) -> list[EvalTask]:
    """Held-out conversations with one metric for all, or YAML files that say more: a task, or a list of tasks, as in a job's `evaluate`."""
    found = []
    for name in files:
        if Path(name).suffix in (".yaml", ".yml"):
            found += _described(Path(name))
        else:
            found.append(_task({"path": name, "metric": metric or "exact_match"}, name))
    return found


def _described(path: Path) -> list[EvalTask]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", "Name a file that exists.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.", "Mend the line it names.") from None
    rows = value if isinstance(value, list) else [value]
    tasks = [_task(row, str(path)) for row in rows]
    here = path.parent  # relative paths are taken from the file's own folder
    return [task if "://" in task.path else task.model_copy(update={"path": str(here / task.path), "name": task.shown}) for task in tasks]


def _task(value: Any, where: str) -> EvalTask:
    try:
        return EvalTask.model_validate(value)
    except ValidationError as error:
        found = explain(error, EvalTask, "task")
        raise SpecError(f"{where}: {found.message}", found.remedy) from None


def create(client: Client, model: str, against: str | None, tasks: list[EvalTask], slice_by: str | None, judged_by: Judge | None) -> Json:
    """Upload the tasks' files, each read here first, and create the evaluation."""
    sent, sliced = [], False
    for task in tasks:
        if "://" in task.path:
            sliced = True  # for all that is known here
        elif not Path(task.path).is_file():
            raise UserError(f"{task.path} is not a file of this machine.", "Name a local file: it is uploaded from here.")
        else:
            sliced |= any(case.slice for case in load(task, slice_by))
    if slice_by and tasks and not sliced:
        raise UserError(f"No row of the tasks has `{slice_by}`.", "Name a column that they have.")
    for task in tasks:
        if "://" not in task.path:
            file = Path(task.path)
            id = client.openai.files.create(file=file, purpose="fine-tune").id
            task = task.model_copy(update={"path": id, "name": task.shown})
        sent.append(task.model_dump(mode="json"))
    body = {"model": model, "against": against, "tasks": sent, "slice_by": slice_by}
    if judged_by is not None:
        body["judge"] = judged_by.model_dump(mode="json")
    return client.post("/tuneyard/evaluations", body)


def follow(client: Client, id: str, show: Show, poll_s: float = 0.5) -> EvaluationRecord:
    """Wait for the end; raises TuneyardError where that is no result."""
    while True:
        found = client.get(f"/tuneyard/evaluations/{id}")
        progress = found["progress"] or {}
        show(progress.get("done", 0), progress.get("total", 0))
        if found["status"] == "succeeded":
            return EvaluationRecord.model_validate(found["result"])
        if found["status"] not in ("queued", "running"):
            message = (found["error"] or {}).get("message") or f"it is {found['status']}."
            raise TuneyardError(f"Evaluation {id}: {message}", "Correct it and ask again.")
        time.sleep(poll_s)


def base_of(client: Client, model: str) -> str:
    """Catalogue id of the base that a model was tuned from, or that it is."""
    told = client.get(f"/models/{model}")["tuneyard"]
    return told.get("base") or told.get("alias_of") or model


class Answers:
    """Every case of an evaluation with both models' answers."""

    def __init__(self, client: Client, id: str) -> None:
        text = client.openai.get(f"/tuneyard/evaluations/{id}/answers", cast_to=str)
        rows = [json.loads(line) for line in text.splitlines()]
        self.tasks: dict[str, list[tuple[Case, str | None, str | None]]] = {}
        for row in rows:
            case = Case(row["id"], row["messages"], row["reference"], row["slice"])
            self.tasks.setdefault(row["task"], []).append((case, row["base"], row["tuned"]))

    def score_by(self, entry_point: str, scorer: metrics.Scorer, record: EvaluationRecord) -> None:
        """Add what the user's own code says of every task's answers; the first score that it names decides."""
        for name, rows in self.tasks.items():
            scores = [[{} if text is None else scorer(text, case.reference) for case, text in _column(rows, i)] for i in (1, 2)]
            names = list(dict.fromkeys(key for of_model in scores for found in of_model for key in found))
            if not names:
                continue
            padded = [[{key: found.get(key, 0.0) for key in names} for found in of_model] for of_model in scores]
            result = compare(f"{name} by {entry_point}", names[0], names, [case for case, _, _ in rows], padded[0], padded[1])
            record.tasks.append(result)

    def judge_by(self, judged_by: Judge, record: EvaluationRecord, kept: Path, show: Show) -> None:
        """Add a judge's verdicts, which are kept in a folder: asked again, only what is missing costs anything."""
        pairs: list[judge.Pair] = []
        for rows in self.tasks.values():
            both = [judge.Pair(case, Said(base), Said(tuned)) for case, base, tuned in rows if base is not None and tuned is not None]
            pairs += judge.spread(both, judged_by.cases)
        total, done = len(pairs) * judge.REQUESTS_PER_CASE, 0

        def tick() -> None:
            nonlocal done
            done = min(done + 1, total)
            show(done, total)

        async def ask() -> JudgeResult:
            async with Asker(RunDir(kept, writer="cli"), Endpoint.timeout_s, Endpoint.backoff_s, tick) as asker:
                return await judge.judge(asker, judge.peer_of(judged_by, Endpoint("")), pairs)

        if pairs:
            record.judge = asyncio.run(ask())


def _column(rows: list[tuple[Case, str | None, str | None]], i: int) -> list[tuple[Case, str | None]]:
    return [(row[0], row[i]) for row in rows]  # type: ignore[misc]
