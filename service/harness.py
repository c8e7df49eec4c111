"""Benchmarks by lm-evaluation-harness against the service's own /v1/completions. Forgetting = tuned minus base.

The harness (extra [eval]) runs in a process of its own: it sets the process up as it likes, and reads the key from the environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from trainers.catalogue import context_of
from trainers.errors import Unavailable, UserError
from trainers.records import BenchmarkResult

Say = Callable[[str], None]
Show = Callable[[int, int], None]
"""(requests done, in all)."""
BATCH = 8
"""Requests that the harness sends at a time."""
HUB_WAIT_S = 5.0

_BAR = re.compile(r"Requesting API: .*?(\d+)/(\d+) ")
_REFUSED = re.compile(r"Response text: (\{.*\})\. Retrying")
_RAISED = re.compile(r"(?!.*(?:Session|Connector) is closed)[\w.]*(?:Error|Exception): ")  # those only follow from others
_REFUSAL = "ClientResponseError"
"""What the harness raises for good where the service refused, whatever its other requests raise after it."""


@dataclass(frozen=True)
class Asked:
    """One of the two models."""

    name: str
    folder: Path
    """Hugging Face folder of its base: the tokenizer, and the context."""


def run_benchmarks(
    base_url: str, key: str, base: Asked, tuned: Asked, tasks: Sequence[str], say: Say, show: Show, limit: int | None = None
) -> list[BenchmarkResult]:
    """Every number that the tasks report, of both models; of each task what sums up first, then what was forgotten most. `limit` takes
    only the first questions of each task, or of each part of a group.

    Raises UserError where the harness or a tokenizer is not here or a task file cannot be used, Unavailable where the harness fails.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("Benchmarks need lm-evaluation-harness.", "Install it: pip install 'tuneyard[eval]'.")
    for task in tasks:  # before the first is run: that may take hours
        if _is_file(task) and not Path(task).is_file():
            raise UserError(f"There is no task file {task}.", "Name a task of lm-evaluation-harness, as YAML.")
    for model in (base, tuned):
        if not (model.folder / "config.json").is_file():
            remedy = "Run benchmarks where the service keeps its base models, or set TUNEYARD_MODELS."
            raise UserError(f"The tokenizer of {model.name} is not on this machine ({model.folder}).", remedy)
    found = []
    for task in tasks:
        reports = []
        for model in (base, tuned):
            say(f"{Path(task).name}: asking {model.name}")
            reports.append(_run(base_url, key, model, task, say, show, limit))
        found += _compared(*reports)
    return found


def _is_file(task: str) -> bool:
    """Else it is the name of one of the harness's own tasks."""
    return Path(task).suffix in (".yaml", ".yml")


def _run(base_url: str, key: str, model: Asked, task: str, say: Say, show: Show, limit: int | None) -> dict[str, Any]:
    """The harness's report: `results` (task -> metric -> value) and `group_subtasks` (group -> its parts, which may be groups)."""
    context = context_of(model.folder)
    options = json.dumps(
        {
            "model": model.name,
            "base_url": f"{base_url.rstrip('/')}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(model.folder),
            "tokenized_requests": True,
            "add_bos_token": True,  # where the tokenizer itself has one, as it stands before all that was trained
            "max_length": context,  # the harness cuts what is longer; the service would refuse it
            "num_concurrent": BATCH,
            "max_retries": 8,  # over half a minute in all, for a service that starts again
        }
    )
    # For a local file nothing is fetched: if its data lie on a hub, it fails. Who names MMLU wants its data, which lie nowhere else.
    hub_fault = None if _is_file(task) else _hub_fault()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if _is_file(task) or hub_fault else {}
    place, folder = (str(Path(task).absolute()), Path(task).absolute().parent) if _is_file(task) else (task, Path.cwd())
    with TemporaryDirectory(prefix="tuneyard-benchmark-") as scratch:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", options]
        command += ["--tasks", place, "--output_path", f"{scratch}/results", "--batch_size", "1"]
        command += ["--limit", str(limit)] if limit else []
        done = _listen(command, folder, {**os.environ, **offline, "OPENAI_API_KEY": key}, show)
        files = sorted(Path(scratch).rglob("results*.json"))
        if done.code != 0 or not files:
            if hub_fault and "Couldn't reach" in done.cause:
                remedy = "Let this machine reach it, or a mirror that HF_ENDPOINT names; a task file needs no hub."
                raise Unavailable(f"The data of {task} are not on this machine yet, and {hub_fault}.", remedy)
            remedy = "Check the task." if _is_file(task) else "Check the task: `lm_eval ls tasks` lists the harness's own."
            raise Unavailable(f"lm-evaluation-harness failed on {Path(task).name}: {done.cause.replace(key, '***')[:300]}", remedy)
        if done.cut:
            say(f"{done.cut:,} prompts are longer than the context of {model.name} ({context:,} tokens): their beginnings were cut off.")
        return json.loads(files[-1].read_text(encoding="utf-8"))


