"""The runner against real Ray Jobs: whole runs, lost workers, fenced drivers, cancels, and its own death anywhere."""

from __future__ import annotations

import base64
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import BadRequestError, OpenAI
from servicekit import BASE, Service, rows, service_on, wait_for

from cluster import local
from service.link import Link
from service.order import LaunchOrder
from service.results import table
from service.runner import Runner
from trainers.records import CheckpointRecord, RunDir, StepRecord, checkpoint_name, write_atomic


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.LocalHead]:
    home = tmp_path_factory.mktemp("ray")
    head = local.start(home, num_cpus=1, path=str(Path(__file__).parents[2]))
    yield head
    local.stop(home)


@pytest.fixture
def service(tmp_path: Path, head: local.LocalHead) -> Iterator[Service]:
    with head.client() as ray, service_on(tmp_path, Link(ray, "127.0.0.1", head.serve_port)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> OpenAI:
    return service.client("acme")


@pytest.fixture
def runner(service: Service) -> Runner:
    return Runner(service.settings, service.store, service.link)


def create(client: OpenAI, **orders: Any) -> str:
    file = client.files.create(file=("train.jsonl", rows(**orders)), purpose="fine-tune").id
    quiet = {"job": {"deploy": {"serve": False}}}
    return client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="s", extra_body=quiet).id


def until(runner: Runner, condition: Callable[[], Any]) -> Any:
    """Step until the condition holds."""

    def look() -> Any:
        runner.step()
        return condition()

    return wait_for(look)


def ended(client: OpenAI, runner: Runner, job: str) -> Any:
    def final() -> Any:
        found = client.fine_tuning.jobs.retrieve(job)
        return found if found.finished_at else None

    found = until(runner, final)
    runner.step()
    return found


