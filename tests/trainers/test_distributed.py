"""The loop under real Ray Train: same result as alone, and a lost worker costs nothing but time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch

from tests.numerics import runs
from tests.numerics.test_merged import validation_loss
from trainers import manifest, merge, warm
from trainers.control import CONTROL_FILE, ControlRecord
from trainers.distributed import get_ready, train_on_ray
from trainers.records import RunDir, rank_log
from trainers.spec import JobSpec
from trainers.state import State


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real S3 server (moto) that every process started from here finds through the environment."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=runs.free_port())
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir("distributed")  # moto's buckets are the process's, not the server's
        yield "s3://distributed/runs"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture(scope="module")
def ray_here(bucket: str) -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # as a single Ray worker has: only then is bit-identity a fair demand
    yield
    torch.set_num_threads(before)
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("stores") / "ray", train_examples=40)


def final_weights(folder: Path) -> dict[str, Any]:
    state = State(manifest.folders(RunDir(folder))[-1])
    return {name: state.read(name) for name in state.names()}


def told(run: RunDir) -> list[str]:
    return [event.message for _, events in run.events() for event in events]


def when(condition: Callable[[], Any], act: Callable[[], None]) -> threading.Thread:
    """Do something beside the training, once the condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 600
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def called(name: str) -> list[psutil.Process]:
    """Ray's processes whose title has this in it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_the_processes_that_train_are_started_ahead(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    def waiting() -> list[int]:
        found = []
        for process in called("ray::IDLE"):
            with suppress(psutil.Error):
                if warm.WORKER in process.environ():
                    found.append(process.pid)
        return sorted(found)

    spec = runs.make_spec(scale={"workers": 2})
    get_ready(spec)
    deadline = time.monotonic() + 120
    while len(ready := waiting()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done, at_work = threading.Event(), set[int]()

    def watch() -> None:
        while not done.wait(0.05):
            at_work.update(p.pid for p in called("RayTrainWorker"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert train_on_ray(spec, tiny, store, RunDir(tmp_path, 1, "driver")).status == "finished"
    finally:
        done.set()
        watcher.join()
    assert sorted(at_work) == ready


def test_ray_workers_train_what_one_process_trains(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(scale={"workers": 2})
    runs.run_training(tiny, store, tmp_path / "alone", spec)
    record = train_on_ray(spec, tiny, store, RunDir(tmp_path / "ray", 1, "driver"), since={"submission": time.time()})
    assert (record.status, record.step) == ("finished", record.num_steps)
    losses = {name: [s.train_loss for s in RunDir(tmp_path / name).steps()] for name in ("alone", "ray")}
    assert losses["ray"] == pytest.approx(losses["alone"], rel=1e-5)
    run = RunDir(tmp_path / "ray", 1)
    assert JobSpec.model_validate_json(run.path("resolved.json").read_bytes()).scale.workers == 2
    assert [rank_log(run, rank).exists() for rank in range(3)] == [True, True, False]
    assert any(line.startswith("First step made") and "workers up" in line for line in told(run))


def test_a_killed_worker_is_replaced_and_the_result_is_bit_identical(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(optim={"epochs": 4}, checkpoint={"every_steps": 5})
    runs.run_training(tiny, store, tmp_path / "whole", spec)
    killed: list[int] = []

    def kill() -> None:
        for process in called("RayTrainWorker"):
            with suppress(psutil.Error):
                process.kill()
                killed.append(process.pid)

    prepared = {file: file.stat().st_mtime_ns for file in store.rglob("*")}
    n = 0
    while True:  # the training may be over before the blow falls
        run = RunDir(tmp_path / f"killed-{n}", 1, "driver")
        killer = when(lambda run=run: manifest.folders(run), kill)
        record = train_on_ray(spec, tiny, store, run)
        killer.join()
        assert record.status == "finished"
        if any("was lost" in line for line in told(run)):
            break
        n += 1
        assert n < 10
    assert killed
    want, got = final_weights(tmp_path / "whole"), final_weights(run.root)
    assert all((want[name] == got[name]).all() for name in want)
    lines = told(run)
    assert any("resumes after step" in line for line in lines)
    assert any("A training worker was lost in step" in line and "its process vanished); loss 1 of 3" in line for line in lines)
    assert any(line.startswith("First step made") and "after the loss" in line for line in lines)
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*")} == prepared  # the store was opened again, not made again


def test_a_user_error_is_returned_and_not_retried(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(method={"targets": ["q_prj"]})
    record = train_on_ray(spec, tiny, store, RunDir(tmp_path, 1, "driver"))
    assert record.status == "failed"
    assert record.error is not None
    assert "q_prj" in record.error["message"]
    assert "q_proj" in record.error["message"]


def test_a_resize_computes_what_the_whole_run_computes(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    """Asked to stop, the loop saves and ends; the next attempt, with another number of workers, goes on at the next step."""
    spec = runs.make_spec(optim={"epochs": 8})
    runs.run_training(tiny, store, tmp_path / "whole", spec)
    n = 0
    while True:  # the training may be over before it is asked
        first = RunDir(tmp_path / f"resized-{n}", 1, "driver")

        def ask(root: Path = first.root) -> None:
            RunDir(root, 1, "runner").write(CONTROL_FILE, ControlRecord(wanted="resize", workers=2))

        asking = when(rank_log(first, 0).exists, ask)
        record = train_on_ray(spec, tiny, store, first)
        asking.join()
        if record.status == "stopped":
            break
        n += 1
        assert n < 10
    assert record.status == "stopped" and 0 < record.step < record.num_steps

    again = RunDir(first.root, 2, "driver")
    again.grant()
    done = train_on_ray(spec, tiny, store, again, workers=2)
    assert done.status == "finished"
    made = [step.step for _, records in again.step_segments() for step in records]
    assert sorted(made) == list(range(1, done.num_steps + 1))  # none twice, none left out
    assert {step.step for _, records in again.step_segments() for step in records if step.attempt == 1} == set(range(1, record.step + 1))
    want, got = ([s.train_loss for s in RunDir(tmp_path / name).steps()] for name in ("whole", first.root.name))
    assert got == pytest.approx(want, rel=1e-4)


def test_shards_that_two_workers_wrote_to_s3_are_merged_from_there(
    ray_here: None, bucket: str, tiny: Path, store: Path, tmp_path: Path
) -> None:
    spec = runs.make_spec(
        method={"type": "full"},
        optim={"learning_rate": 0.003, "batch_size": 10},
        scale={"workers": 2, "sharding": "full"},
        checkpoint={"every_steps": 4, "to": bucket},
    )
    run = RunDir(tmp_path / "ftjob-s3", 1, "driver")
    record = train_on_ray(spec, tiny, store, run)
    assert record.status == "finished" and record.best_step is not None
    system = fsspec.filesystem("s3", use_listings_cache=False)
    shards = system.glob(f"distributed/runs/ftjob-s3/step-{record.best_step:06d}-a1/*.safetensors")
    assert len(shards) == 2 and not list(run.root.rglob("*.safetensors"))  # each worker its own, and none of it here

    made = merge.merge(run, spec, "tiny", tiny, record.best_step, merge.held_out(store))
    assert made.served == "merged" and made.kl is not None and made.effect is not None and made.kl < 1e-6 < 1e-3 < made.effect
    measured = {step.step: step.valid_loss for step in run.steps()}[record.best_step]
    assert measured is not None and abs(validation_loss(run.path("model"), store) - measured) < 2e-5


def test_waiting_for_room_ends_with_a_pause(ray_here: None, tiny: Path, store: Path, tmp_path: Path) -> None:
    import ray

    busy = ray.util.placement_group([{"CPU": 2}])
    ray.get(busy.ready())
    run = RunDir(tmp_path, 1, "driver")
    spec = runs.make_spec(scale={"workers": {"min": 2, "max": 2}})
    waits = "Training waits for room: 2 CPU(s) are needed, and 0 of the cluster's 2 are free."
    asking = when(lambda: waits in told(run), lambda: run.write(CONTROL_FILE, ControlRecord(wanted="pause")) and None)
    assert train_on_ray(spec, tiny, store, run).status == "stopped"
    asking.join()
    ray.util.remove_placement_group(busy)
