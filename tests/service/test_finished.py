"""`tuneyard merge` and `tuneyard export` on a run's folder and on a job's id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from peft import PeftModel
from typer.testing import CliRunner

from service.cli import app
from tests.trainers import tuned
from trainers import resolve
from trainers.catalogue import find_any
from trainers.errors import UserError
from trainers.records import OutcomeRecord, RunDir, TrainRecord
from trainers.spec import Placement

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def run(tiny: Path, tmp_path: Path, home: Path) -> RunDir:
    """A job's run whose training has ended and of which nothing was made."""
    return a_run(home / "runs" / "ftjob-1", tiny)


def a_run(folder: Path, base: Path, **sections: Any) -> RunDir:
    run = tuned.a_run(folder, base)
    spec = tuned.job(name="mine", model={"base": str(base), "max_length": 512}, **{"export": {"merge": False}, **sections})
    run.path("resolved.json").write_text(resolve.schedule(resolve.defaults(spec, find_any(str(base))), 60, Placement()).to_json())
    run.write("train.json", TrainRecord(status="finished", step=12, num_steps=12, best_step=10))
    return run


def told(*words: str) -> dict[str, Any]:
    """What a command prints with --json."""
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def refusal(*words: str) -> str:
    error = CliRunner().invoke(app, list(words)).exception
    assert isinstance(error, UserError)
    return error.message


def test_merge_and_again(run: RunDir) -> None:
    first = told("merge", "ftjob-1")
    assert first["made"] is True and first["step"] == 10 and first["kl"] < 1e-6 and first["folder"] == str(run.path("model"))
    assert tuned.logits(tuned.load(Path(first["folder"]))).isfinite().all()
    assert told("merge", str(run.root))["made"] is False  # by its folder, and it is done
    done = CliRunner().invoke(app, ["merge", "ftjob-1"])
    assert done.exit_code == 0 and "It is done already." in done.stdout and str(run.path("model")) in done.stdout.replace("\n", "")


def test_export_of_each_form(run: RunDir, tiny: Path, tmp_path: Path) -> None:
    assert told("export", "ftjob-1", "--format", "adapter") == {
        "format": "adapter",
        "path": str(run.path("adapters", "step-000010")),
        "made": False,
    }
    assert not run.path("model").exists()  # an adapter alone needs no merge
    told("export", "ftjob-1", "--format", "adapter", "-o", "out/adapter")
    assert tuned.logits(PeftModel.from_pretrained(tuned.load(tiny), str(tmp_path / "out" / "adapter")).eval()).equal(
        tuned.reference(tiny, run.path("adapters", "step-000010"))
    )
    found = told("export", "ftjob-1", "--format", "gguf-q8_0")
    assert found["made"] is True and found["path"] == str(run.path("exports", "mine-q8_0.gguf"))
    assert len(gguf.GGUFReader(found["path"]).tensors) == 20
    assert told("export", "ftjob-1", "--format", "gguf-q8_0")["made"] is False
    told("export", "ftjob-1", "--format", "safetensors", "-o", "out/folder")
    assert tuned.logits(tuned.load(tmp_path / "out" / "folder")).equal(tuned.logits(tuned.load(run.path("model"))))
    told("export", "ftjob-1", "--format", "gguf-f16", "-o", "out/mine.gguf")
    assert "is there already" in refusal("export", "ftjob-1", "--format", "gguf-f16", "-o", "out/mine.gguf")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter", "folder", "mine.gguf"]


def test_what_is_no_finished_run(run: RunDir, tiny: Path, tmp_path: Path) -> None:
    assert "no folder and no job `ftjob-9`" in refusal("merge", "ftjob-9")
    assert "no folder ./nothing" in refusal("merge", "./nothing")
    assert "no run whose training is over" in refusal("export", str(tiny), "--format", "adapter")
    run.write("train.json", TrainRecord(status="stopped", step=3, num_steps=12))
    assert "has stopped at step 3" in refusal("merge", "ftjob-1")
    full = a_run(tmp_path / "full", tiny, method={"type": "full"})
    assert "has no adapter" in refusal("export", str(full.root), "--format", "adapter")


def test_a_job_that_is_at_it_is_left_alone(run: RunDir) -> None:
    run.grant()
    run.progress("merge")
    assert "is merging this run itself" in refusal("merge", "ftjob-1")
    run.write("outcome.json", OutcomeRecord(status="succeeded"))
    assert told("merge", "ftjob-1")["made"] is True


def test_errors_are_one_line_of_cause_and_one_of_remedy(home: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "service.cli", "merge", "x"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: There is no folder and no job `x`.\n  fix: ")
