"""`tuneyard` as a command: started, used, killed, started again, stopped. The tiny model stands where the real base would lie."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commandline import Tuneyard, begun, messages
from servicekit import BASE, rows, wait_for

from cluster import local
from service.settings import Settings
from service.store import Store


@pytest.fixture(scope="module")
def tuneyard(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Tuneyard]:
    tuneyard = Tuneyard(tmp_path_factory.mktemp("home"))
    shutil.copytree(tiny, tuneyard.home / "models" / BASE)
    yield tuneyard
    tuneyard.close()


def job_file(folder: Path, **orders: Any) -> Path:
    (folder / "train.jsonl").write_bytes(rows(**orders))
    file = folder / "job.yaml"
    file.write_text("name: mine\ndata: {train: [{path: train.jsonl}]}\ndeploy: {serve: false}\n")
    return file


def test_a_day_with_the_service(tuneyard: Tuneyard, tmp_path: Path) -> None:
    told = tuneyard.up()
    key = (tuneyard.home / "key").read_text()
    assert f"export OPENAI_API_KEY={key}" in told and f"Key: {key} (shown once" in told
    assert (tuneyard.home / "key").stat().st_mode & 0o777 == 0o600
    assert (tuneyard.home / "serve.token").stat().st_mode & 0o777 == 0o600
    head = local.find(tuneyard.home)
    assert head

    # A second service on the same home, and on the same port.
    told = tuneyard.refused()
    assert "Another `tuneyard up`" in told and "fix:" in told
    port = json.loads((tuneyard.home / "service.json").read_text())["base_url"].split(":")[2].split("/")[0]
    told = tuneyard.refused("--home", str(tmp_path / "other"), "--port", port)
    assert f"Port {port} on 127.0.0.1: Address already in use." in told and local.find(tmp_path / "other") is None

    # A job from the command line, to its end.
    told = tuneyard("submit", str(job_file(tmp_path, steps=3)), "-f")
    assert "Fine-tuning job started." in told and f"succeeded: ft:{BASE}:default:mine:" in told
    [job] = json.loads(tuneyard("list", "--json"))
    assert job["status"] == "succeeded" and job["fine_tuned_model"] in tuneyard("models")
    shown = json.loads(tuneyard("show", job["id"], "--json"))
    assert shown["tuneyard"]["stage"] == "train" and shown["trained_tokens"] == 30
    assert job["id"] in tuneyard("show", job["id"], "-o", str(tmp_path / "job.html")) and job["id"] in tuneyard("list")
    page = (tmp_path / "job.html").read_text()
    assert job["fine_tuned_model"] in page and "<polyline" in page and "Fine-tuning job started." in page
    assert [json.loads(line)["type"] for line in tuneyard("events", job["id"], "--json").splitlines()].count("metrics") == 3
    assert "at work" in tuneyard("logs", job["id"])
    assert "already succeeded" in tuneyard("cancel", job["id"], code=1)

    # A base model answers, through Ray Serve.
    client = tuneyard.client()
    answer = client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert answer.usage and answer.usage.completion_tokens == 4
    assert tuneyard("chat", "gpt-4o-mini", "-m", "hi")

    # Killed in the middle of a job, and started again: the same Ray, the same attempt.
    job = begun(client, steps=60)
    assert tuneyard.end(signal.SIGKILL) == -signal.SIGKILL
    assert "Nothing answers" in tuneyard("list", code=1)
    told = tuneyard.up()
    assert "Found the local Ray" in told and key not in told
    assert local.find(tuneyard.home) == head
    client = tuneyard.client()
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job).finished_at)
    assert client.fine_tuning.jobs.retrieve(job).status == "succeeded" and "Attempt 2 started." not in messages(client, job)

    # Stopped in the middle of a job: nothing is left running, and the job waits for the next start.
    job = begun(client, steps=60, hold=10)
    members = head.members()
    assert "Stopped." in tuneyard("down")
    assert tuneyard.process and tuneyard.process.wait(5) == 0
    assert psutil.wait_procs(members, timeout=2)[1] == []
    assert local.find(tuneyard.home) is None and not (tuneyard.home / "service.json").exists()
    assert "Nothing was running." in tuneyard("down")
    tuneyard.up()
    client = tuneyard.client()
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job).finished_at)
    told = messages(client, job)
    assert client.fine_tuning.jobs.retrieve(job).trained_tokens == 600
    assert "Attempt 2 started." in told and not [m for m in told if "was lost" in m]

    # Killed, and what it left is stopped by hand.
    job = begun(client, steps=60, hold=10)
    head = local.find(tuneyard.home)
    assert head
    members = head.members()
    tuneyard.end(signal.SIGKILL)
    assert "Stopped." in tuneyard("down")
    assert psutil.wait_procs(members, timeout=2)[1] == [] and local.find(tuneyard.home) is None
    store = Store(f"sqlite:///{tuneyard.home / 'tuneyard.db'}")
    assert [(row.id, row.status, row.losses) for row in store.open_jobs()] == [(job, "queued", 0)]
    store.close()


def test_wrong_use(tuneyard: Tuneyard, tmp_path: Path) -> None:
    assert "No such option" in tuneyard("list", "--jsn", code=2)
    assert "Missing argument" in tuneyard("show", code=2)
    bare = ["--home", str(tmp_path / "none")]
    assert "No service runs on" in tuneyard("list", *bare, code=1)
    typo = tmp_path / "typo.yaml"
    typo.write_text("data: {train: [{path: x}]}\noptim: {epoch: 3}\n")
    told = tuneyard("submit", str(typo), *bare, code=1)
    assert "`optim.epoch` is not a key" in told and "Did you mean `epochs`?" in told
    assert "No such file" in tuneyard("submit", str(tmp_path / "gone.yaml"), code=1)
    assert "cannot name a project" in tuneyard("keys", "create", "--project", "No Good", *bare, code=1)
    assert tuneyard("keys", "create", "--project", "team", *bare).startswith("ty-")
    assert "Nothing was running." in tuneyard("down", *bare)


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEYARD_PORT", "9")
    monkeypatch.setenv("TUNEYARD_HOME", str(tmp_path))
    assert (Settings.load().port, Settings.load().home) == (9, tmp_path) and Settings.load(port=7).port == 7
    monkeypatch.setenv("TUNEYARD_PORT", "many")
    with pytest.raises(Exception, match="TUNEYARD_"):
        Settings.load()