def messages(client: OpenAI, job: str) -> list[str]:
    return [e.message for e in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


def driver_pid(service: Service, job: str, attempt: int = 1) -> int:
    file = service.settings.runs / job / f"pid-{attempt}"
    return int(file.read_text()) if file.exists() and file.read_text() else 0


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_job_from_start_to_finish(client: OpenAI, runner: Runner, service: Service) -> None:
    first, second = create(client, steps=4), create(client, steps=2)
    until(runner, lambda: client.fine_tuning.jobs.retrieve(first).status == "running")
    waiting = client.fine_tuning.jobs.retrieve(second)
    assert waiting.status == "queued" and waiting.to_dict()["queue_reason"] == "waiting for the job before it: 1 ahead"
    job = ended(client, runner, first)
    assert job.status == "succeeded" and job.error is None
    assert job.fine_tuned_model == f"ft:{BASE}:acme:s:{first.removeprefix('ftjob-')}"
    assert job.trained_tokens == 40

    told = messages(client, first)
    assert told[:4] == [
        f"Created fine-tuning job: {first}",
        "Files are there; the job is queued.",
        "Fine-tuning job started.",
        "Attempt 1 is at work.",
    ]
    assert told[-2:] == ["The job has successfully completed.", f"New fine-tuned model created: {job.fine_tuned_model}"]
    metrics = [e for e in client.fine_tuning.jobs.list_events(first, limit=100) if e.type == "metrics"][::-1]
    assert [e.data["step"] for e in metrics] == [1, 2, 3, 4]  # type: ignore[index]
    assert metrics[-1].message == "Step 4/4: training loss=0.50, validation loss=1.00"

    plain = client.files.content(job.result_files[1]).read().decode()
    assert base64.b64decode(client.files.content(job.result_files[0]).read()).decode() == plain
    assert plain.splitlines()[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert plain.splitlines()[-1] == "4,0.500000,0.500000,1.000000,0.500000"
    assert {client.files.retrieve(f).purpose for f in job.result_files} == {"fine-tune-results"}

    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(first).data
    assert checkpoint.fine_tuned_model_checkpoint == f"{job.fine_tuned_model}:ckpt-step-4"
    assert checkpoint.metrics.valid_loss == 1.0 and checkpoint.metrics.train_loss == 0.5
    names = {job.fine_tuned_model, checkpoint.fine_tuned_model_checkpoint}
    assert {client.models.retrieve(name).id for name in names} == names

    detail: Any = client.get(f"/tuneyard/jobs/{first}", cast_to=object)
    assert detail["stage"] == "train" and detail["attempt"] == 1
    steps: Any = client.get(f"/tuneyard/jobs/{first}/metrics", cast_to=object)
    assert [s["step"] for s in steps["data"]] == [1, 2, 3, 4]
    log: Any = client.get(f"/tuneyard/jobs/{first}/logs", cast_to=object)
    assert "at work" in log["text"]

    assert ended(client, runner, second).status == "succeeded"
    before = messages(client, first)
    for _ in range(3):
        runner.step()
    assert messages(client, first) == before and len(set(before)) == len(before)

    assert client.models.delete(str(job.fine_tuned_model)).deleted
    assert job.fine_tuned_model not in {m.id for m in client.models.list()}
    assert client.fine_tuning.jobs.checkpoints.list(first).data == []
    assert not (service.settings.runs / first / "adapters").exists()


def test_bad_data_fails_the_job(client: OpenAI, runner: Runner) -> None:
    empty = client.files.create(file=("nothing.jsonl", b""), purpose="fine-tune").id
    job = ended(client, runner, client.fine_tuning.jobs.create(model=BASE, training_file=empty).id)
    assert job.status == "failed" and job.error.param == "training_file" and job.error.code == "invalid_training_file"
    assert job.error.message == "nothing.jsonl is empty. Upload a file with at least one example."
    job = ended(client, runner, create(client, end="refuse"))
    assert job.error.to_dict() == {
        "code": "invalid_training_file",
        "message": "train.jsonl:2 is not JSON. Mend line 2.",
        "param": "training_file",
    }
    assert job.fine_tuned_model is None and job.result_files == []


def test_a_killed_driver_is_tried_again(client: OpenAI, runner: Runner, service: Service) -> None:
    job = create(client, steps=40, hold=10)
    pid = until(runner, lambda: driver_pid(service, job))
    until(runner, lambda: any("Step 5/" in m for m in messages(client, job)))
    os.kill(pid, signal.SIGKILL)
    done = ended(client, runner, job)
    assert done.status == "succeeded" and done.trained_tokens == 400
    told = messages(client, job)
    assert sum("Attempt 1 was lost" in m for m in told) == 1 and "Attempt 2 started." in told
    warning = next(e for e in client.fine_tuning.jobs.list_events(job, limit=100) if "was lost" in e.message)
    assert warning.level == "warn"


def test_given_up_after_three_losses(client: OpenAI, runner: Runner) -> None:
    done = ended(client, runner, create(client, end="crash"))
    assert done.status == "failed" and done.error.code == "worker_lost"
    assert "lost 4 times" in done.error.message and "out of luck" in done.error.message
    assert sum("was lost (" in m for m in messages(client, done.id)) == 3


def test_a_replaced_driver_writes_no_more(client: OpenAI, runner: Runner, service: Service) -> None:
    """Its supervisor dies, Ray calls it dead, it lives on: the second attempt must be the only writer."""
    job = create(client, steps=200, seconds=0.1, hold=150, stubborn=True)
    pid = until(runner, lambda: driver_pid(service, job))
    until(runner, lambda: any("Step 3/" in m for m in messages(client, job)))
    next(p for p in psutil.Process(pid).parents() if "JobSupervisor" in " ".join(p.cmdline())).kill()
    fenced = service.settings.runs / job / "fenced-1"
    until(runner, lambda: fenced.exists() and fenced.read_text())
    assert "replaced by attempt 2" in fenced.read_text()
    assert ended(client, runner, job).status == "succeeded"
    wait_for(lambda: gone(pid))
    second = min(r.time for _, records in RunDir(service.settings.runs / job).step_segments() for r in records if r.attempt == 2)
    first = max(r.time for _, records in RunDir(service.settings.runs / job).step_segments() for r in records if r.attempt == 1)
    assert first < second


def test_cancel_stops_the_driver(client: OpenAI, runner: Runner, service: Service) -> None:
    job, after = create(client, steps=10_000), create(client, steps=1)
    pid = until(runner, lambda: driver_pid(service, job))
    assert client.fine_tuning.jobs.cancel(job).status == "cancelled"
    until(runner, lambda: gone(pid))
    assert ended(client, runner, after).status == "succeeded"  # the place is free again
    steps = len(RunDir(service.settings.runs / job).steps())
    time.sleep(0.3)
    assert len(RunDir(service.settings.runs / job).steps()) == steps
    assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job).fine_tuned_model is None


def test_a_pause_is_no_loss(client: OpenAI, runner: Runner, service: Service) -> None:
    job = create(client, steps=40, hold=10)
    pid = until(runner, lambda: driver_pid(service, job))
    runner.pause()
    assert client.fine_tuning.jobs.retrieve(job).status == "queued" and gone(pid)
    assert ended(client, runner, job).status == "succeeded"
    assert "Attempt 2 started." in messages(client, job) and not [m for m in messages(client, job) if "lost" in m]


def steps_made(service: Service, job: str) -> list[tuple[int, int]]:
    """(step, attempt) of every step record, in the order of writing."""
    return [(r.step, r.attempt) for _, records in RunDir(service.settings.runs / job).step_segments() for r in records]


def test_pause_and_resume_go_on_where_training_stopped(client: OpenAI, runner: Runner, service: Service) -> None:
    job, other = create(client, steps=60, hold=10), create(client, steps=2)
    pid = until(runner, lambda: driver_pid(service, job))
    until(runner, lambda: any("Step 3/" in m for m in messages(client, job)))
    assert client.fine_tuning.jobs.pause(job).status == "pausing"
    assert client.fine_tuning.jobs.pause(job).status == "pausing"  # asked twice, it is the same
    until(runner, lambda: client.fine_tuning.jobs.retrieve(job).status == "paused")
    assert gone(pid)
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job).data or [None]
    assert checkpoint is None or checkpoint.step_number < 60
    again = Runner(service.settings, service.store, service.link)  # the service starts again
    assert ended(client, again, other).status == "succeeded"  # the cluster is free for others
    assert client.fine_tuning.jobs.retrieve(job).status == "paused"

    assert client.fine_tuning.jobs.resume(job).status == "queued"
    done = ended(client, again, job)
    assert done.status == "succeeded" and done.trained_tokens == 600
    made = steps_made(service, job)
    assert [step for step, _ in made] == list(range(1, 61)) and {attempt for _, attempt in made} == {1, 2}
    told = messages(client, job)
    assert "The job is paused and has left the cluster." in told and "The job was resumed." in told
    assert not [m for m in told if "lost" in m]
    with pytest.raises(BadRequestError, match="already succeeded"):
        client.fine_tuning.jobs.pause(job)