def _hub_fault() -> str | None:
    """Why nothing can be fetched, if so. The hub's client alone tries for half a minute or more, for each of 57 subjects anew, even where
    all data are here."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        httpx.head(hub, timeout=HUB_WAIT_S)
    except httpx.HTTPError:
        return f"the hub ({hub}) does not answer"
    return None


@dataclass(frozen=True)
class _Done:
    """How the harness ended."""

    code: int
    cause: str
    """What it said last, or why the service refused it."""
    cut: int
    """Prompts that were too long."""


def _listen(command: list[str], folder: Path, environment: dict[str, str], show: Show) -> _Done:
    """Run the harness and follow what it says."""
    last, raised, refused, cut = "it said nothing", "", "", 0
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:  # a bar ends its lines with \r, which counts as an end here
                if bar := _BAR.search(line):
                    show(int(bar[1]), int(bar[2]))
                elif "Left truncating context" in line:
                    cut += 1
                elif told := _REFUSED.search(line):
                    refused = _message(told[1])
                elif _RAISED.match(line):
                    raised = raised if _REFUSAL in raised else line.strip()
                elif line.strip() and "%|" not in line:  # no other bar
                    last = line.strip()
        except BaseException:
            process.kill()  # else it goes on asking; where we are killed ourselves, it soon ends as nobody reads what it says
            raise
    return _Done(process.returncode, refused if refused and _REFUSAL in raised else raised or last, cut)


def _message(body: str) -> str:
    """Of an error object on the wire."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):  # it was not the service that refused, but something before it
        return body


def _compared(base: dict[str, Any], tuned: dict[str, Any]) -> list[BenchmarkResult]:
    """Two reports as rows: what was asked for, then its groups, then their parts, what was forgotten most first.

    `metric,filter` and `metric_stderr,filter` are the harness's own spelling.
    """
    group_of = {part: group for group, parts in base["group_subtasks"].items() for part in parts}
    found = []
    for task, values in base["results"].items():
        for name, value in values.items():
            metric, _, rest = name.partition(",")
            other = tuned["results"].get(task, {})
            if not rest or metric.endswith("_stderr") or not isinstance(value, int | float) or not isinstance(other.get(name), int | float):
                continue
            errors = [v if isinstance(v := of.get(f"{metric}_stderr,{rest}"), int | float) else None for of in (values, other)]
            less = base.get("higher_is_better", {}).get(task, {}).get(metric) is False
            row = {"task": task, "metric": name, "group": group_of.get(task), "less_is_better": less}
            found.append(BenchmarkResult(**row, base=value, tuned=other[name], base_error=errors[0], tuned_error=errors[1]))
    groups = set(group_of.values())

    def place(row: BenchmarkResult) -> tuple[int, float]:
        return (0, 0.0) if row.group is None else (1 if row.task in groups else 2, row.gain)

    return sorted(found, key=place)
