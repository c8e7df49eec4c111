"""A job of the real driver that is resized while it trains: it goes on from its checkpoint with other workers, on a real Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError
from servicekit import BASE, Service, service_on, wait_for

from cluster import local
from service.link import Link
from service.runner import Runner
from service.settings import Settings
from trainers.records import RunDir

ROWS = b"".join(json.dumps({"instruction": f"say {n}", "output": f"{n} it is"}).encode() + b"\n" for n in range(60))
JOB: dict[str, Any] = {
    "model": {"max_length": 256},
    "optim": {"epochs": 30, "batch_size": 4},
    "validate": {"every_steps": 1000, "samples": 0},
    "checkpoint": {"every_steps": 1000},  # the one that the resize makes is the only one to go on from
    "scale": {"workers": 1, "precision": "fp32", "compile": False},
    "export": {"merge": False},
    "deploy": {"serve": False},
}


@pytest.fixture
def service(tmp_path: Path, tiny: Path) -> Iterator[Service]:
    shutil.copytree(tiny, tmp_path / "models" / BASE)
    head = local.start(tmp_path / "ray", num_cpus=2, path=str(Path(__file__).parents[2]))
    try:
        with head.client() as ray, service_on(tmp_path, Link(ray, "127.0.0.1", head.serve_port), driver=Settings.load().driver) as service:
            yield service
    finally:
        local.stop(tmp_path / "ray")


def test_a_resized_job_goes_on_from_its_checkpoint(service: Service) -> None:
    client, runner = service.client(), Runner(service.settings, service.store, service.link)
    file = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune").id

    def until(condition: Any) -> None:
        wait_for(lambda: [runner.step(), condition()][1], 600)

    tries = 0
    while True:  # the training may be over before it is asked
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"job": JOB}).id
        run = RunDir(service.settings.runs / job)
        until(lambda job=job, run=run: run.steps() or client.fine_tuning.jobs.retrieve(job).finished_at)
        with suppress(BadRequestError):  # it is over
            client.post(f"/tuneyard/jobs/{job}/resize", body={"workers": 2}, cast_to=object)
        until(lambda job=job: client.fine_tuning.jobs.retrieve(job).finished_at)
        done = client.fine_tuning.jobs.retrieve(job)
        assert done.status == "succeeded", done.error
        told = [e.message for e in client.fine_tuning.jobs.list_events(job, limit=100)]
        if "Attempt 2 started." in told:
            break
        tries += 1
        assert tries < 5
    assert "Asked to train with 2 worker(s)." in told and not [line for line in told if "lost" in line]
    assert [line for line in told if line.startswith("Training starts") and "on 1 worker(s)" in line]
    assert [line for line in told if line.startswith("Training resumes after step") and "on 2 worker(s)" in line]
    made = [(record.step, record.attempt) for _, records in run.step_segments() for record in records]
    steps, attempts = [step for step, _ in made], [attempt for _, attempt in made]
    assert steps == list(range(1, run.steps()[-1].num_steps + 1))  # none twice, none left out
    assert attempts == sorted(attempts) and set(attempts) == {1, 2}
