"""The deploy stage holds the served model to what was trained: a real app on the tiny model, the reference by transformers and PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve.app import application
from serve.chats import Chats
from serve.deploy import TOLERANCE, Replay, deploy
from serve.transformers_engine import TransformersEngine
from tests.serve.conftest import over_http
from trainers.chat import Chat
from trainers.errors import ServingDiffers
from trainers.records import DeployRecord, ModelRecord, RunDir

TOKEN = "t"
MESSAGES = [
    [{"role": "user", "content": "the quick brown"}, {"role": "assistant", "content": "fox jumps over the lazy dog"}],
    [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "dog"}],
]


@pytest.fixture(scope="module")
def url(tiny: Path) -> Iterator[str]:
    with over_http(application(TransformersEngine(tiny), Chats(tiny), "tiny", TOKEN)) as url:
        yield url


def replays_of(folder: Path, adapter: str) -> list[Replay]:
    """What the model with this adapter gives the answers of MESSAGES, in fp32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chat = Chat.load(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    found = []
    for number, messages in enumerate(MESSAGES):
        made = chat.example(messages)
        ids = made.ids.tolist()
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = {i: logprobs[i - 1, ids[i]].item() for start, stop in made.spans for i in range(start, stop)}
        found.append(Replay(f"held.jsonl:{number + 1}", ids, scored, messages[:-1], ids[: made.spans[-1][0]]))
    return found


@pytest.fixture
def run(tmp_path: Path, adapters: list[str]) -> RunDir:
    run = RunDir(tmp_path / "run", 1, "driver")
    shutil.copytree(adapters[0], run.path("adapter"))
    return run


MODEL = ModelRecord(base="tiny", adapter="adapter", merged=None, step=1)


def test_a_served_adapter_that_computes_what_was_trained(url: str, tiny: Path, adapters: list[str], run: RunDir) -> None:
    deploy(run, MODEL, "ft:tiny", url, TOKEN, Chat.load(tiny), replays=replays_of(tiny, adapters[0]))
    record = run.read("deploy.json", DeployRecord)
    assert record is not None and record.replayed == 2 and record.compared_tokens > 10 and record.tolerance == TOLERANCE
    assert record.mean_difference is not None and 0 < record.mean_difference < TOLERANCE[0]


def test_another_adapter_than_the_trained_one_is_no_deployment(url: str, tiny: Path, adapters: list[str], run: RunDir) -> None:
    with pytest.raises(ServingDiffers, match=r"held\.jsonl:\d, token \d+ \(.*\): log-probability -\d.*served, -\d.* trained"):
        deploy(run, MODEL, "ft:tiny", url, TOKEN, Chat.load(tiny), replays=replays_of(tiny, adapters[1]))
    assert run.read("deploy.json", DeployRecord) is None


def test_a_bare_base_in_the_place_of_its_adapter_is_no_deployment(url: str, tiny: Path, adapters: list[str], run: RunDir) -> None:
    whole = MODEL.model_copy(update={"served": "merged"})  # so that no adapter is asked for
    with pytest.raises(ServingDiffers, match="does not compute what was trained"):
        deploy(run, whole, "ft:tiny", url, TOKEN, Chat.load(tiny), replays=replays_of(tiny, adapters[0]))


def test_the_first_token_that_is_read_otherwise_is_named(url: str, tiny: Path, adapters: list[str], run: RunDir) -> None:
    good, other = replays_of(tiny, adapters[0])
    wrong = [*(other.prompt_ids or [])]
    wrong[5] = wrong[5] + 1
    with pytest.raises(ServingDiffers, match=r"held\.jsonl:2: from token 5 on") as caught:
        deploy(run, MODEL, "ft:tiny", url, TOKEN, Chat.load(tiny), replays=[good, replace(other, prompt_ids=wrong)])
    assert not caught.value.retry
