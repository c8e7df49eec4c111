"""`tuneyard chat`: against the gateway over HTTP, and in a terminal of its own."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from rich.console import Console
from servicekit import BASE, Service, service_on, serving
from upstream import Upstream

from cluster.ray_rest import RayRest
from service.chatting import Chat
from service.link import Link


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def service(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    with serving(upstream.app()) as port, service_on(tmp_path, Link(RayRest("http://127.0.0.1:9"), "127.0.0.1", port)) as service:
        yield service


def chat_on(service: Service, *models: str, terminal: bool = False, **given: object) -> tuple[Chat, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=80, height=24, highlight=False, no_color=True)
    return Chat(service.client("acme"), list(models or (BASE,)), console, **given), written  # type: ignore[arg-type]


def test_history_system_prompt_and_settings(service: Service, upstream: Upstream) -> None:
    chat, written = chat_on(service, system="Be brief.", settings={"temperature": 0.5})
    chat.run(
        iter(
            [
                "one",
                "",
                "two",
                "/set top_p 0.9",
                "/set temperature",
                "/system Be kind.",
                "three",
                "/reset",
                "/system",
                "four",
                "/quit",
                "five",
            ]
        )
    )
    bodies = [body for _, body in upstream.asked]
    answer = {"role": "assistant", "content": "0 1 2 "}
    brief, one, two, three = (
        {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "one"), ("user", "two"), ("user", "three"))
    )
    assert [body["messages"] for body in bodies] == [
        [brief, one],
        [brief, one, answer, two],
        [{"role": "system", "content": "Be kind."}, one, answer, two, answer, three],
        [{"role": "user", "content": "four"}],
    ]
    assert [(b.get("temperature"), b.get("top_p")) for b in bodies] == [(0.5, None), (0.5, None), (None, 0.9), (None, 0.9)]
    assert written.getvalue().count("0 1 2 \n") == 4


def test_what_is_wrong_is_told_and_the_talk_goes_on(service: Service, upstream: Upstream) -> None:
    chat, written = chat_on(service)
    chat.run(iter(["/nothing", "/set warmth 3", "/set seed x", "/help", "/show"]))
    told = written.getvalue()
    assert (
        "no command `/nothing`" in told and "no setting `warmth`" in told and "`x` is no value of seed" in told and "/system TEXT" in told
    )
    upstream.answer = "refuse"
    chat.run(iter(["hi"]))
    upstream.answer = ""
    chat.run(iter(["ho"]))
    assert "error: no" in written.getvalue() and "0 1 2 " in written.getvalue()
    assert upstream.asked[-1][1]["messages"] == [{"role": "user", "content": "ho"}]  # what failed was not said
    unknown, _ = chat_on(service, "ft:nobody")
    with pytest.raises(openai.NotFoundError):
        unknown.ask("hi")


def test_two_models_side_by_side(service: Service, upstream: Upstream) -> None:
    for terminal in (False, True):
        chat, written = chat_on(service, BASE, "gpt-4o-mini", terminal=terminal)
        chat.ask("hi")
        assert {body["model"] for _, body in upstream.asked} == {BASE, "gpt-4o-mini"}
        lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).splitlines() if "0 1 2" in line]
        lines = lines[-1:] if terminal else lines  # a terminal saw them grow
        assert len(lines) == (1 if terminal else 2) and sum(line.count("0 1 2") for line in lines) == 2
        assert [talk.said[-1]["content"] for talk in chat.talks] == ["0 1 2 ", "0 1 2 "]
    assert "3 tokens" in written.getvalue()


def test_a_models_text_cannot_command_the_terminal(service: Service, upstream: Upstream) -> None:
    upstream.words = "[red]\x1b[2J\x07"
    chat, written = chat_on(service, terminal=True)
    chat.ask("hi")
    assert written.getvalue().startswith("[red][2J0 [red][2J1 [red][2J2 \n")


def command(service: Service, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "OPENAI_BASE_URL": service.base_url, "OPENAI_API_KEY": service.key("acme"), "TERM": "dumb"}
    return [sys.executable, "-m", "service.cli", "chat", *arguments], environment


def test_one_question_from_a_pipe(service: Service, upstream: Upstream) -> None:
    line, environment = command(service, BASE, "--system", "Be brief.", "--max-tokens", "9", "--seed", "4")
    done = subprocess.run(line, input="What is\nthis?\n", env=environment, capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout == "0 1 2 \n"
    body = upstream.asked[0][1]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is\nthis?"}]
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (9, 4, 0.0)
    upstream.answer = "refuse"
    failed = subprocess.run(line, input="hi", env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert failed.returncode == 1 and "error: no" in failed.stderr


def test_ctrl_c_stops_the_answer_and_not_the_chat(service: Service, upstream: Upstream) -> None:
    upstream.answer = "endless"
    line, environment = command(service, BASE)
    parent, child = pty.openpty()
    process = subprocess.Popen(
        line, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True, preexec_fn=_take_terminal
    )
    os.close(child)
    try:
        _until(parent, "> ")
        os.write(parent, b"count\n")
        _until(parent, "0 1 2 ")
        os.write(parent, b"\x03")
        _until(parent, r"\(stopped\)[^>]*> ")
        assert upstream.closed.wait(300)  # and the model no longer works on it
        upstream.answer = ""
        os.write(parent, b"again\n")
        _until(parent, "0 1 2 [^>]*> ")
        os.write(parent, b"\x04")
        assert process.wait(300) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    told = upstream.asked[-1][1]["messages"]
    assert [m["role"] for m in told] == ["user", "assistant", "user"] and told[1]["content"].startswith("0 1 2 ")


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in the background ignores it, and so would we


def _until(terminal: int, pattern: str, timeout_s: float = 300) -> None:
    """Read until this was shown."""
    shown, deadline = "", time.monotonic() + timeout_s
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"not shown: {pattern!r}; but {shown!r}"
        shown += os.read(terminal, 4096).decode("utf-8", "replace")
