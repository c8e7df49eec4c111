"""The demo's own part: what it starts, it stops. (The whole of it is run by .ci/run.)"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from service.client import Update
from service.demo import _Progress, demo
from trainers.errors import Unavailable


def test_a_service_that_cannot_start_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("TUNEYARD_PORT", str(taken.getsockname()[1]))
        with pytest.raises(Unavailable, match=r"The service did not start: Port .* in use") as caught:
            demo(tmp_path / "home")
    assert "choose another --port" in caught.value.remedy
    assert _processes_of(tmp_path) == []


def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path) -> None:
    home = tmp_path / "home"
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; from pathlib import Path; from service.demo import demo; sys.exit(demo(Path({str(home)!r})))"],
        env=os.environ | {"TUNEYARD_PORT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 240
        while not (home / "ray.json").exists():  # Ray is being started: the worst moment
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=240)
    finally:
        child.kill()
    assert child.returncode == 130 and "Interrupted" in said
    assert _processes_of(tmp_path) == []
    assert not (home / "ray.json").exists()


def _update(stage: str | None, done: int, events: tuple[str, ...] = ()) -> Update:
    numbers = {"done": done, "total": 40, "train_loss": 0.5}
    told = [{"type": "message", "message": text} for text in events]
    return Update({"status": "running"}, told, {"stage": stage, "progress": {"data": numbers} if stage else None})


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_in_a_terminal_and_a_line_now_and_then_elsewhere(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.demo.LINE_S", 1000.0)
    screen = io.StringIO()
    shown = _Progress(Console(file=screen, force_terminal=terminal, width=120, highlight=False))
    with shown:
        for update in (_update(None, 0), _update("train", 1, ("Training [starts]",)), *(_update("train", n) for n in range(2, 20))):
            shown.update(update)
    text = screen.getvalue()
    assert "  Training [starts]" in text
    assert list(shown.stage_seconds) == ["queue", "train"]
    assert ("\x1b[" in text) == terminal
    if not terminal:
        assert [line.split()[:2] for line in text.splitlines() if line.startswith("train")] == [["train", "1/40"]]


def _processes_of(folder: Path) -> list[str]:
    """Command lines of processes that name this test's folder or belong to a Ray whose token lies in it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        if str(folder) in " ".join(process.info["cmdline"] or []) or str(folder) in environment.get("RAY_AUTH_TOKEN_PATH", ""):
            found.append(" ".join(process.info["cmdline"]))
    return found