def test_a_pause_taken_back_costs_at_most_an_attempt(client: OpenAI, runner: Runner, service: Service) -> None:
    job = create(client, steps=40, hold=10)
    until(runner, lambda: any("Step 2/" in m for m in messages(client, job)))
    client.fine_tuning.jobs.pause(job)
    runner.step()
    assert client.fine_tuning.jobs.resume(job).status == "running"
    runner.step()
    RunDir(service.settings.runs / job).path("go").touch()
    done = ended(client, runner, job)
    assert done.status == "succeeded" and [step for step, _ in steps_made(service, job)] == list(range(1, 41))
    assert not [m for m in messages(client, job) if "lost" in m]


def test_a_pause_before_training_stops_at_once(client: OpenAI, runner: Runner, service: Service) -> None:
    job = create(client, steps=3, prepare_s=1000)
    pid = until(runner, lambda: driver_pid(service, job))
    until(runner, lambda: (detail := client.get(f"/tuneyard/jobs/{job}", cast_to=object)) and detail["stage"] == "prepare")  # type: ignore[index]
    client.fine_tuning.jobs.pause(job)
    started = time.monotonic()
    until(runner, lambda: client.fine_tuning.jobs.retrieve(job).status == "paused")
    assert gone(pid) and time.monotonic() - started < 15
    client.fine_tuning.jobs.resume(job)
    until(runner, lambda: driver_pid(service, job, attempt=2))
    client.fine_tuning.jobs.cancel(job)
    until(runner, lambda: gone(driver_pid(service, job, attempt=2)))


def test_a_queued_job_is_paused_and_a_paused_one_cancelled(client: OpenAI, runner: Runner, service: Service) -> None:
    first, second = create(client, steps=10_000), create(client, steps=1)
    until(runner, lambda: client.fine_tuning.jobs.retrieve(first).status == "running")
    assert client.fine_tuning.jobs.pause(second).status == "paused"
    client.fine_tuning.jobs.pause(first)
    until(runner, lambda: client.fine_tuning.jobs.retrieve(first).status == "paused")
    runner.step()
    assert client.fine_tuning.jobs.retrieve(second).status == "paused"
    assert client.fine_tuning.jobs.cancel(first).status == "cancelled"
    runner.step()
    assert service.store.job(client.fine_tuning.jobs.retrieve(first).organization_id, first).released  # type: ignore[union-attr]
    client.fine_tuning.jobs.resume(second)
    assert ended(client, runner, second).status == "succeeded"


