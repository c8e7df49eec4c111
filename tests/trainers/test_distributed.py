"""The loop under real Ray Train: same result as alone, and a lost worker costs nothing but time."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.numerics import runs
from trainers import checkpoint, resolve
from trainers.distributed import train_on_ray
from trainers.records import RunDir
from trainers.spec import JobSpec, Placement
from trainers.store import TokenStore


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("stores") / "ray", train_examples=40)


def final_weights(folder: Path) -> dict:
    return load_file(checkpoint.folders(RunDir(folder))[-1] / "state.safetensors")


def resolved(spec: JobSpec, store: Path, place: Placement) -> JobSpec:
    return resolve.schedule(spec, len(TokenStore(store, "train")), place)


@pytest.mark.parametrize(("workers", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_ray_workers_train_what_one_process_trains(
    ray_here: None, tiny: Path, store: Path, tmp_path: Path, workers: int, precision: str
) -> None:
    spec = runs.make_spec(scale={"precision": precision})
    runs.run_training(tiny, store, tmp_path / "alone", spec)
    place = Placement(workers=workers, threads_per_worker=1)
    record = train_on_ray(resolved(spec, store, place), tiny, store, RunDir(tmp_path / "ray", 1, "driver"), place)
    assert (record.status, record.step) == ("finished", record.num_steps)
    losses = {name: [s.train_loss for s in RunDir(tmp_path / name).steps()] for name in ("alone", "ray")}
    assert losses["ray"] == pytest.approx(losses["alone"], rel=1e-5 if precision == "fp32" else 5e-2)


def test_a_killed_worker_is_replaced_and_the_result_is_bit_identical(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(optim={"epochs": 40}, checkpoint={"every_steps": 5})
    place = Placement(workers=1, threads_per_worker=1)
    whole = RunDir(tmp_path / "whole", 1, "driver")
    train_on_ray(resolved(spec, store, place), tiny, store, whole, place)

    run = RunDir(tmp_path / "killed", 1, "driver")
    killed: list[int] = []

    def kill_in_mid_run() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            time.sleep(0.005)
            if checkpoint.folders(run):
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)

    killer = threading.Thread(target=kill_in_mid_run)
    killer.start()
    record = train_on_ray(resolved(spec, store, place), tiny, store, run, place)
    killer.join()
    assert killed
    assert record.status == "finished"
    want, got = final_weights(whole.root), final_weights(run.root)
    assert all((want[name] == got[name]).all() for name in want)
    assert any("resumes after step" in e.message for _, events in run.events() for e in events)


def test_a_user_error_is_returned_and_not_retried(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(method={"targets": ["q_prj"]})
    place = Placement(workers=1, threads_per_worker=1)
    record = train_on_ray(resolved(spec, store, place), tiny, store, RunDir(tmp_path, 1, "driver"), place)
    assert record.status == "failed"
    assert record.error is not None
    assert "q_prj" in record.error["message"]
    assert "q_proj" in record.error["message"]
