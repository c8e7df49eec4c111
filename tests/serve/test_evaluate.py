"""The evaluate stage against a real HTTP server that speaks the serving app's protocol with canned answers, and against the real app."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from serve.evaluate import CONCURRENCY, TRIES, Endpoint, HeldOut, Model, evaluate
from tests.serve.conftest import over_http
from trainers.errors import DataError, Unavailable, UserError
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
        deadline = time.monotonic() + 300
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
    with over_http(peer.app) as url:
        yield peer, Endpoint(f"{url}/m", TOKEN, backoff_s=0.01)


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
    with pytest.raises(UserError, match="base answered none of 1 requests: HTTP 401"):  # tried again, it would be refused again
        evaluate(run, [task(tmp_path, ["2"])], Endpoint(peer[1].url, "wrong"), BASE, TUNED)
    with pytest.raises(Unavailable, match="ConnectError"):
        evaluate(run, [task(tmp_path, ["2"])], Endpoint("http://127.0.0.1:9/m", backoff_s=0.0), BASE, TUNED)
    assert run.read("evaluation.json", EvaluationRecord) is None


def test_an_unreadable_task_stops_before_any_request(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    good = task(tmp_path, ["2"])
    with pytest.raises(DataError, match="There is no file"):
        evaluate(RunDir(tmp_path / "run"), [good, EvalTask(path=str(tmp_path / "gone.jsonl"))], peer[1], BASE, TUNED)
    assert peer[0].requests == []


def test_every_answer_lies_beside_the_record(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    run = RunDir(tmp_path / "run")
    evaluate(run, [task(tmp_path, ["1", "refused 2"])], peer[1], BASE, TUNED, slice_by="kind")
    first, second = map(json.loads, run.path("answers.jsonl").read_text().splitlines())
    assert first["messages"][-1] == {"role": "user", "content": "1"}
    assert (first["task"], first["id"], first["reference"], first["slice"]) == ("test.jsonl", "test.jsonl:1", '{"n":1}', "small")
    assert (first["base"], first["tuned"]) == ("Sure! Here it is", '{"n": 1}')
    assert (second["base"], second["tuned"]) == ('{"n": 2}', None)


def test_a_killed_evaluation_asks_only_what_is_missing(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    """The tuned model's app is gone for a while: all that the base said is kept."""
    run, asked = RunDir(tmp_path / "run"), [task(tmp_path, [str(n) for n in range(50)])]
    gone = replace(TUNED, url="http://127.0.0.1:9/m")
    with pytest.raises(Unavailable, match="answered none of 50"):
        evaluate(run, asked, peer[1], BASE, gone)
    assert len(peer[0].requests) == 50
    record = evaluate(RunDir(tmp_path / "run", attempt=1), asked, peer[1], BASE, TUNED)
    assert Counter(headers["x-tuneyard-model"] for headers, _ in peer[0].requests) == {"base": 50, TUNED.name: 50}
    assert record.tasks[0].base["json_match"] == 0.5 and record.tasks[0].tuned["json_match"] == 1.0
    evaluate(RunDir(tmp_path / "run", attempt=2), asked, peer[1], BASE, TUNED)
    assert len(peer[0].requests) == 100
    changed = [asked[0].model_copy(update={"max_tokens": 8})]  # another question: nothing of the old answers holds
    evaluate(RunDir(tmp_path / "run", attempt=3), changed, peer[1], BASE, TUNED)
    assert len(peer[0].requests) == 200


