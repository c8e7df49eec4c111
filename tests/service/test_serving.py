"""Whole tuned models on real Ray Serve: deployed for their job, loaded when asked, unloaded for others and when deleted."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from servicekit import BASE, Service, service_on, wait_for

from cluster import local
from service import fleet
from service.launch import deploy_stage, evaluate_stage
from service.link import Link
from service.order import LaunchOrder
from service.serving import DEMAND_S, Serving, answers_alone, num_bytes
from trainers.records import TEMPLATE_FILE, DeployRecord, EvaluationRecord, ModelRecord, RunDir
from trainers.spec import JobSpec

ASK: Any = {"messages": [{"role": "user", "content": "the quick brown fox"}], "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.LocalHead]:
    home = tmp_path_factory.mktemp("ray")
    head = local.start(home, num_cpus=1, path=str(Path(__file__).parents[2]))
    yield head
    local.stop(home)


@pytest.fixture
def service(tmp_path: Path, head: local.LocalHead, tiny: Path) -> Iterator[Service]:
    shutil.copytree(tiny, tmp_path / "models" / BASE)
    bound = num_bytes(tiny) * 3 // 2  # room for one of them
    with (
        head.client() as ray,
        service_on(tmp_path, Link(ray, "127.0.0.1", head.serve_port), chat_wait_s=90.0, max_model_bytes=bound) as service,
    ):
        yield service


@pytest.fixture
def client(service: Service) -> OpenAI:
    return service.client("acme", timeout=120)


@pytest.fixture
def serving(service: Service) -> Serving:
    return Serving(service.settings, service.store, service.link)


def tuned(service: Service, client: OpenAI, seed: int, spec: dict[str, Any], *, succeeded: bool = True) -> tuple[str, RunDir]:
    """A job with a whole tuned model (random weights of this seed), as its merge stage leaves it: (model name, run directory)."""
    file = client.files.create(file=("a.jsonl", b"{}\n"), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"job": {"method": {"type": "full"}, **spec}})
    for status in ("queued", "running", "succeeded")[: 3 if succeeded else 2]:
        service.store.move(job.id, status, "")
    run = RunDir(service.settings.runs / job.id, 1, "driver")
    shutil.copytree(service.settings.models / BASE, run.path("model"))
    change_weights(run.path("model", "model.safetensors"), seed)
    shutil.copyfile(run.path("model", TEMPLATE_FILE), run.path(TEMPLATE_FILE))
    run.write("model.json", ModelRecord(base=BASE, adapter=None, merged="model", served="merged", step=3))
    row = service.store.job(job.organization_id, job.id)
    assert row is not None
    return row.model_name, run


def change_weights(file: Path, seed: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    save_file({name: tensor * (1 + torch.randn(tensor.shape)) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def until(serving: Serving, condition: Callable[[], Any]) -> Any:
    def look() -> Any:
        serving.step()
        return condition()

    return wait_for(look)


def running(service: Service) -> set[str]:
    return {name for name, app in service.link.ray.applications().items() if app["status"] == "RUNNING"}


def replicas(service: Service, app: str) -> list[str]:
    return [replica["replica_id"] for replica in service.link.ray.applications()[app]["deployments"]["engine"]["replicas"]]


def says(folder: Path) -> str:
    """What the model in this folder says, by transformers' own generation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainers.chat import Chat

    ids = torch.tensor([Chat.load(folder).prompt(ASK["messages"])])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    made = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    return AutoTokenizer.from_pretrained(folder).decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_stages_after_merging_go_through_the_models_own_app(service: Service, client: OpenAI, serving: Serving, tmp_path: Path) -> None:
    task = tmp_path / "held-out.jsonl"
    task.write_text('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n')
    held_out = client.files.create(file=("held-out.jsonl", task.read_bytes()), purpose="fine-tune").id
    evaluate = {"evaluate": {"tasks": [{"path": held_out, "max_tokens": 4}]}}
    name, run = tuned(service, client, 1, evaluate, succeeded=False)
    job_id = run.root.name
    until(serving, lambda: running(service) == {BASE, job_id})

    order = LaunchOrder(
        job_id=job_id,
        model_name=name,
        models=str(service.settings.models),
        stores="",
        serve_url=service.link.serve_url(BASE),
        model_url=service.link.serve_url(job_id),
        serve_token_file=str(service.settings.serve_token_file),
    )
    model = run.read("model.json", ModelRecord)
    assert model is not None
    deploy_stage(order, service.settings.models / BASE, model, run)
    assert run.read("deploy.json", DeployRecord).model == name  # type: ignore[union-attr]
    spec = JobSpec.parse({"data": {"train": [{"path": "unread"}]}, "evaluate": {"tasks": [{"path": str(task), "max_tokens": 8}]}})
    evaluate_stage(spec, order, model, run)
    record = run.read("evaluation.json", EvaluationRecord)
    assert record is not None, [event for _, events in run.events() for event in events]
    assert record.tasks[0].failed_requests == {"base": 0, "tuned": 0}
    assert record.tasks[0].samples[0]["base"] != record.tasks[0].samples[0]["tuned"]

    before = replicas(service, job_id)
    service.store.ask_for(job_id)
    service.store.move(job_id, "succeeded", "")
    until(serving, lambda: running(service) == {job_id})  # the base was there for the comparison only
    assert client.chat.completions.create(model=name, **ASK).model == name
    assert replicas(service, job_id) == before


