"""The gateway: what it asks of the serving app, how it streams, waits and gives up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from servicekit import BASE, Service, service_on, serving, wait_for
from upstream import Upstream

from cluster.local import free_ports
from cluster.ray_rest import RayRest
from service.link import Link
from service.store import Checkpoint, new_id
from trainers.records import ModelRecord, RunDir

HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture
def service(tmp_path: Path, upstream: Upstream) -> Iterator[Service]:
    with serving(upstream.app()) as port, service_on(tmp_path, Link(RayRest("http://127.0.0.1:9"), "127.0.0.1", port)) as service:
        yield service


@pytest.fixture
def client(service: Service) -> OpenAI:
    return service.client("acme")


def succeeded(service: Service, client: OpenAI, method: dict[str, Any] | None = None, **record: Any) -> tuple[str, Path]:
    """A tuned model's name, and its adapter's folder."""
    file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"job": {"method": method or {"type": "lora"}}})
    for status in ("queued", "running", "succeeded"):
        service.store.move(job.id, status, "")
    run = RunDir(service.settings.runs / job.id, 1, "driver")
    run.write("model.json", ModelRecord(**{"base": BASE, "adapter": "adapters/step-000003", "merged": None, "step": 3, **record}))
    return str(client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model), run.path("adapters", "step-000003")


@pytest.mark.parametrize("name", [BASE, "gpt-4o-mini"])
def test_a_base_answers(service: Service, client: OpenAI, upstream: Upstream, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=HI, temperature=0.5)
    assert answer.choices[0].message.content == "hello" and answer.model == name
    headers, body = upstream.asked[0]
    assert headers["authorization"] == "Bearer " + service.settings.serve_token_file.read_text()
    assert (headers["x-tuneyard-model"], headers["x-tuneyard-adapter"]) == (name, "")
    assert body == {"model": name, "messages": HI, "temperature": 0.5}
    assert [row.app for row in service.store.demand()] == [BASE]


def test_a_tuned_model_answers_with_its_adapter(service: Service, client: OpenAI, upstream: Upstream) -> None:
    name, adapter = succeeded(service, client)
    client.chat.completions.create(model=name, messages=HI)
    assert (upstream.asked[0][0]["x-tuneyard-model"], upstream.asked[0][0]["x-tuneyard-adapter"]) == (name, str(adapter))
    for wrong in (f"{name}x", f"{name}:ckpt-step-9", f"{name}:ckpt-step-3/../../x"):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=wrong, messages=HI)
    client.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=HI)


def test_a_whole_tuned_model_answers_through_an_app_of_its_own(service: Service, client: OpenAI, upstream: Upstream) -> None:
    name, _ = succeeded(service, client, {"type": "full"}, adapter=None, merged="model", served="merged")
    job_id = client.fine_tuning.jobs.list().data[0].id
    assert client.chat.completions.create(model=name, messages=HI).model == name
    assert upstream.apps == [job_id] and upstream.asked[0][0]["x-tuneyard-adapter"] == ""
    assert [row.app for row in service.store.demand()] == [job_id]
    wire: Any = client.models.retrieve(name)
    assert (wire.id, wire.base, wire.job_id) == (name, BASE, job_id)
    with pytest.raises(openai.NotFoundError):
        service.client("other").chat.completions.create(model=name, messages=HI)
    client.models.delete(name)
    assert service.store.demand() == []
    unmerged, _ = succeeded(service, client, {"type": "full"}, adapter=None, served="merged")
    with pytest.raises(openai.NotFoundError, match="wrote none"):
        client.chat.completions.create(model=unmerged, messages=HI)


def test_deleting_a_model_removes_checkpoints_wherever_they_lie(tmp_path: Path, service: Service, client: OpenAI) -> None:
    name, _ = succeeded(service, client)
    job = service.store.tuned()[0]
    bucket = tmp_path / "bucket"
    service.store.change(job.id, spec={**job.spec, "checkpoint": {"to": f"file://{bucket}"}})
    for run in (job.id, "ftjob-another"):
        folder = bucket / run / "step-000003-a1"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("{}")
    exported = service.settings.runs / job.id / "exports" / "x.gguf"
    exported.parent.mkdir()
    exported.write_bytes(b"?")
    client.models.delete(name)
    assert [p.parent.name for p in bucket.glob("*/step-*")] == ["ftjob-another"] and not exported.exists()


def test_an_unloaded_model_that_is_asked_goes_to_the_front(service: Service, client: OpenAI, upstream: Upstream) -> None:
    service.store.ask_for(BASE)
    [before] = service.store.demand()
    client.chat.completions.create(model=BASE, messages=HI)
    assert service.store.demand()[0].asked_at == before.asked_at  # noted a moment ago
    upstream.answer = "starting"
    client.chat.completions.create(model=BASE, messages=HI)
    assert service.store.demand()[0].asked_at > before.asked_at and service.link.changed.is_set()


@pytest.mark.parametrize(
    ("method", "config", "why"),
    [
        ({"type": "lora"}, {"use_dora": False}, None),
        ({"type": "qlora"}, {}, "four bits"),
        ({"type": "lora", "dora": True}, {"use_dora": True}, "use_dora: True"),
        ({"type": "lora", "modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"type": "lora"}, None, "its adapter is gone"),
        ({"type": "full"}, None, "every weight was trained"),
    ],
)
def test_only_checkpoints_that_can_be_called_are_listed(
    service: Service, client: OpenAI, upstream: Upstream, method: dict[str, Any], config: dict[str, Any] | None, why: str | None
) -> None:
    name, adapter = succeeded(service, client, method, merged="model")
    job_id = client.fine_tuning.jobs.list().data[0].id
    service.store.add_checkpoint(
        Checkpoint(id=new_id("ftckpt_"), job_id=job_id, step=3, created_at=0.0, metrics={"step": 3}, manifest_sha256="")
    )
    if config is not None:
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    checkpoint = f"{name}:ckpt-step-3"
    listed: Any = client.fine_tuning.jobs.checkpoints.list(job_id).data
    if why:
        assert listed == []
        with pytest.raises(openai.NotFoundError, match=why):
            client.chat.completions.create(model=checkpoint, messages=HI)
    else:
        assert [c.fine_tuned_model_checkpoint for c in listed] == [checkpoint]
        wire: Any = client.models.retrieve(checkpoint)
        assert (wire.id, wire.tuneyard["kind"], wire.tuneyard["base"]) == (checkpoint, "checkpoint", BASE)
        client.chat.completions.create(model=checkpoint, messages=HI)
        assert upstream.apps == [BASE] and upstream.asked[0][0]["x-tuneyard-adapter"] == str(adapter)


def test_a_stream_comes_piece_by_piece(client: OpenAI, upstream: Upstream) -> None:
    upstream.seen, text = threading.Semaphore(1), ""
    for chunk in client.chat.completions.create(model=BASE, messages=HI, stream=True):
        text += chunk.choices[0].delta.content or ""
        upstream.seen.release()  # only now comes the next
    assert text == "0 1 2 "


@pytest.mark.parametrize("how", ["endless", "think"])
def test_who_leaves_frees_the_model(service: Service, upstream: Upstream, how: str) -> None:
    upstream.answer = how
    if how == "endless":
        stream = service.client("acme").chat.completions.create(model=BASE, messages=HI, stream=True)
        next(iter(stream))
        stream.close()
    else:

        async def leave() -> None:
            async with openai.AsyncOpenAI(base_url=service.base_url, api_key=service.key("acme"), max_retries=0) as client:
                asking = asyncio.create_task(client.chat.completions.create(model=BASE, messages=HI))
                await asyncio.to_thread(wait_for, lambda: upstream.asked)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking

        asyncio.run(leave())
    wait_for(upstream.closed.is_set)


@pytest.mark.parametrize("how", ["die", "stop"])
def test_a_model_that_is_lost_in_the_middle_ends_the_stream_with_an_error(client: OpenAI, upstream: Upstream, how: str) -> None:
    upstream.answer = how
    text = ""
    with pytest.raises(openai.APIError, match="lost while it answered") as caught:
        for chunk in client.chat.completions.create(model=BASE, messages=HI, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "0 " and caught.value.code == "unavailable"
    upstream.answer = ""
    assert client.chat.completions.create(model=BASE, messages=HI).choices[0].message.content == "hello"


def test_text_completions(client: OpenAI, upstream: Upstream) -> None:
    answer = client.completions.create(model=BASE, prompt=[[1, 2], [3]], echo=True, logprobs=1)
    assert answer.choices[0].text == " there"
    assert upstream.asked[0][1] == {"model": BASE, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1}


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"model": "x", "temperature": NaN}', b'{"model": 3}', b"\xff"])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_bodies_that_are_no_request(service: Service, raw: bytes, path: str) -> None:
    key = {"authorization": f"Bearer {service.key('acme')}"}
    answer = httpx.post(f"{service.base_url}/{path}", content=raw, headers=key)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_the_apps_refusal_is_passed_on(client: OpenAI, upstream: Upstream) -> None:
    upstream.answer = "refuse"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=BASE, messages=HI)
    assert caught.value.param == "stop" and caught.value.request_id


def test_a_model_that_is_being_loaded_is_waited_for(client: OpenAI, upstream: Upstream) -> None:
    upstream.answer = "starting"
    assert client.chat.completions.create(model=BASE, messages=HI).choices[0].message.content == "hello"
    assert len(upstream.asked) == 2


def test_an_app_that_breaks_is_asked_once(client: OpenAI, upstream: Upstream) -> None:
    upstream.answer = "break"
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model=BASE, messages=HI)
    assert caught.value.code == "serving_failed" and len(upstream.asked) == 1


def test_a_model_that_never_comes(service: Service, client: OpenAI) -> None:
    service.link.serve_port = free_ports(1)[0]
    began = time.monotonic()
    with httpx.Client(headers={"authorization": f"Bearer {service.key('acme')}"}, timeout=120) as http:
        answer = http.post(f"{service.base_url}/chat/completions", json={"model": BASE, "messages": HI})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["code"] == "unavailable" and 0.9 < time.monotonic() - began < 5
    service.store.note_app(BASE, "DEPLOY_FAILED", "out of memory")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        client.chat.completions.create(model=BASE, messages=HI)
