"""/v1/tuneyard/preview: a job's first rows as tokens, in the caller's project only, and no more work than that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from servicekit import BASE, Service, service_on

ROWS = [{"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n} 🎉"}]} for n in range(30)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, smollm: Path) -> Iterator[Service]:
    with service_on(tmp_path_factory.mktemp("home"), models=smollm.parent) as service:
        yield service


def upload(client: OpenAI, content: bytes | None = None, name: str = "train.jsonl") -> str:
    content = "\n".join(map(json.dumps, ROWS)).encode() if content is None else content
    return client.files.create(file=(name, content), purpose="fine-tune").id


def preview(client: OpenAI, **body: Any) -> dict[str, Any]:
    return client.post("/tuneyard/preview", body=body, cast_to=object)  # type: ignore[return-value]


def test_the_same_from_a_file_and_from_a_job(service: Service) -> None:
    client = service.client()
    file = upload(client)
    seen = preview(client, model=BASE, training_file=file)
    assert [example["id"] for example in seen["examples"]] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    first = seen["examples"][0]
    assert first["num_tokens"] == len(first["tokens"]) and first["supervised"] == sum(t["weight"] > 0 for t in first["tokens"])
    assert "".join(t["text"] for t in first["tokens"] if t["weight"]) == "0 🎉<|im_end|>"
    assert [t["text"] for t in first["tokens"] if t["control"]] == ["<|im_start|>", "<|im_end|>"] * 3
    job = {"model": {"base": BASE}, "data": {"train": [{"path": file}]}}
    assert preview(client, job=job) == seen
    assert preview(client, job=job, limit=1, skip=2)["examples"] == seen["examples"][2:]
    assert len(preview(client, job=job, limit=20)["examples"]) == 20


def test_a_refused_row_has_its_error_and_the_others_are_shown(service: Service) -> None:
    client = service.client()
    file = upload(client, b'{"instruction": "a <|im_end|> b", "output": "c"}\n{"instruction": "hi", "output": "ho"}\n')
    bad, good = preview(client, model=BASE, training_file=file)["examples"]
    assert bad["id"] == "train.jsonl:1" and "<|im_end|>" in bad["error"]["message"] and bad["tokens"] == []
    assert good["error"] is None and good["num_tokens"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"limit": 21}, "limit"),
        ({"limit": 0}, "limit"),
        ({"skip": -1}, "skip"),
        ({"skip": 1000}, None),
        ({"model": "gpt-9"}, "model"),
        ({"model": 5}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"training_file": "/etc/passwd"}, "training_file"),
        ({"job": {"data": {"train": [{"path": "/etc/passwd"}]}}}, "job.data.train"),
        ({"job": {"model": {"template": "/etc/passwd"}}}, "job.model.template"),
        ({"job": {"model": {"template": "{{ 1 }}"}}}, "job.model.template"),
        ({"job": {"model": {"template": "mine.jinja"}}}, "job.model.template"),
        ({"job": {"modell": {}}}, "job.modell"),
        ({"job": []}, "job"),
    ],
)
def test_refusals_name_the_field(service: Service, body: dict[str, Any], param: str | None) -> None:
    client = service.client()
    with pytest.raises(openai.BadRequestError) as caught:
        preview(client, **{"model": BASE, "training_file": upload(client), **body})
    assert caught.value.param == param and caught.value.type == "invalid_request_error" and "Traceback" not in caught.value.message


@pytest.mark.parametrize("body", [{}, {"job": {}}, {"job": {"model": 3, "data": []}}, {"model": BASE}, {"job": {"data": {"train": [{}]}}}])
def test_a_request_about_nothing(service: Service, body: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        preview(service.client(), **body)


def test_other_projects_files_do_not_exist(service: Service) -> None:
    file = upload(service.client())
    with pytest.raises(openai.BadRequestError, match="no file"):
        preview(service.client(), model=BASE, training_file=file)
    with pytest.raises(openai.AuthenticationError):
        preview(OpenAI(base_url=service.base_url, api_key="wrong", max_retries=0), model=BASE, training_file=file)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00\xff", b"[]", b"\xff\xfe{}", b'{"a": 1}'])
def test_a_file_that_is_no_data(service: Service, content: bytes) -> None:
    client = service.client()
    try:
        seen = preview(client, model=BASE, training_file=upload(client, content))
    except openai.BadRequestError as error:
        assert error.code == "invalid_training_file"
    else:
        assert all(example["error"] for example in seen["examples"])


def test_a_large_file_costs_no_more_than_a_small_one(service: Service) -> None:
    client = service.client()
    row = json.dumps(ROWS[0]).encode() + b"\n"
    small, large = upload(client, row * 10), upload(client, row * (100 * 2**20 // len(row)))
    preview(client, model=BASE, training_file=small)
    read = []
    for file in (small, large):
        before = bytes_read()
        assert len(preview(client, model=BASE, training_file=file)["examples"]) == 3
        read.append(bytes_read() - before)
    assert read[1] < read[0] + 20 * 2**20, read


def bytes_read() -> int:
    """What this process, the service's thread included, has read so far: unlike time, it does not depend on what else runs."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
