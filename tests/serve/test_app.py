"""The serving app through its real door: Ray Serve's proxy, spoken to with the unmodified openai client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from serve.deploy import application, deploy
from tests.serve.asking import MESSAGES, ask, client
from trainers.chat import Chat
from trainers.errors import Unavailable
from trainers.records import TEMPLATE_FILE, DeployRecord, ModelRecord, RunDir


def test_whole_answer(served, tiny: Path) -> None:
    answer = ask(served)
    assert answer.model == "ft:tiny" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.usage.prompt_tokens == len(Chat.load(tiny).prompt(MESSAGES))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 12


def test_streamed_answer_is_the_whole_one(served) -> None:
    whole = ask(served, served.adapters[0])
    chunks = list(ask(served, served.adapters[0], stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1 and {c.model for c in chunks} == {"ft:tiny"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_the_stream_is_not_held_back(served) -> None:
    early = False
    for _ in range(20):  # whoever reads late on a busy machine finds several pieces there; one that is held back is never early
        arrived = [time.monotonic() for _ in ask(served, stream=True, max_tokens=300)]
        if early := arrived[1] - arrived[0] < (arrived[-1] - arrived[0]) / 2:
            break
    assert early


def test_wire_format_of_a_stream(served) -> None:
    body = {"model": "m", "messages": MESSAGES, "max_tokens": 2, "stream": True, "temperature": 0}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {served.token}"}, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert "usage" not in first and first["model"] == "tiny"


def test_tuned_models_and_base_answer_together(served) -> None:
    alone = [ask(served, a).choices[0].message.content for a in ("", *served.adapters)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(16) as pool:
        jobs = [(i % 4, pool.submit(ask, served, ("", *served.adapters)[i % 4])) for i in range(16)]
        for which, job in jobs:
            assert job.result().choices[0].message.content == alone[which]


def test_several_choices(served) -> None:
    first, second = (ask(served, n=3, temperature=1, seed=5) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [c.message.content for c in second.choices]
    assert first.usage.completion_tokens <= 36
    streamed = ["", "", ""]
    for chunk in ask(served, n=3, temperature=1, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a <|im_end|> b"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"temperature": 3}, "temperature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(served, body: dict, param: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client(served).chat.completions.create(**{"model": "m", "messages": MESSAGES, "stream": stream, **body})
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_context_error_names_both_numbers(served, tiny: Path) -> None:
    num_prompt = len(Chat.load(tiny).prompt(MESSAGES))
    with pytest.raises(openai.BadRequestError, match=rf"{num_prompt} tokens .* 511.* 512"):
        ask(served, max_tokens=511)


def test_adapter_that_is_not_there(served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, "/nowhere/step-000100", stream=True)
    assert caught.value.code == "invalid_model" and "step-000100" in caught.value.message


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "serving-token"}])
def test_token_is_asked_for(served, headers: dict[str, str]) -> None:
    for path in ("/v1/chat/completions", "/v1/tuneyard/prompt"):
        response = httpx.post(f"{served.url}{path}", json={"model": "m", "messages": MESSAGES}, headers=headers, timeout=60)
        assert response.status_code == 401
        assert response.json()["error"].keys() == {"message", "type", "param", "code", "remedy"}


def test_a_client_that_leaves_stops_its_generation(served) -> None:
    stream = ask(served, stream=True, max_tokens=480)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):  # and one who waits for a whole answer
        client(served, timeout=0.05).chat.completions.create(model="m", messages=MESSAGES, n=8, max_tokens=480)
    deadline = time.monotonic() + 120
    while running := httpx.get(f"{served.url}/healthz", timeout=60).json()["running"]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


# -- adapters with a template of their own ----------------------------------------------------------------------------


@pytest.fixture
def kind(served, tiny: Path, tmp_path: Path) -> tuple[RunDir, ModelRecord, Chat]:
    """A run whose model was trained with another template than its base's, and the chat of that."""
    run, model = run_with("adapters/kind", tmp_path / "run")
    shutil.copytree(served.adapters[0], run.path(str(model.adapter)))
    template = (tiny / TEMPLATE_FILE).read_text().replace("Be helpful.", "Be kind to all who ask.")
    run.path(str(model.adapter), TEMPLATE_FILE).write_text(template)
    return run, model, Chat.load(tiny, template)


def test_an_adapter_is_asked_with_the_template_it_was_trained_with(served, tiny: Path, kind: tuple[RunDir, ModelRecord, Chat]) -> None:
    run, model, chat = kind
    assert len(chat.prompt(MESSAGES)) != len(Chat.load(tiny).prompt(MESSAGES))
    assert ask(served, str(run.path(str(model.adapter)))).usage.prompt_tokens == len(chat.prompt(MESSAGES))
    assert ask(served, served.adapters[0]).usage.prompt_tokens == ask(served).usage.prompt_tokens == len(Chat.load(tiny).prompt(MESSAGES))
    assert deploy(run, model, "ft:tiny:kind", served.url, served.token, chat).model == "ft:tiny:kind"


