"""The command line of this checkout on a home of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from servicekit import BASE, DRIVER, rows, wait_for

from service import cli

REPOSITORY = Path(__file__).parents[2]


class Tuneyard:
    """The command line of this checkout on one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "TUNEYARD_"))}
        ours = {
            "TUNEYARD_HOME": home,
            "TUNEYARD_MODELS": home / "models",
            "TUNEYARD_DRIVER": DRIVER,
            "TUNEYARD_POLL_S": 0.1,
            "TUNEYARD_CHAT_WAIT_S": 600,
            "TUNEYARD_PORT": 0,
        }
        self.environment = keep | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"} | {k: str(v) for k, v in ours.items()}
        self.clients: list[OpenAI] = []
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, *args: str, code: int = 0) -> str:
        """Run a command to its end, in this process (which saves seconds of imports each time); what it printed, both streams."""
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
            for name in os.environ.keys() - self.environment.keys():
                patch.delenv(name)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tuneyard", *args])
            with pytest.raises(SystemExit) as left:
                cli.main()
        assert (left.value.code or 0) == code, printed.getvalue()
        return printed.getvalue()

    def refused(self, *args: str) -> str:
        """Try to start a second service; what it printed."""
        command = [sys.executable, "-m", "service.cli", "up", *args]
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
        assert done.returncode == 1 and "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def up(self) -> str:
        """Start the service; all that it prints until it is ready."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "up"], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                self.process.stdout.close()  # as when a terminal goes away: nothing may depend on it
                return "".join(lines)
        raise AssertionError("".join(lines))

    def end(self, how: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait(300)

    def close(self) -> None:
        """Stop the service, and leave nothing of it unwaited for or open."""
        self("down")
        if self.process is not None:
            self.process.wait(300)
        for client in self.clients:
            client.close()

    def client(self) -> OpenAI:
        service = json.loads((self.home / "service.json").read_text())
        client = OpenAI(base_url=service["base_url"], api_key=(self.home / "key").read_text(), max_retries=0)
        self.clients.append(client)
        return client


def begun(client: OpenAI, **orders: Any) -> str:
    """A job that has made some of its steps."""
    file = client.files.create(file=("a.jsonl", rows(seconds=0.1, **orders)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"job": {"deploy": {"serve": False}}}).id
    wait_for(lambda: any(m.startswith("Step 3/") for m in messages(client, job)))
    return job


def messages(client: OpenAI, job: str) -> list[str]:
    return [e.message for e in client.fine_tuning.jobs.list_events(job, limit=100)]
