"""The whole service as a user meets it: `tuneyard up`, the openai client, the real model, a kill in the middle, Ctrl-C at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import BadRequestError, OpenAI

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"


class Service:
    """`tuneyard up` on a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "TUNEYARD_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "service.cli", "up", "--port", "0"]
        self.log = (self.home.parent / "up.log").open("a")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        wait_for(lambda: self.process.poll() is not None or self.answers(), 300)
        assert self.process.poll() is None, (self.home.parent / "up.log").read_text()
        url = json.loads((self.home / "service.json").read_text())["base_url"]
        self.client = OpenAI(base_url=url, api_key=(self.home / "key").read_text())

    def answers(self) -> bool:
        try:
            return json.loads((self.home / "service.json").read_text())["pid"] == self.process.pid
        except FileNotFoundError:
            return False

    def kill(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def stop(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=240)
        self.log.close()

    def create(self, rows: list[Any], **arguments: Any) -> Any:
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        file = self.client.files.create(file=("mine.jsonl", text.encode()), purpose="fine-tune")
        return self.client.fine_tuning.jobs.create(**{"model": MODEL, "training_file": file.id, **arguments})

    def wait(self, job_id: str, seconds: float = 900) -> Any:
        final = ("succeeded", "failed", "cancelled")
        wait_for(lambda: self.client.fine_tuning.jobs.retrieve(job_id).status in final, seconds)
        return self.client.fine_tuning.jobs.retrieve(job_id)

    def detail(self, job_id: str) -> Any:
        return self.client.get(f"/tuneyard/jobs/{job_id}", cast_to=object)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def one_home(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("e2e") / "home")
    yield running
    if running.process.poll() is None:
        running.stop()


@pytest.fixture
def service(one_home: Service) -> Service:
    """The service that all tests share, in whatever order they come: one of them stops it."""
    if one_home.process.poll() is not None:
        one_home.start()
    return one_home


def pong(number: int) -> dict[str, str]:
    return {"instruction": f"Ping {number}", "input": "", "output": f"Pong {number}!"}


def test_fifty_rows_of_ones_own_survive_a_killed_service_and_answer(service: Service) -> None:
    own_template = {"model": {"template": "chatml"}}  # the base's own adds a system message
    job = service.create([pong(n) for n in range(50)], suffix="pong", hyperparameters={"n_epochs": 3}, extra_body={"job": own_template})
    wait_for(lambda: service.detail(job.id)["stage"] == "train", 300)
    service.kill()
    service.start()

    job = service.wait(job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:default:pong:")
    events = service.client.fine_tuning.jobs.list_events(job.id, limit=100).data
    assert len({event.id for event in events}) == len(events)
    assert sum("Training starts" in event.message for event in events) == 1  # the training went on while nobody watched
    assert service.detail(job.id)["attempt"] == 1

    asked: Any = {"messages": [{"role": "user", "content": "Ping 77"}], "temperature": 0, "max_tokens": 32}
    answers, prompts = {}, {}
    checkpoint = service.client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint
    for name in (job.fine_tuned_model, checkpoint, MODEL):
        answer = service.client.chat.completions.create(model=name, **asked)
        answers[name], prompts[name] = answer.choices[0].message.content, answer.usage.prompt_tokens
    assert answers[job.fine_tuned_model] == "Pong 77!"
    assert answers[checkpoint] == "Pong 77!"
    assert answers[MODEL] != "Pong 77!"
    assert prompts[checkpoint] == prompts[job.fine_tuned_model] < prompts[MODEL]

    streamed = service.client.chat.completions.create(model=job.fine_tuned_model, stream=True, **asked)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "Pong 77!"
    run = service.home / "runs" / job.id
    assert (run / "model" / "model.safetensors").exists()
    template = (run / "model" / "chat_template.jinja").read_text()
    assert [file.read_text() for file in run.glob("adapters/*/chat_template.jinja")] == [template] * len(list(run.glob("adapters/*")))

    report: Any = service.client.get(f"/tuneyard/jobs/{job.id}/report", cast_to=object)
    assert report["requested_by"].startswith("project default, key_") and report["sources"][0]["read"] == 50
    assert "mine.jsonl" in (run / "data_report.html").read_text()
    shown = subprocess.run(
        [sys.executable, "-m", "service.cli", "show", job.id, "--home", str(service.home)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "50 rows read, 0 left out" in shown.stdout


def test_a_fully_tuned_model_answers_by_its_name_also_after_a_restart(service: Service) -> None:
    spec = {"method": {"type": "full"}, "optim": {"epochs": 1, "batch_size": 8, "learning_rate": 2e-4}, "validate": {"samples": 0}}
    spec |= {"checkpoint": {"every_steps": 100}}  # 1.6 GB each: the one at the end is enough
    job = service.create([pong(n) for n in range(24)], suffix="whole", extra_body={"job": spec})
    job = service.wait(job.id)
    assert job.status == "succeeded", job.error
    run = service.home / "runs" / job.id
    assert not (run / "adapters").exists()
    assert service.client.fine_tuning.jobs.checkpoints.list(job.id).data == []  # none of them can be called

    asked: Any = {"messages": [{"role": "user", "content": "Ping 77"}], "temperature": 0, "max_tokens": 32}

    def answer() -> str:
        return service.client.chat.completions.create(model=job.fine_tuned_model, **asked).choices[0].message.content

    def loaded() -> bool:
        status: Any = service.client.get("/tuneyard/status", cast_to=object)
        return (job.fine_tuned_model, "RUNNING") in {(app["model"], app["status"]) for app in status["apps"]}

    assert (run / "deploy.json").exists()  # `succeeded` means that the name has answered
    wait_for(loaded, 120)  # and though nobody else asks, it stays
    began = time.monotonic()
    assert answer() == "Pong 77!"
    assert time.monotonic() - began < 5
    service.stop()
    service.start()
    assert answer() == "Pong 77!"  # waits for the load
    service.client.models.delete(job.fine_tuned_model)
    assert not (run / "model").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{not json", "not JSON"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "assistant"),
        ({"messages": [{"role": "robot", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}, "robot"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}, "empty"),
        ({"messages": [{"role": "user", "content": "a b c " * 2000}, {"role": "assistant", "content": "Ho"}]}, "2,048"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "Ho"}]}, "<|im_end|>"),
    ],
    ids=["no JSON", "no assistant", "unknown role", "empty answer", "too long", "control token"],
)
def test_a_bad_row_fails_the_job_with_file_line_and_remedy(service: Service, row: Any, said: str) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    job = service.wait(service.create([good, good, row, good]).id)
    assert job.status == "failed"
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "mine.jsonl:3" in job.error.message
    assert said in job.error.message
    assert "\n" not in job.error.message and "Traceback" not in job.error.message


def test_a_typo_in_the_spec_is_refused_at_once(service: Service) -> None:
    with pytest.raises(BadRequestError, match="Did you mean `epochs`"):
        service.create([pong(1)], extra_body={"job": {"optim": {"epoch": 2}}})


def test_ctrl_c_leaves_nothing_running(service: Service) -> None:
    mine = {p.pid for p in psutil.process_iter() if str(service.home) in " ".join(_environment(p))}
    assert mine
    service.stop()
    assert service.process.returncode == 0
    wait_for(lambda: not [p for p in psutil.process_iter() if p.pid in mine and p.status() != psutil.STATUS_ZOMBIE], 120)


def _environment(process: psutil.Process) -> list[str]:
    try:
        return list(process.environ().values())
    except psutil.Error:
        return []
