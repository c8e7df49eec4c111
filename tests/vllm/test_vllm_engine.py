"""The vLLM engine alone: chance, refusals, adapters that come and go, cancelled streams, and a vLLM that dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from serve.engine import ANY_OBJECT, GenerateRequest, TokenEvent
from tests.vllm.conftest import ask, ids, make_lora, said
from trainers.errors import ModelError, TuneyardError, Unavailable, UserError


def test_chance_follows_the_seed(vllm_engine: Any, prompts: list[list[int]]) -> None:
    drawn = [GenerateRequest(prompt_ids=prompts[1], max_tokens=24, seed=seed) for seed in (7, 7, 8, 1 << 70)]
    same, again, other, _ = (ids(events) for events in ask(vllm_engine, *drawn))
    assert same == again != other
    fresh = [GenerateRequest(prompt_ids=prompts[1], max_tokens=24) for _ in range(2)]
    assert len({tuple(ids(e)) for e in ask(vllm_engine, *fresh)}) == 2


def test_the_likeliest_alone_is_greedy(vllm_engine: Any, prompts: list[list[int]]) -> None:
    few = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}]
    answers = ask(vllm_engine, *(GenerateRequest(prompt_ids=prompts[0], max_tokens=8, **fields) for fields in few))
    assert len({tuple(ids(events)) for events in answers}) == 1


REFUSED: dict[str, dict[str, Any]] = {
    "too long an answer": {"max_tokens": 100_000},
    "too long a prompt": {"prompt_ids": [5] * 9000},
    "the whole context, only scored": {"prompt_ids": [5] * 8192, "max_tokens": 0, "prompt_logprobs": 0},
    "no prompt": {"prompt_ids": []},
    "an id that is none": {"logit_bias": {10**6: 1.0}},
    "nothing to say": {"max_tokens": 0},
    "no such adapter": {"adapter": "/nowhere"},
    "no schema": {"json_schema": '{"type":"nothing"}'},
    "log-probabilities of a form": {"json_schema": ANY_OBJECT, "logprobs": 1},
    "no number": {"temperature": float("nan")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_before_the_first_event(vllm_engine: Any, prompts: list[list[int]], name: str) -> None:
    with pytest.raises(TuneyardError) as told:
        ask(vllm_engine, GenerateRequest(**{"prompt_ids": prompts[0], "max_tokens": 4, **REFUSED[name]}))
    assert isinstance(told.value, UserError | ModelError)
    assert len(ask(vllm_engine, GenerateRequest(prompt_ids=prompts[0], max_tokens=2))[0]) == 2


def test_an_adapter_of_too_high_a_rank_is_refused(vllm_engine: Any, prompts: list[list[int]], smollm: Path, tmp_path: Path) -> None:
    high = make_lora(smollm, tmp_path / "high", seed=9, rank=32)
    with pytest.raises(ModelError, match="rank 32"):
        ask(vllm_engine, GenerateRequest(prompt_ids=prompts[0], adapter=high, max_tokens=2))


def test_adapters_are_bounded_and_idle_ones_make_room(vllm_engine: Any, prompts: list[list[int]], lora_folders: list[str]) -> None:
    def request(adapter: str, max_tokens: int) -> GenerateRequest:
        return GenerateRequest(prompt_ids=prompts[0], adapter=adapter, max_tokens=max_tokens, temperature=0.0, stop_ids=frozenset())

    alone = [ask(vllm_engine, request(path, 6))[0] for path in lora_folders]  # four, one after the other, where three fit
    assert vllm_engine.stats()["adapters"] == 3 and len({tuple(ids(e)) for e in alone}) == 4

    async def crowd() -> None:
        streams = [vllm_engine.generate(request(path, 400)) for path in lora_folders[:3]]
        try:
            firsts = await asyncio.gather(*(anext(s) for s in streams))
            assert [e.id for e in firsts] == [ids(e)[0] for e in alone[:3]]
            with pytest.raises(Unavailable, match="3 adapters"):
                async with aclosing(vllm_engine.generate(request(lora_folders[3], 2))) as refused:
                    await anext(refused)
        finally:
            for stream in streams:
                await stream.aclose()

    asyncio.run(asyncio.wait_for(crowd(), 300))


def test_a_deleted_adapter_serves_its_stream_to_the_end(
    vllm_engine: Any, prompts: list[list[int]], lora_folders: list[str], tmp_path: Path
) -> None:
    path = str(shutil.copytree(lora_folders[0], tmp_path / "mine"))
    fields: dict[str, Any] = {"prompt_ids": prompts[0], "max_tokens": 24, "temperature": 0.0, "stop_ids": frozenset()}
    (whole,) = ask(vllm_engine, GenerateRequest(adapter=path, **fields))

    async def deleted_meanwhile() -> list[int]:
        async with aclosing(vllm_engine.generate(GenerateRequest(adapter=path, **fields))) as events:
            first = await anext(events)
            vllm_engine.evict(path)
            shutil.rmtree(path)
            return [first.id, *[e.id async for e in events]]

    assert asyncio.run(deleted_meanwhile()) == ids(whole)
    with pytest.raises(ModelError):
        ask(vllm_engine, GenerateRequest(adapter=path, **fields))
    shutil.copytree(lora_folders[1], path)  # another one in its place is not taken for it
    (other,) = ask(vllm_engine, GenerateRequest(adapter=path, **fields))
    assert other == ask(vllm_engine, GenerateRequest(adapter=lora_folders[1], **fields))[0]
    assert ids(other) != ids(whole)


def until(what: Any, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_a_closed_stream_ends_in_vllm_too(vllm_engine: Any, prompts: list[list[int]]) -> None:
    async def begin_and_leave() -> None:
        async with aclosing(vllm_engine.generate(GenerateRequest(prompt_ids=prompts[0], stop_ids=frozenset()))) as events:
            for _ in range(3):
                await anext(events)
            assert vllm_engine.num_running == 1

    asyncio.run(begin_and_leave())
    until(lambda: vllm_engine.num_running == 0 and not vllm_engine._llm.output_processor.get_num_unfinished_requests())


def test_pieces_join_to_the_text(vllm_engine: Any, prompts: list[list[int]]) -> None:
    (events,) = ask(vllm_engine, GenerateRequest(prompt_ids=prompts[4], max_tokens=24, temperature=0.0))
    assert b"".join(vllm_engine.piece(id) for id in ids(events)).decode() == said(events)
    assert vllm_engine.piece(2) == vllm_engine.piece(10**6) == b""


def test_a_vllm_that_dies_ends_its_streams_and_is_started_anew(vllm_engine: Any, prompts: list[list[int]], lora_folders: list[str]) -> None:
    fields: dict[str, Any] = {"prompt_ids": prompts[0], "adapter": lora_folders[0], "temperature": 0.0}
    (before,) = ask(vllm_engine, GenerateRequest(max_tokens=6, **fields))

    async def killed_meanwhile() -> None:
        async with aclosing(vllm_engine.generate(GenerateRequest(stop_ids=frozenset(), **fields))) as events:
            assert isinstance(await anext(events), TokenEvent)
            for process in vllm_engine._llm.engine_core.resources.engine_manager.processes:
                os.kill(process.pid, signal.SIGKILL)
            async for _ in events:
                pass

    with pytest.raises(Unavailable):
        asyncio.run(asyncio.wait_for(killed_meanwhile(), 120))
    (after,) = ask(vllm_engine, GenerateRequest(max_tokens=6, **fields))
    assert after == before