def test_a_resize_starts_the_next_attempt_with_other_workers(client: OpenAI, runner: Runner, service: Service) -> None:
    job = create(client, steps=40, hold=10)
    until(runner, lambda: any("Step 2/" in m for m in messages(client, job)))
    detail: Any = client.post(f"/tuneyard/jobs/{job}/resize", body={"workers": 1}, cast_to=object)
    assert detail["workers"] == 1
    with pytest.raises(BadRequestError, match="the cluster has 1 CPUs"):
        client.post(f"/tuneyard/jobs/{job}/resize", body={"workers": 3}, cast_to=object)
    done = ended(client, runner, job)
    assert done.status == "succeeded" and [step for step, _ in steps_made(service, job)] == list(range(1, 41))
    told = messages(client, job)
    assert "Asked to train with 1 worker(s)." in told and "Attempt 2 started." in told
    assert not [m for m in told if "lost" in m]
    order = RunDir(service.settings.runs / job).read("launch.json", LaunchOrder)
    assert order and (order.attempt, order.workers) == (2, 1)
    with pytest.raises(BadRequestError, match="already succeeded"):
        client.post(f"/tuneyard/jobs/{job}/resize", body={"workers": 1}, cast_to=object)


def test_only_one_of_two_runners_acts(client: OpenAI, runner: Runner, service: Service) -> None:
    job = create(client)
    other = Runner(service.settings, service.store, service.link, owner="other")
    assert service.store.hold_lease(runner.owner, 60)
    other.step()
    assert client.fine_tuning.jobs.retrieve(job).status == "validating_files"
    assert ended(client, runner, job).status == "succeeded"


def test_checkpoints_that_lie_elsewhere_are_listed(own_service: Service, tmp_path: Path) -> None:
    client = own_service.client()
    job = client.fine_tuning.jobs.retrieve(create(client))
    row = own_service.store.job(job.organization_id, job.id)
    assert row is not None
    there = {**row.spec["checkpoint"], "to": f"file://{tmp_path}/there"}
    own_service.store.change(job.id, attempt=1, losses=2, spec={**row.spec, "checkpoint": there})
    record = CheckpointRecord(step=3, files={}, train_loss=1.0, train_accuracy=0.5)
    write_atomic(tmp_path / "there" / job.id / checkpoint_name(3, 1) / "MANIFEST.json", record.model_dump_json())
    Runner(own_service.settings, own_service.store, own_service.link).step()
    assert [found.step for found in own_service.store.checkpoints(job.id)] == [3]
    assert own_service.store.open_jobs()[0].losses == 0  # a new checkpoint is progress


RUN_AWAY = """
    import sys, threading
    from pathlib import Path
    from cluster.ray_rest import RayRest
    from service.link import Link
    from service.runner import Runner
    from service.settings import Settings
    from service.store import Store
    home, address, token, driver = sys.argv[1:]
    settings = Settings(home=Path(home), models=Path(home) / "models", driver=driver, poll_s=0.0, backoff_s=0.05)
    print("up", flush=True)
    Runner(settings, Store(settings.database_url), Link(RayRest(address, token), "127.0.0.1", 1)).run(threading.Event())
"""


def test_a_runner_killed_anywhere_carries_on(client: OpenAI, service: Service, head: local.LocalHead) -> None:
    """Killed ever again while jobs start, run and end: each job runs in one attempt, and every event is there once."""
    chance = random.Random(0)
    jobs = [create(client, steps=20, seconds=0.02) for _ in range(3)]  # one after the other: no life is long enough for two
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(RUN_AWAY),
        str(service.settings.home),
        head.address,
        head.token(),
        service.settings.driver,
    ]

    def all_done() -> bool:
        return all(client.fine_tuning.jobs.retrieve(job).finished_at for job in jobs)

    kill = 0
    for kill in itertools.count():
        assert kill < 60
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout and process.stdout.readline() == b"up\n"
            time.sleep(chance.uniform(0.0, 0.5 + 0.05 * kill))  # ever longer: on a slow machine, too, it comes to an end
            process.kill()
        if all_done():
            break
    assert kill >= 3
    for job in jobs:
        found = client.fine_tuning.jobs.retrieve(job)
        assert found.status == "succeeded" and found.trained_tokens == 200 and len(set(found.result_files)) == 2
        told = messages(client, job)
        assert not [m for m in told if "lost" in m] and told.count("The job has successfully completed.") == 1
        assert [m for m in told if m.startswith("Step ")] == [f"Step {n}/20: training loss={2 / n:.2f}" for n in range(1, 20)] + [
            "Step 20/20: training loss=0.10, validation loss=1.00"
        ]


def test_result_table_is_numeric() -> None:
    step = StepRecord(
        step=1, num_steps=1, epoch=1.0, train_loss=0.5, train_accuracy=0.25, learning_rate=1e-3, grad_norm=1.0,
        tokens=1, supervised_tokens=1, seconds=1.0,
    )  # fmt: skip
    assert table([step]).splitlines()[1] == "1,0.500000,0.250000,,"