def test_models_are_loaded_when_asked_and_the_least_recently_asked_gives_way(
    service: Service, client: OpenAI, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "HOLD_S", 0.0)
    first, second = tuned(service, client, 1, {}), tuned(service, client, 2, {})
    serving.step()
    assert not running(service)  # nobody asked yet
    with ThreadPoolExecutor(1) as pool:

        def answer(name: str) -> str:
            asked = pool.submit(client.chat.completions.create, model=name, **ASK)
            until(serving, asked.done)
            assert asked.result().model == name
            return str(asked.result().choices[0].message.content)

        assert answer(first[0]) == says(first[1].path("model"))
        assert running(service) == {first[1].root.name}  # and not the base, which nobody needs
        stream = client.chat.completions.create(model=first[0], stream=True, n=4, **{**ASK, "max_tokens": 400})
        chunks = [next(iter(stream))]
        assert answer(second[0]) == says(second[1].path("model"))
        assert running(service) == {second[1].root.name}
        chunks += list(stream)  # who was being answered while the model was unloaded gets all of it
        assert sum(bool(choice.finish_reason) for chunk in chunks for choice in chunk.choices) == 4

    status: Any = client.get("/tuneyard/status", cast_to=object)
    assert {app["model"]: app["status"] for app in status["apps"]} == {first[0]: "", second[0]: "RUNNING"}
    other: Any = service.client("other").get("/tuneyard/status", cast_to=object)
    assert other["apps"] == []

    client.models.delete(second[0])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=second[0], **ASK)
    until(serving, lambda: not running(service))
    assert not second[1].path("model").exists()

    shutil.rmtree(first[1].path("model"))  # by somebody else's hand
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.chat.completions.create, model=first[0], **ASK)
        until(serving, asked.done)
    with pytest.raises(openai.InternalServerError, match="its weights are gone"):
        asked.result()


def test_a_replica_that_is_killed_in_the_middle_of_a_stream(service: Service, client: OpenAI, serving: Serving) -> None:
    service.store.ask_for(BASE)
    until(serving, lambda: running(service) == {BASE})
    [replica] = service.link.ray.applications()[BASE]["deployments"]["engine"]["replicas"]
    chunks = []
    with pytest.raises(openai.APIError, match="lost while it answered"):
        for chunk in client.chat.completions.create(model=BASE, stream=True, n=8, **{**ASK, "max_tokens": 450}):
            chunks.append(chunk)
            if len(chunks) == 10:
                os.kill(replica["pid"], signal.SIGKILL)
    assert len(chunks) >= 10
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.chat.completions.create, model=BASE, **ASK)
        until(serving, asked.done)
        assert asked.result().choices[0].message.content
    service.store.forget_app(BASE)
    until(serving, lambda: not running(service))  # the next test's base goes by the same name, with another token


def test_what_nobody_asks_for_is_unloaded(service: Service, client: OpenAI, serving: Serving) -> None:
    _, run = tuned(service, client, 1, {})
    service.store.ask_for(run.root.name)
    asked = service.store.demand()[0].asked_at
    assert list(serving._wanted(asked + DEMAND_S - 1)) == [run.root.name]
    assert list(serving._wanted(asked + DEMAND_S + 1)) == []
    run.path("model.json").write_text("{")  # damaged: it must not keep others from being served
    assert list(serving._wanted(asked)) == []
    service.store.ask_for(BASE)
    assert list(serving._wanted(asked)) == [BASE]


