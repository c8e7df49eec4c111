"""The evaluate stage against a real HTTP server that speaks the serving app's protocol with canned answers."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from serve.evaluate import CONCURRENCY, TRIES, Endpoint, Model, evaluate
from trainers.errors import DataError, Unavailable
from trainers.records import EvaluationRecord, RunDir
from trainers.spec import EvalTask

TOKEN = "the-serving-token"
BASE = Model("base")
TUNED = Model("ft:base:me:job:1", adapter="/runs/1/adapters/step-000010")


class Peer:
    """Answers "{n}" for the question "n"; the base model gets every second one wrong. Questions may ask for trouble."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.app.post("/m/v1/chat/completions")(self.chat)
        self.requests: list[tuple[dict, dict]] = []
        self.asked: Counter[tuple[str, str]] = Counter()
        self.now = self.most = self.awaited = 0
        """How many are asked at a time, were at most, and must be before any is answered."""

    async def chat(self, request: Request) -> Response:
        import asyncio

        body = await request.json()
        self.requests.append((dict(request.headers), body))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": {"message": "no such token"}}, 401)
        tuned = request.headers.get("x-tuneyard-adapter") == TUNED.adapter
        question = body["messages"][-1]["content"]
        key = ("tuned" if tuned else "base", question)
        self.asked[key] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        deadline = time.monotonic() + 60
        while self.most < self.awaited and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        self.now -= 1
        number = question.removeprefix("flaky ").removeprefix("broken ").removeprefix("refused ")
        if question.startswith("flaky") and self.asked[key] < TRIES:
            return JSONResponse({"error": {"message": "busy"}}, 503)
        if question.startswith("broken") and tuned:
            return Response("<html>proxy error</html>")
        if question.startswith("refused") and tuned:
            return JSONResponse({"error": {"message": "too long"}}, 400)
        text = f'{{"n": {number}}}' if tuned or int(number) % 2 == 0 else "Sure! Here it is"
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})


@pytest.fixture
def peer() -> Iterator[tuple[Peer, Endpoint]]:
    peer = Peer()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(peer.app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield peer, Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/m", TOKEN, backoff_s=0.01)
    server.should_exit = True
    thread.join()
    listener.close()


def task(folder: Path, questions: list[str], **more: object) -> EvalTask:
    path = folder / "test.jsonl"
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Count."},
                {"role": "user", "content": q},
                {"role": "assistant", "content": f'{{"n":{q.split()[-1]}}}'},
            ],
            "kind": "small" if int(q.split()[-1]) < 10 else "large",
        }
        for q in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalTask.model_validate({"path": str(path), "metric": "json_match", "max_tokens": 7, **more})


def test_base_and_tuned_are_asked_and_compared(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    run = RunDir(tmp_path / "run", attempt=2, writer="driver")
    record = evaluate(run, [task(tmp_path, [str(n) for n in range(40)])], peer[1], BASE, TUNED, slice_by="kind")
    (result,) = record.tasks
    assert (result.examples, result.base, result.tuned) == (
        40,
        {"json_match": 0.5, "valid_json": 0.5},
        {"json_match": 1.0, "valid_json": 1.0},
    )
    assert {name: (s["examples"], s["base"]["json_match"]) for name, s in result.slices.items()} == {"small": (10, 0.5), "large": (30, 0.5)}
    assert result.failed_requests == {"base": 0, "tuned": 0}
    assert [s["id"] for s in result.samples] == ["test.jsonl:1", "test.jsonl:2", "test.jsonl:11"]
    assert result.samples[1] == {
        "id": "test.jsonl:2",
        "prompt": "1",
        "reference": '{"n":1}',
        "base": "Sure! Here it is",
        "tuned": '{"n": 1}',
    }
    read = run.read("evaluation.json", EvaluationRecord)
    assert read is not None and read.tasks == record.tasks and read.attempt == 2
    progress = json.loads(run.path("progress.json").read_text())
    assert (progress["message"], progress["data"]) == ("evaluate", {"done": 80, "total": 80})


def test_requests_say_what_the_serving_app_needs(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    peer[0].awaited = 2
    evaluate(RunDir(tmp_path / "run"), [task(tmp_path, [str(n) for n in range(80)])], peer[1], BASE, TUNED)
    assert 2 <= peer[0].most <= CONCURRENCY
    by_model = {headers["x-tuneyard-model"]: (headers, body) for headers, body in peer[0].requests}
    assert "x-tuneyard-adapter" not in by_model["base"][0]
    headers, body = by_model[TUNED.name]
    assert headers["x-tuneyard-adapter"] == TUNED.adapter
    assert (body["temperature"], body["max_tokens"]) == (0, 7)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]  # never the reference


def test_a_model_with_an_app_of_its_own_is_asked_there(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    endpoint = Endpoint("http://127.0.0.1:9/m", TOKEN, backoff_s=0.0)  # nobody is here
    with pytest.raises(Unavailable, match="base answered none"):
        evaluate(RunDir(tmp_path / "run"), [task(tmp_path, ["2"])], endpoint, BASE, Model("ft:whole", url=peer[1].url))
    assert [headers["x-tuneyard-model"] for headers, _ in peer[0].requests] == ["ft:whole"]


def test_a_busy_endpoint_is_asked_again(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    record = evaluate(RunDir(tmp_path / "run"), [task(tmp_path, ["flaky 2", "4"])], peer[1], BASE, TUNED)
    assert record.tasks[0].base["json_match"] == record.tasks[0].tuned["json_match"] == 1.0
    assert peer[0].asked["tuned", "flaky 2"] == TRIES


def test_failed_requests_count_as_wrong_and_are_told(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    run = RunDir(tmp_path / "run", writer="driver")
    (result,) = evaluate(run, [task(tmp_path, ["broken 2", "refused 4", "6", "8"])], peer[1], BASE, TUNED).tasks
    assert result.failed_requests == {"base": 0, "tuned": 2}
    assert (result.base["json_match"], result.tuned["json_match"]) == (1.0, 0.5)
    assert peer[0].asked["tuned", "broken 2"] == TRIES
    assert peer[0].asked["tuned", "refused 4"] == 1  # a 400 never heals
    events = [event for _, segment in run.events() for event in segment]
    assert [(e.level, e.message.split(" to ")[0]) for e in events] == [("warn", "2 of 4 requests")]


def test_a_model_that_never_answers_is_an_error_not_a_score(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(Unavailable, match="base answered none of 1 requests: HTTP 401"):
        evaluate(run, [task(tmp_path, ["2"])], Endpoint(peer[1].url, "wrong"), BASE, TUNED)
    with pytest.raises(Unavailable, match="ConnectError"):
        evaluate(run, [task(tmp_path, ["2"])], Endpoint("http://127.0.0.1:9/m", backoff_s=0.0), BASE, TUNED)
    assert run.read("evaluation.json", EvaluationRecord) is None


def test_an_unreadable_task_stops_before_any_request(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    good = task(tmp_path, ["2"])
    with pytest.raises(DataError, match="There is no file"):
        evaluate(RunDir(tmp_path / "run"), [good, EvalTask(path=str(tmp_path / "gone.jsonl"))], peer[1], BASE, TUNED)
    assert peer[0].requests == []