def test_differences_come_with_intervals_and_groups_that_differ_with_a_warning(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    questions = [str(n) for n in range(40)] + [f"refused {n}" for n in range(2, 8, 2)]
    run = RunDir(tmp_path / "run", writer="driver")
    (result,) = evaluate(run, [task(tmp_path, questions)], peer[1], BASE, TUNED, slice_by="kind").tasks
    change = result.differences["json_match"]
    assert (change.better, change.worse) == (20, 3)
    assert change.low < change.difference < change.high and change.p < 0.001
    low, high = result.intervals["tuned"]["json_match"]
    assert low < result.tuned["json_match"] < high
    assert [w.split(" by")[0] for w in result.warnings] == ["Slices differ in json_match of the tuned model"]  # all failures are small
    assert any("Slices differ" in event.message for _, segment in run.events() for event in segment)


def test_faults_are_counted_against_the_base(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    (result,) = evaluate(RunDir(tmp_path / "run"), [task(tmp_path, [str(n) for n in range(40)])], peer[1], BASE, TUNED).tasks
    faults = {fault.kind: fault for fault in result.faults}
    assert {kind: (fault.base, fault.tuned) for kind, fault in faults.items()} == {"format": (20, 0), "same_answer": (20, 0)}
    assert faults["format"].p < 0.001


# -- the real app --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The tiny model behind its real app, in this process."""
    from serve.app import application
    from serve.chats import Chats
    from serve.transformers_engine import TransformersEngine

    with over_http(application(TransformersEngine(tiny), Chats(tiny), "tiny", TOKEN)) as url:
        yield Endpoint(url, TOKEN, backoff_s=0.01)


def nll(folder: Path, adapter: str | None, ids: list[int], spans: Any) -> float:
    """Sum of -log p of the supervised tokens, by transformers and PEFT alone, in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logits[i - 1, ids[i]].item() for start, stop in spans for i in range(start, stop))


def test_loss_and_choices_are_the_models_own(tmp_path: Path, tiny: Path, app: Endpoint, adapters: list[str]) -> None:
    from trainers.chat import Chat

    chat = Chat.load(tiny)
    rows = [
        {"prompt": prompt, "completion": "fox", "options": ["fox", "lazy dog", "quick brown"], "kind": str(i)}
        for i, prompt in enumerate(("the quick brown", "jumps over the", "lazy dog"))
    ]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = EvalTask(path=str(tmp_path / "choice.jsonl"), metric="choice", choices="options")
    base, tuned = Model("tiny", chat=chat), Model("tuned", adapters[0], chat=chat)
    record = evaluate(RunDir(tmp_path / "run"), [asked], app, base, tuned, slice_by="kind")

    def example(row: dict[str, Any], answer: str) -> Any:
        return chat.example([{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}], "last_assistant")

    assert record.loss is not None and record.loss.source == "references of the tasks"
    for name, adapter in (("base", None), ("tuned", adapters[0])):
        examples = [example(row, "fox") for row in rows]
        sums = [nll(tiny, adapter, made.ids.tolist(), made.spans) for made in examples]
        count = sum(stop - start for made in examples for start, stop in made.spans)
        assert record.loss.tokens[name] == count
        assert getattr(record.loss, name) == pytest.approx(sum(sums) / count, rel=0.02)  # the app computes in bf16
        likeliest = [
            min(
                row["options"],
                key=lambda option, row=row, adapter=adapter: nll(tiny, adapter, (m := example(row, option)).ids.tolist(), m.spans),
            )
            for row in rows
        ]
        right = sum(option == "fox" for option in likeliest) / len(rows)
        assert getattr(record.tasks[0], name)["choice"] == pytest.approx(right)
    assert record.loss.base != record.loss.tuned
    low, high = record.loss.difference or (0.0, 0.0)
    assert low <= record.loss.tuned - record.loss.base <= high
    assert set(record.loss.slices) == {"0", "1", "2"}


def test_the_loss_of_a_jobs_validation_split(tmp_path: Path, tiny: Path, app: Endpoint) -> None:
    from trainers.chat import Chat

    chat = Chat.load(tiny)
    made = chat.example([{"role": "user", "content": "the lazy"}, {"role": "assistant", "content": "dog"}])
    kept = HeldOut("a:1", made.ids.tolist(), made.spans, "x")
    model = Model("tiny")  # no chat: the examples are tokens already
    record = evaluate(RunDir(tmp_path / "run"), [], app, model, model, validation=[kept, kept])
    assert record.loss is not None and record.loss.source == "validation split" and record.loss.examples == 2
    assert record.loss.base == record.loss.tuned and math.isfinite(record.loss.base)


def test_a_loss_that_cannot_be_measured_is_told_and_the_rest_stands(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    run = RunDir(tmp_path / "run", writer="driver")  # this peer has no /v1/completions
    kept = HeldOut("a:1", [1, 2, 3], ((1, 3),))
    record = evaluate(run, [task(tmp_path, ["2"])], peer[1], BASE, TUNED, validation=[kept])
    assert record.loss is None and record.tasks[0].tuned["json_match"] == 1.0
    [warning] = record.warnings
    assert "could not be measured: HTTP 404" in warning
    assert [event.message for _, segment in run.events() for event in segment] == [warning]


def test_slices_by_what_no_case_has_are_told(tmp_path: Path, peer: tuple[Peer, Endpoint]) -> None:
    record = evaluate(RunDir(tmp_path / "run", writer="driver"), [task(tmp_path, ["2"])], peer[1], BASE, TUNED, "nope")
    assert record.warnings == ["No case of the tasks has `nope`: there are no slices."] and not record.tasks[0].slices
    written = RunDir(tmp_path / "run").read("evaluation.json", EvaluationRecord)
    assert written is not None and written.warnings == record.warnings
