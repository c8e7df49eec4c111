"""vLLM on Ray Serve: the same application, asked over HTTP with the unmodified openai client."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest


@pytest.fixture(scope="module")
def url(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from serve.app import build

    token_file = tmp_path_factory.mktemp("served") / "token"
    token_file.write_text("serving-token")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temp = tempfile.TemporaryDirectory(prefix="ty", dir="/tmp")  # short: the paths of Ray's sockets may have 107 characters
    ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=temp.name, object_store_memory=100_000_000)
    try:
        ray_serve.start(http_options=HTTPOptions(port=port))
        args = {"name": "smollm", "model_dir": str(smollm), "token_file": str(token_file), "engine": "vllm", "max_adapter_rank": 16}
        ray_serve.run(build(args), name="smollm", route_prefix="/smollm")
        yield f"http://127.0.0.1:{port}/smollm"
    finally:
        ray_serve.shutdown()
        ray.shutdown()
        temp.cleanup()


def client(url: str, adapter: str = "") -> openai.OpenAI:
    headers = {"x-tuneyard-adapter": adapter}
    return openai.OpenAI(base_url=f"{url}/v1", api_key="serving-token", default_headers=headers, max_retries=0, timeout=200)


def test_chats_and_completions_over_http(url: str, lora_folders: list[str]) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client(url).chat.completions
    answer = chat.create(model="smollm", messages=messages, temperature=0, max_tokens=16, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    choice = answer.choices[0]
    assert choice.message.content == "The capital of France is Paris." and choice.finish_reason == "stop"
    assert choice.logprobs and choice.logprobs.content and choice.logprobs.content[0].token == "The"

    stream = chat.create(model="smollm", messages=messages, temperature=0, max_tokens=16, stream=True)  # type: ignore[arg-type]
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3 and "".join(pieces) == choice.message.content

    tuned = client(url, lora_folders[0]).chat.completions.create(model="smollm", messages=messages, temperature=0, max_tokens=16)  # type: ignore[arg-type]
    assert tuned.choices[0].message.content not in (None, choice.message.content)

    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    held = chat.create(model="smollm", messages=messages, temperature=0, max_tokens=40, response_format=form)  # type: ignore[call-overload]
    assert set(json.loads(held.choices[0].message.content or "")) == {"city"}

    echoed = client(url).completions.create(model="smollm", prompt="The sky is blue", max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == "The sky is blue"  # read as a row of plain text is trained: this base puts nothing before it
    assert echoed.choices[0].logprobs and echoed.choices[0].logprobs.token_logprobs
    first, *others = echoed.choices[0].logprobs.token_logprobs
    assert first is None and len(others) == 3 and all(logprob < 0 for logprob in others)

    with pytest.raises(openai.BadRequestError, match="context"):
        chat.create(model="smollm", messages=messages, max_tokens=100_000)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="transformers engine"):
        chat.create(model="smollm", messages=messages, logprobs=True, response_format=form)  # type: ignore[call-overload]
