"""`python -m trainers.local`, alone and under torchrun: no Ray anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.records import ModelRecord, RunDir, TrainRecord

ROOT = Path(__file__).parents[2]
ROWS = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} it is"}]} for i in range(20)]


def job(folder: Path, tiny: Path, **sections: dict) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    value = {
        "model": {"base": str(tiny), "max_length": 256},
        "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.2},
        "optim": {"batch_size": 4, "epochs": 1},
        "scale": {"precision": "fp32"},
        **sections,
    }
    (folder / "job.yaml").write_text(json.dumps(value))
    return folder / "job.yaml"


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_under_torchrun_two_workers_train_merge_and_end_well(tiny: Path, tmp_path: Path, method: str) -> None:
    path = job(tmp_path, tiny, method={"type": method})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*torchrun, "trainers.local", str(path), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / "run")
    trained, merged = run.read("train.json", TrainRecord), run.read("model.json", ModelRecord)
    assert trained and trained.status == "finished" and merged and merged.merged == "model" and merged.served == "merged"
    sharding = json.loads(run.path("resolved.json").read_text())["scale"]["sharding"]
    assert sharding == {"full": "full", "qlora": "none"}[method]
    assert done.stdout.count(f"step {trained.num_steps}/{trained.num_steps}") == 1  # the leader alone speaks


def test_a_job_that_cannot_be_is_one_line_of_cause_and_one_of_remedy(tiny: Path, tmp_path: Path) -> None:
    path = job(tmp_path, tiny, method={"type": "qlora"}, scale={"sharding": "full"})
    command = [sys.executable, "-m", "trainers.local", str(path), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1 and "four-bit weights cannot be sharded" in done.stderr and "  fix: " in done.stderr
    assert "Traceback" not in done.stderr
