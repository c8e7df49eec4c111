"""Benchmarks by lm-evaluation-harness against the service's own /v1/completions. Forgetting = tuned minus base.

The harness (extra [eval]) runs in a process of its own: it sets the process up as it likes, and reads the key from the environment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trainers.errors import Unavailable, UserError
from trainers.records import BenchmarkResult

Say = Callable[[str], None]
BATCH = 8
"""Requests that the harness sends at a time."""


def run_benchmarks(
    base_url: str, key: str, tokenizer: Path, tasks: Sequence[str], base: str, tuned: str, say: Say, limit: int | None = None
) -> list[BenchmarkResult]:
    """Every number that the tasks report, of both models. `tokenizer` is the folder of the base model; `limit` takes only the first
    questions of each task.

    Raises UserError where the harness is not installed or a task file cannot be used, Unavailable where it fails.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("Benchmarks need lm-evaluation-harness.", "Install it: pip install 'tuneyard[eval]'.")
    found = []
    for task in tasks:
        if _is_file(task) and not Path(task).is_file():
            raise UserError(f"There is no task file {task}.", "Name a task of lm-evaluation-harness, as YAML.")
        scores = []
        for name in (base, tuned):
            say(f"{Path(task).name}: asking {name}")
            scores.append(_run(base_url, key, tokenizer, task, name, limit))
        found += _compared(*scores)
    return found


def _is_file(task: str) -> bool:
    """Else it is the name of one of the harness's own tasks."""
    return Path(task).suffix in (".yaml", ".yml")


def _run(base_url: str, key: str, tokenizer: Path, task: str, model: str, limit: int | None) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value, as the harness reports them."""
    options = json.dumps(
        {
            "model": model,
            "base_url": f"{base_url.rstrip('/')}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(tokenizer),
            "tokenized_requests": True,
            "num_concurrent": BATCH,
            "max_retries": 3,
        }
    )
    # For a local file nothing is fetched: if its data lie on a hub, it fails. Who names MMLU wants its data, which lie nowhere else.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if _is_file(task) else {}
    place, folder = (str(Path(task).absolute()), Path(task).absolute().parent) if _is_file(task) else (task, Path.cwd())
    with TemporaryDirectory(prefix="tuneyard-benchmark-") as scratch:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", options]
        command += ["--tasks", place, "--output_path", f"{scratch}/results", "--batch_size", "1"]
        command += ["--limit", str(limit)] if limit else []
        environment = {**os.environ, **offline, "OPENAI_API_KEY": key}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        files = sorted(Path(scratch).rglob("results*.json"))
        if done.returncode != 0 or not files:
            said = next((line for line in reversed((done.stderr + done.stdout).splitlines()) if line.strip()), "it said nothing")
            raise Unavailable(
                f"lm-evaluation-harness failed on {Path(task).name}: {said.strip().replace(key, '***')[:300]}", "Check the task."
            )
        return json.loads(files[-1].read_text(encoding="utf-8"))["results"]


def _compared(base: dict[str, dict[str, Any]], tuned: dict[str, dict[str, Any]]) -> list[BenchmarkResult]:
    """Values without their errors, `metric,filter` and `metric_stderr,filter` being the harness's own spelling."""
    found = []
    for task, values in base.items():
        for name, value in values.items():
            metric, _, rest = name.partition(",")
            other = tuned.get(task, {})
            if not rest or metric.endswith("_stderr") or not isinstance(value, int | float) or not isinstance(other.get(name), int | float):
                continue
            errors = [v if isinstance(v := of.get(f"{metric}_stderr,{rest}"), int | float) else None for of in (values, other)]
            found.append(
                BenchmarkResult(task=task, metric=name, base=value, tuned=other[name], base_error=errors[0], tuned_error=errors[1])
            )
    return found