def test_deploy_refuses_an_adapter_that_lost_its_template(served, kind: tuple[RunDir, ModelRecord, Chat]) -> None:
    run, model, chat = kind
    run.path(str(model.adapter), TEMPLATE_FILE).unlink()
    with pytest.raises(Unavailable, match="other tokens"):
        deploy(run, model, "ft:tiny:kind", served.url, served.token, chat)


def test_an_adapter_with_an_unusable_template(served, kind: tuple[RunDir, ModelRecord, Chat]) -> None:
    run, model, _ = kind
    run.path(str(model.adapter), TEMPLATE_FILE).write_text("{% for m in messages %}{{ m.content }}")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, str(run.path(str(model.adapter))))
    assert caught.value.code == "invalid_template"


# -- the deploy stage --------------------------------------------------------------------------------------------------


def run_with(adapter: str, folder: Path) -> tuple[RunDir, ModelRecord]:
    return RunDir(folder, attempt=1, writer="driver"), ModelRecord(base="tiny", adapter=adapter, merged=None, step=1)


def test_deploy_writes_its_record_once_the_name_answers(served, tiny: Path, tmp_path: Path) -> None:
    run, model = run_with("adapters/pas-à-pas", tmp_path)  # also where a header must carry more than ASCII
    shutil.copytree(served.adapters[0], run.path(str(model.adapter)))
    record = deploy(run, model, "ft:tiny:job", served.url, served.token, Chat.load(tiny))
    assert record.model == "ft:tiny:job" and 0 < record.first_answer_s < 60
    stored = run.read("deploy.json", DeployRecord)
    assert stored is not None and stored.first_answer_s == record.first_answer_s and stored.attempt == 1


def test_a_whole_model_is_asked_as_it_is(served, tiny: Path, tmp_path: Path) -> None:
    run, model = run_with("adapters/not-there", tmp_path)  # a QLoRA's, say: what answers is the merged model
    record = deploy(run, model.model_copy(update={"served": "merged"}), "ft:tiny:whole", served.url, served.token, Chat.load(tiny))
    assert record.model == "ft:tiny:whole"


def test_deploy_refuses_a_server_that_reads_otherwise(served, tiny: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    template = (other / "chat_template.jinja").read_text().replace("Be helpful.", "Be kind.")
    (other / "chat_template.jinja").write_text(template)
    run, model = run_with(served.adapters[0], tmp_path)
    with pytest.raises(Unavailable, match="other tokens"):
        deploy(run, model, "ft:tiny:job", served.url, served.token, Chat.load(other))
    assert run.read("deploy.json", DeployRecord) is None


def test_deploy_reports_an_adapter_that_cannot_answer(served, tiny: Path, tmp_path: Path) -> None:
    run, model = run_with("adapters/missing", tmp_path)
    with pytest.raises(Unavailable, match="needs adapter_config"):
        deploy(run, model, "ft:tiny:job", served.url, served.token, Chat.load(tiny))


def test_deploy_gives_up_waiting(tiny: Path, tmp_path: Path) -> None:
    run, model = run_with("a", tmp_path)
    with pytest.raises(Unavailable, match="not ready after 1 s"):
        deploy(run, model, "ft:tiny:job", "http://127.0.0.1:9", "t", Chat.load(tiny), wait_s=1)
    assert json.loads((tmp_path / "progress.json").read_text())["message"] == "deploy"


def test_application_entry() -> None:
    entry = application("tiny", Path("/models/tiny"), Path("/home/token"))
    assert entry["route_prefix"] == "/tiny" and entry["import_path"] == "serve.app:build"
    assert json.loads(json.dumps(entry["args"])) == {"name": "tiny", "model_dir": "/models/tiny", "token_file": "/home/token"}


RESIDENT = """
import os, pathlib
from serve.heaps import give_back, give_back_large
def resident(): return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
"""
FREED = {
    "small blocks": """
blocks = [bytearray(64_000) for _ in range(3000)]
kept = blocks[::50]  # as what lives long lies between what does not
before = resident()
del blocks
give_back()
""",
    "large blocks": """
give_back_large()
bytearray(30 << 20)  # once this is freed, malloc by itself would keep all that is no larger
blocks, kept = [], []
for _ in range(10):
    blocks.append(bytearray(20 << 20))
    kept.append([bytearray(1000) for _ in range(100)])
before = resident()
del blocks
""",
}


@pytest.mark.parametrize("what", FREED)
def test_freed_memory_goes_back_to_the_system(what: str) -> None:
    """In a process of its own: how much malloc holds depends on all that ran before."""
    code = f"{RESIDENT}{FREED[what]}print(before - resident())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) > 150_000_000
