"""The wire, spoken by the unmodified openai client: shapes, lists, refusals, and walls between projects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import FileObject, Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from servicekit import BASE, Service, rows, service_on
from tokenizers import Tokenizer

from service.runner import attempt_log
from service.store import key_name
from trainers.records import RunDir, SampleRecord, rank_log
from trainers.spec import Lora

JOBS = "/fine_tuning/jobs"


def upload(client: OpenAI, content: bytes = rows(), name: str = "train.jsonl", **more: Any) -> str:
    return client.files.create(file=(name, content), purpose="fine-tune", **more).id


def create(client: OpenAI, **more: Any) -> FineTuningJob:
    body: dict[str, Any] = {"model": BASE, "training_file": "", **more}
    body["training_file"] = body["training_file"] or upload(client)
    return client.fine_tuning.jobs.create(**body)


def raw(service: Service) -> httpx.Client:
    return httpx.Client(base_url=service.base_url, headers={"authorization": f"Bearer {service.key()}"}, timeout=120)


# -- files -----------------------------------------------------------------------------------------------------------


def test_files_round_trip(own_service: Service) -> None:
    client = own_service.client()
    content = b'{"messages": []}\n' * 3
    made = client.files.create(file=("my data.jsonl", content), purpose="fine-tune")
    assert (made.bytes, made.filename, made.status, made.purpose) == (len(content), "my data.jsonl", "processed", "fine-tune")
    assert client.files.wait_for_processing(made.id) == client.files.retrieve(made.id) == made
    assert FileObject.model_validate(made.to_dict(), strict=True)
    assert client.files.content(made.id).read() == content
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert not [p for p in own_service.settings.files.rglob("*") if p.is_file()]


def test_files_list_pages_and_filters(service: Service) -> None:
    client = service.client()
    ids = [upload(client, name=f"{n}.jsonl") for n in range(5)]
    client.files.create(file=("notes.txt", b"x"), purpose="user_data")
    assert [f.id for f in client.files.list(purpose="fine-tune", limit=2)] == ids[::-1]  # the client follows the pages
    assert [f.id for f in client.files.list(purpose="fine-tune", order="asc")] == ids
    page = client.files.list(purpose="fine-tune", limit=2)
    assert page.has_more and page.to_dict()["first_id"] == ids[-1] and page.to_dict()["last_id"] == ids[-2]
    assert len(client.files.list().data) == 6


def test_a_file_expires(own_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    client = own_service.client()
    made = client.files.create(file=("a.jsonl", rows()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at is not None and abs(made.expires_at - made.created_at - 3600) <= 1
    now = __import__("time").time()
    monkeypatch.setattr("service.store.time.time", lambda: now + 3601)
    assert client.files.list().data == []
    assert [f.id for f in own_service.store.expired_files()] == [made.id]


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "..\\..\\evil.jsonl", "a/b/c.jsonl", "x" * 300 + ".jsonl", ".", "naïve ☕.jsonl", "a.js onl", "nul\x01.jsonl"],
)
def test_a_files_name_never_reaches_the_disk(own_service: Service, name: str) -> None:
    upload(own_service.client(), name=name)
    [stored] = [p for p in own_service.settings.home.rglob("content*") if p.is_file()]
    assert stored.parent.parent == own_service.settings.files


@pytest.mark.parametrize("id", ["..", "%2e%2e", "..%2f..%2fkey", "/etc/passwd", "file-x%00", "' OR 1=1 --", "a" * 2000])
@pytest.mark.parametrize(
    "route", ["/files/{}", "/files/{}/content", "/fine_tuning/jobs/{}", "/fine_tuning/jobs/{}/events", "/tuneyard/jobs/{}/logs"]
)
def test_ids_are_no_paths(service: Service, route: str, id: str) -> None:
    with raw(service) as http:
        answer = http.get(service.base_url + route.format(id))
    assert answer.status_code in (404, 405, 307)
    if answer.status_code != 307:
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_an_upload_has_a_size_limit(tmp_path: Any) -> None:
    with service_on(tmp_path, max_file_bytes=1000, max_body_bytes=5000) as service:
        client = service.client()
        assert upload(client, b"x" * 1000)
        with pytest.raises(openai.APIStatusError) as caught:
            upload(client, b"x" * 1001)
        assert caught.value.status_code == 413 and caught.value.code == "request_too_large"
        with pytest.raises(openai.APIStatusError) as caught:  # far beyond: refused while it comes in
            upload(client, b"x" * 3_000_000)
        assert caught.value.status_code == 413
        with raw(service) as http:
            assert http.post(JOBS, content=(b" " * 1000 for _ in range(6))).status_code == 413


# -- jobs ------------------------------------------------------------------------------------------------------------


def test_a_new_job_in_full(service: Service) -> None:
    client = service.client("acme")
    file, held_out = upload(client), upload(client)
    job = create(client, training_file=file, validation_file=held_out, suffix="tasks", seed=7, metadata={"team": "a"})
    assert FineTuningJob.model_validate(job.to_dict(), strict=True)
    assert job.to_dict() | {"id": "", "created_at": 0, "organization_id": ""} == {
        "id": "",
        "object": "fine_tuning.job",
        "created_at": 0,
        "estimated_finish": None,
        "finished_at": None,
        "model": BASE,
        "fine_tuned_model": None,
        "organization_id": "",
        "status": "validating_files",
        "error": None,
        "hyperparameters": {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 1.0},
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 16, "learning_rate_multiplier": 1.0}},
        },
        "training_file": file,
        "validation_file": held_out,
        "result_files": [],
        "seed": 7,
        "trained_tokens": None,
        "metadata": {"team": "a"},
        "integrations": None,
        "queue_reason": None,
    }
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    stored = service.store.job(job.organization_id, job.id)
    assert stored and stored.model_name == f"ft:{BASE}:acme:tasks:{job.id.removeprefix('ftjob-')}"
    [validation] = stored.spec["data"]["validation"]
    assert (validation["path"], validation["name"]) == (held_out, "train.jsonl")
    assert stored.request["requested_by"] == f"project acme, {key_name(client.api_key)}" and client.api_key not in str(stored.request)


@pytest.mark.parametrize("place", ["hyperparameters", "method"])
def test_hyperparameters_at_both_places(service: Service, place: str) -> None:
    given: dict[str, Any] = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    method = {"type": "supervised", "supervised": {"hyperparameters": given}}
    job = create(service.client(), **{place: given if place == "hyperparameters" else method})
    assert job.hyperparameters.to_dict() == {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 0.5}


def test_hyperparameters_of_other_services_and_our_own_section(service: Service) -> None:
    client = service.client()
    job = create(
        client, hyperparameters={"lora_r": 4, "lora_alpha": 8}, extra_body={"job": {"optim": {"batch_size": 8}, "scale": {"workers": 2}}}
    )
    stored = service.store.job(job.organization_id, job.id)
    assert stored and stored.spec["method"] == Lora(r=4, alpha=8.0).model_dump()
    assert job.hyperparameters.batch_size == 8 and stored.spec["scale"]["workers"] == 2


def test_an_alias_is_echoed_and_the_real_base_is_named(service: Service) -> None:
    job = create(service.client("acme"), model="gpt-4o-mini-2024-07-18")
    assert job.model == "gpt-4o-mini-2024-07-18"
    stored = service.store.job(job.organization_id, job.id)
    assert stored and stored.model_name.startswith(f"ft:{BASE}:acme::")


REFUSED = [
    ("unknown model", {"model": "gpt-5"}, "model", "no base model `gpt-5`"),
    ("near model", {"model": "smollm2-135m-instrukt"}, "model", "Did you mean `smollm2-135m-instruct`?"),
    ("unknown file", {"training_file": "file-nope"}, "training_file", "no file `file-nope`"),
    ("a path for a file", {"training_file": "/etc/passwd"}, "training_file", "no file `/etc/passwd`"),
    ("unknown validation file", {"validation_file": "file-nope"}, "validation_file", "no file"),
    ("dpo", {"method": {"type": "dpo", "dpo": {}}}, "method", "Only `supervised`"),
    ("reinforcement", {"method": {"type": "reinforcement"}}, "method", "Only `supervised`"),
    ("epochs", {"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", "less than or equal to 50"),
    ("epochs as a word", {"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "auto"),
    ("unknown hyperparameter", {"hyperparameters": {"lora_rank": 4}}, "hyperparameters.lora_rank", "lora_r"),
    ("seed", {"seed": -1}, "seed", "0"),
    ("suffix", {"suffix": "no spaces"}, "suffix", "letters"),
    ("long suffix", {"suffix": "x" * 65}, "suffix", "64"),
    ("metadata value", {"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
    ("too much metadata", {"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
    ("typo in the spec", {"extra_body": {"job": {"optim": {"epoch": 2}}}}, "job.optim.epoch", "Did you mean `epochs`?"),
    ("value in the spec", {"extra_body": {"job": {"method": {"r": 0}}}}, "job.method", "r"),
    ("spec is no object", {"extra_body": {"job": 3}}, "job", "dictionary"),
    ("section is no object", {"seed": 1, "extra_body": {"job": {"optim": 3}}}, "job.optim", "section"),
    ("longer than the context", {"extra_body": {"job": {"model": {"max_length": 9000}}}}, "job.model.max_length", "8192"),
    ("said twice", {"seed": 1, "extra_body": {"job": {"optim": {"seed": 2}}}}, "seed", "one place"),
    ("two bases", {"extra_body": {"job": {"model": {"base": "other"}}}}, "model", "one place"),
    ("a local path", {"extra_body": {"job": {"evaluate": {"tasks": [{"path": "/etc/passwd"}]}}}}, "job", "not a file of this project"),
    ("a URL", {"extra_body": {"job": {"data": {"validation": [{"path": "s3://b/k"}]}}}}, "job", "not a file of this project"),
    ("other data", {"extra_body": {"job": {"data": {"train": [{"path": "file-x"}]}}}}, "job.data.train", "training file"),
]


@pytest.mark.parametrize(("body", "param", "told"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_at_create(service: Service, body: dict[str, Any], param: str, told: str) -> None:
    client = service.client()
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **body)
    assert (caught.value.param or "").startswith(param) and told in caught.value.message
    assert caught.value.type == "invalid_request_error" and caught.value.request_id
    assert client.fine_tuning.jobs.list().data == []


def test_list_pages_and_filters_by_metadata(service: Service) -> None:
    client = service.client()
    file = upload(client)
    ids = [create(client, training_file=file, metadata={"n": str(n % 2), 'odd "key"': "x"}).id for n in range(4)]
    bare = create(client, training_file=file).id
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == [bare, *ids[::-1]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"}, limit=1)] == [ids[3], ids[1]]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={'odd "key"': "x"})] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [bare]


def test_events_are_newest_first_and_page(service: Service) -> None:
    client = service.client()
    job = create(client)
    for n in range(4):
        service.store.add_event(job.id, f"event {n}", data={"n": n})
    assert client.fine_tuning.jobs.list_events(job.id, limit=1).data[0].message == "event 3"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [e.message for e in events] == ["event 3", "event 2", "event 1", "event 0", f"Created fine-tuning job: {job.id}"]
    assert all(FineTuningJobEvent.model_validate(e.to_dict(), strict=True) for e in events)


def test_cancel_once(service: Service) -> None:
    client = service.client(max_retries=2)
    job = client.fine_tuning.jobs.cancel(create(client).id)
    assert job.status == "cancelled" and job.finished_at
    with pytest.raises(openai.BadRequestError, match="already cancelled"):  # not 409, which the client would repeat
        client.fine_tuning.jobs.cancel(job.id)


def test_a_job_that_does_not_run_yet_is_paused_at_once(service: Service) -> None:
    client = service.client()
    job = create(client)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    detail: Any = client.post(f"/tuneyard/jobs/{job.id}/resize", body={"workers": 3}, cast_to=object)
    assert detail["workers"] == 3
    for workers in (0, 1025, "two"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.post(f"/tuneyard/jobs/{job.id}/resize", body={"workers": workers}, cast_to=object)
        assert caught.value.param == "workers"
    client.fine_tuning.jobs.pause(job.id)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    for verb in ("pause", "resume"):
        with pytest.raises(openai.BadRequestError, match=f"already cancelled. There is nothing left to {verb}"):
            getattr(client.fine_tuning.jobs, verb)(job.id)


def test_samples_and_logs_by_rank(own_service: Service, tiny: Path) -> None:
    client = own_service.client()
    job = create(client)
    shutil.copytree(tiny, own_service.settings.models / BASE)
    own_service.store.change(job.id, attempt=2)
    run = RunDir(own_service.settings.runs / job.id, attempt=2, writer="train")
    assert client.get(f"/tuneyard/jobs/{job.id}/samples", cast_to=object) == {"object": "list", "data": []}
    encode = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode
    prompt, yes, no = (encode(text).ids for text in ("<|im_start|>user\nthe fox?<|im_end|>\n", "jumps<|im_end|>", "the the"))
    sample = SampleRecord(step=1, example=7, prompt_ids=prompt, answer_ids=no, reference_ids=yes)
    run.append("samples", [sample])
    run.append("samples", [sample.model_copy(update={"step": 2, "answer_ids": no})])
    run.append("samples", [sample.model_copy(update={"step": 2, "answer_ids": yes})])  # made again after a resume
    found: Any = client.get(f"/tuneyard/jobs/{job.id}/samples", cast_to=object)
    told = {"object": "tuneyard.sample", "example": 7, "prompt": "<|im_start|>user\nthe fox?<|im_end|>\n", "reference": "jumps<|im_end|>"}
    assert found["data"] == [told | {"step": 1, "answer": "the the"}, told | {"step": 2, "answer": "jumps<|im_end|>"}]

    attempt_log(run, 2).parent.mkdir()
    attempt_log(run, 2).write_text("driver\n")
    for rank in range(2):
        rank_log(run, rank).write_text(f"rank {rank} says\n")
    logs: Any = client.get(f"/tuneyard/jobs/{job.id}/logs", cast_to=object)
    assert logs["text"] == "driver\n\n== worker 0 ==\nrank 0 says\n\n== worker 1 ==\nrank 1 says\n" and logs["ranks"] == [0, 1]
    logs = client.get(f"/tuneyard/jobs/{job.id}/logs?rank=1", cast_to=object)
    assert logs["text"] == "rank 1 says\n"
    with pytest.raises(openai.NotFoundError, match="has no worker 2"):
        client.get(f"/tuneyard/jobs/{job.id}/logs?rank=2", cast_to=object)


def test_checkpoints_go_where_the_owner_grants(tmp_path: Path) -> None:
    with service_on(tmp_path, checkpoint_urls="s3://runs/a/") as service:
        client = service.client()
        job = create(client, extra_body={"job": {"checkpoint": {"to": "s3://runs/a/mine"}}})
        assert service.store.open_jobs()[0].id == job.id and service.store.open_jobs()[0].spec["checkpoint"]["to"] == "s3://runs/a/mine"
        for url in ("s3://runs/b", "s3://runs/a/../b", "file:///tmp/x", "/tmp/x"):
            with pytest.raises(openai.BadRequestError, match="TUNEYARD_CHECKPOINT_URLS") as caught:
                create(client, extra_body={"job": {"checkpoint": {"to": url}}})
            assert caught.value.param == "job.checkpoint.to"


def test_a_file_in_use_stays(service: Service) -> None:
    client = service.client()
    job = create(client)
    with pytest.raises(openai.BadRequestError, match="in use"):
        client.files.delete(job.training_file)
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(job.training_file).deleted


def test_idempotency_key(service: Service) -> None:
    client = service.client()
    file, headers = upload(client), {"Idempotency-Key": "once"}
    first = create(client, training_file=file, extra_headers=headers)
    assert create(client, training_file=file, extra_headers=headers) == first
    assert create(client, training_file=file).id != first.id
    with pytest.raises(openai.BadRequestError, match="another body"):
        create(client, training_file=file, seed=3, extra_headers=headers)
    assert len(client.fine_tuning.jobs.list().data) == 2


def test_integrations_are_accepted_with_a_warning(service: Service) -> None:
    client = service.client()
    job = create(client, integrations=[{"type": "wandb", "wandb": {"project": "p"}}])
    assert client.fine_tuning.jobs.list_events(job.id).data[0].level == "warn"


# -- walls -----------------------------------------------------------------------------------------------------------


def test_projects_do_not_see_each_other(service: Service) -> None:
    ours, theirs = service.client(), service.client()
    job = create(ours)
    service.store.move(job.id, "queued", "")
    service.store.move(job.id, "running", "")
    service.store.move(job.id, "succeeded", "")
    name = ours.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert name and name in {m.id for m in ours.models.list()}
    for ask in (
        lambda: theirs.files.retrieve(job.training_file),
        lambda: theirs.files.content(job.training_file),
        lambda: theirs.files.delete(job.training_file),
        lambda: theirs.fine_tuning.jobs.retrieve(job.id),
        lambda: theirs.fine_tuning.jobs.cancel(job.id),
        lambda: theirs.fine_tuning.jobs.pause(job.id),
        lambda: theirs.fine_tuning.jobs.resume(job.id),
        lambda: theirs.post(f"/tuneyard/jobs/{job.id}/resize", body={"workers": 2}, cast_to=object),
        lambda: theirs.get(f"/tuneyard/jobs/{job.id}/samples", cast_to=object),
        lambda: theirs.fine_tuning.jobs.list_events(job.id),
        lambda: theirs.fine_tuning.jobs.checkpoints.list(job.id),
        lambda: theirs.models.retrieve(name),
        lambda: theirs.models.delete(name),
        lambda: theirs.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}]),
        lambda: theirs.get(f"/tuneyard/jobs/{job.id}", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    with pytest.raises(openai.BadRequestError, match="no file"):
        create(theirs, training_file=job.training_file)
    with pytest.raises(openai.BadRequestError, match="not a file of this project"):
        create(theirs, extra_body={"job": {"data": {"validation": [{"path": job.training_file}]}}})
    assert theirs.files.list().data == [] or all(f.id != job.training_file for f in theirs.files.list())
    assert theirs.fine_tuning.jobs.list().data == [] and name not in {m.id for m in theirs.models.list()}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic abc", "ty-x"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/files"),
        ("POST", "/files"),
        ("GET", JOBS),
        ("POST", JOBS),
        ("GET", "/models"),
        ("POST", "/chat/completions"),
        ("GET", "/tuneyard/status"),
    ],
)
def test_without_a_good_key(service: Service, header: str | None, method: str, path: str) -> None:
    answer = httpx.request(method, service.base_url + path, headers={"authorization": header} if header else {}, timeout=120)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_keys_are_kept_as_hashes(own_service: Service) -> None:
    key = own_service.store.create_key("acme")
    own_service.store.close()
    assert all(key.encode() not in p.read_bytes() for p in own_service.settings.home.glob("tuneyard.db*"))


# -- errors ----------------------------------------------------------------------------------------------------------

BROKEN = [
    ("no such route", "GET", "/nothing", {}, 404),
    ("no such method", "PATCH", "/files", {}, 405),
    ("no JSON", "POST", JOBS, {"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ("no object", "POST", JOBS, {"json": [1]}, 400),
    ("no model", "POST", JOBS, {"json": {"training_file": "x"}}, 400),
    ("not UTF-8", "POST", JOBS, {"content": b"\xff\xfe{", "headers": {"content-type": "application/json"}}, 400),
    ("no multipart", "POST", "/files", {"json": {"purpose": "fine-tune"}}, 400),
    ("broken multipart", "POST", "/files", {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
    ("no boundary", "POST", "/files", {"content": b"abc", "headers": {"content-type": "multipart/form-data"}}, 400),
    ("no file", "POST", "/files", {"data": {"purpose": "fine-tune"}, "files": {"other": b"x"}}, 400),
    ("file as text", "POST", "/files", {"data": {"purpose": "fine-tune", "file": "text"}, "files": {"other": b"x"}}, 400),
    ("no such purpose", "POST", "/files", {"data": {"purpose": "fun"}, "files": {"file": b"x"}}, 400),
    ("expires too soon", "POST", "/files", {"data": {"purpose": "batch", "expires_after[seconds]": "1"}, "files": {"file": b"x"}}, 400),
    ("limit", "GET", "/files?limit=0", {}, 400),
    ("limit as a word", "GET", f"{JOBS}?limit=many", {}, 400),
    ("unknown cursor", "GET", f"{JOBS}?after=ftjob-x", {}, 400),
    ("chat without JSON", "POST", "/chat/completions", {"content": b"{"}, 400),
    ("chat without model", "POST", "/chat/completions", {"json": {"messages": []}}, 400),
    ("chat with an odd model", "POST", "/chat/completions", {"json": {"model": ["x"]}}, 400),
    ("chat with an unknown model", "POST", "/chat/completions", {"json": {"model": "nope"}}, 404),
]


@pytest.mark.parametrize(("method", "path", "how", "status"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_every_error_has_one_shape(service: Service, method: str, path: str, how: dict[str, Any], status: int) -> None:
    with raw(service) as http:
        answer = http.request(method, path, **how)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"].startswith("req_")
    assert "Traceback" not in answer.text


def test_a_bug_shows_no_trace(own_service: Service, caplog: pytest.LogCaptureFixture) -> None:
    own_service.settings.serve_token_file.unlink()  # something that never happens
    with pytest.raises(openai.InternalServerError) as caught:
        own_service.client().chat.completions.create(model=BASE, messages=[])
    assert "Traceback" not in caught.value.response.text and str(caught.value.request_id) in caught.value.message
    assert "FileNotFoundError" in caplog.text


# -- models ----------------------------------------------------------------------------------------------------------


def test_models_and_their_aliases(service: Service) -> None:
    client = service.client()
    found = {m.id: m.to_dict() for m in client.models.list()}
    assert "alias_of" not in found[BASE] and found["gpt-4o-mini"]["alias_of"] == BASE
    assert client.models.retrieve(BASE).owned_by == "tuneyard"
    assert {m["shutdown_date"] for m in found.values()} == {None}
    assert found["gpt-4o-mini"]["tuneyard"] == {"kind": "alias", "on_this_machine": False, "alias_of": BASE}
    folder = service.settings.models / BASE
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    here: Any = client.models.retrieve(BASE).to_dict()
    shutil.rmtree(folder)
    assert here["tuneyard"] == {"kind": "base", "on_this_machine": True}
    assert Model.model_validate(found[BASE], strict=True)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("ft:org/base:x::y")  # arrives with a slash in it
    assert "ft:org/base:x::y" in caught.value.message and caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="base model"):
        client.models.delete(BASE)


def test_status_says_that_the_cluster_is_away(service: Service) -> None:
    status: Any = service.client().get("/tuneyard/status", cast_to=object)
    assert status["cluster"]["answers"] is False and "does not answer" in status["cluster"]["message"]
    assert json.dumps(status).count("token") == 0


def test_urls_are_read_where_they_are_granted_and_nowhere_else(tmp_path: Path) -> None:
    with service_on(tmp_path, data_urls="s3://team/sft/, hf://") as service:
        client = service.client()
        job = create(
            client, training_file="s3://team/sft/rows.parquet", extra_body={"job": {"data": {"validation": [{"path": "hf://org/set"}]}}}
        )
        assert job.training_file == "s3://team/sft/rows.parquet"
        row = service.store.open_jobs()[0]
        assert [row.spec["data"]["train"][0]["path"], row.spec["data"]["validation"][0]["path"]] == [
            "s3://team/sft/rows.parquet",
            "hf://org/set",
        ]
        for url in ("s3://team/other.jsonl", "s3://team/sft/../secret.jsonl", "file:///etc/passwd", "s3://team"):
            with pytest.raises(openai.APIStatusError, match="There is no file"):
                create(client, training_file=url)


def test_what_is_no_url_cannot_be_granted(tmp_path: Path) -> None:
    with service_on(tmp_path, data_urls="/, ,file-") as service, pytest.raises(openai.APIStatusError, match="There is no file"):
        create(service.client(), training_file="/etc/passwd")