def test_models_give_way_to_a_job_that_waits_for_gpus_where_training_goes_first(service: Service, client: OpenAI) -> None:
    _, run = tuned(service, client, 1, {"deploy": {"replicas": {"min": 1, "max": 3}}})
    _, other = tuned(service, client, 2, {}, succeeded=False)
    shutil.rmtree(other.path("model"))
    other.path("model.json").unlink()
    whole, now = run.root.name, time.time()
    service.store.ask_for(BASE)
    settings = service.settings.model_copy(update={"serve_gpus": 0.5, "gpu_priority": "train", "serve_labels": "pool=serve, a=b"})
    yields, keeps = Serving(settings, service.store, service.link), Serving(service.settings, service.store, service.link)

    def wanted(serving: Serving, after_s: float) -> set[str]:
        return set(serving._wanted(now + after_s))

    assert wanted(yields, 1) == wanted(yields, 100) == {BASE, whole}  # no job waits
    assert yields._copies(whole) == {"min": 1, "max": 3} and yields._copies(BASE) == {"min": 1, "max": 1}
    assert settings.serving == {"queue": 32, "num_gpus": 0.5, "labels": {"pool": "serve", "a": "b"}}
    other.progress("train", doing="waiting for room: 1 GPU(s) are needed", waits_for="GPU")
    assert wanted(yields, 1) == {BASE, whole} and wanted(yields, 100) == {whole}  # what must always be loaded stays
    assert wanted(keeps, 100) == {BASE, whole}
    other.progress("train", done=0)
    assert wanted(yields, 100) == {BASE, whole}


def test_a_base_that_many_ask_gets_a_copy(service: Service, client: OpenAI) -> None:
    settings = service.settings.model_copy(update={"serve_replicas": 2, "serve_queue": 1})
    serving = Serving(settings, service.store, service.link)
    service.store.ask_for(BASE)
    until(serving, lambda: running(service) == {BASE})
    assert len(replicas(service, BASE)) == 1

    def addresses() -> list[str]:
        serving.step()
        return service.store.ask_for(BASE)

    with ThreadPoolExecutor(12) as pool:
        answers, asked = [], 0
        while len(addresses()) < 2:
            answers = [a for a in answers if not a.done()]
            while len(answers) < 12:
                answers.append(pool.submit(client.chat.completions.create, model=BASE, n=4, **{**ASK, "max_tokens": 400, "seed": asked}))
                asked += 1
            time.sleep(0.1)

    def both_at_once() -> bool:
        """Two streams at a time, each by a copy of its own; on a busy machine one may be over before we look."""
        with ExitStack() as streams:
            for _ in range(2):
                stream = client.chat.completions.create(model=BASE, stream=True, n=8, **{**ASK, "max_tokens": 450})
                next(iter(streams.enter_context(stream)))
            return [httpx.get(f"http://{address}/{BASE}/healthz").json()["open"] for address in addresses()] == [8, 8]

    wait_for(both_at_once)
    service.store.forget_app(BASE)
    until(serving, lambda: not running(service))


def test_a_base_that_is_not_here_is_told_at_once_and_keeps_nothing_from_being_served(
    service: Service, client: OpenAI, serving: Serving
) -> None:
    assert "llama-3.3-70b-instruct" in {model.id for model in client.models.list()}  # a job may train it, which fetches it
    with ThreadPoolExecutor(2) as pool:
        large, small = (pool.submit(client.chat.completions.create, model=name, **ASK) for name in ("llama-3.3-70b-instruct", BASE))
        until(serving, lambda: large.done() and small.done())
    with pytest.raises(openai.InternalServerError, match=r"not on this machine.*python -m trainers\.fetch llama-3\.3"):
        large.result()
    assert small.result().model == BASE and running(service) == {BASE}


@pytest.mark.parametrize(
    ("method", "alone"),
    [
        ({"type": "lora"}, False),
        ({"type": "lora", "dora": True}, True),
        ({"type": "lora", "modules_to_save": ["lm_head"]}, True),
        ({"type": "qlora"}, True),
        ({"type": "full"}, True),
    ],
)
def test_which_models_answer_alone(service: Service, client: OpenAI, serving: Serving, method: dict[str, Any], alone: bool) -> None:
    from trainers.merge import served

    tuned(service, client, 1, {"method": method}, succeeded=False)
    [job] = service.store.open_jobs()
    assert answers_alone(job) == alone == (served(JobSpec.parse(job.spec).method) == "merged")
    assert set(serving._wanted(time.time())) == ({job.id} if alone else {BASE})  # a job's base is not loaded for nothing
    service.store.move(job.id, "succeeded", "")
    assert set(serving._wanted(time.time())) == (set() if alone else {BASE})
