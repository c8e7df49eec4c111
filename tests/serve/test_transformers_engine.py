"""The engine against transformers' own generate and PEFT's own forward, alone and in every mixture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serve.engine import GenerateRequest, TokenEvent
from serve.transformers_engine import MAX_ROWS, PREFILL_TOKENS, TransformersEngine, nucleus, pick
from trainers.chat import Chat
from trainers.errors import ModelError, Unavailable, UserError


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(length + 1000 * seed)).tolist()


def greedy(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"temperature": 0.0, "max_tokens": 12, **fields})


async def collect(engine: TransformersEngine, request: GenerateRequest, delay_s: float = 0) -> list[TokenEvent]:
    await asyncio.sleep(delay_s)
    return [event async for event in engine.generate(request)]


def ask(engine: TransformersEngine, *requests: GenerateRequest, stagger_s: float = 0) -> list[list[TokenEvent]]:
    """All requests at a time; `stagger_s` lets each begin a little after the one before."""

    async def main() -> list[list[TokenEvent]]:
        return await asyncio.gather(*(collect(engine, r, i * stagger_s) for i, r in enumerate(requests)))

    return asyncio.run(main())


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [e.id for e in events]


def text_of(events: list[TokenEvent]) -> str:
    return "".join(e.text for e in events)


def expected(model: Any, ids: list[int], max_tokens: int = 12) -> list[int]:
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    return out[0, len(ids) :].tolist()


# -- the same tokens, in whatever company ------------------------------------------------------------------------------


def test_batch_equals_generate(engine: TransformersEngine, reference: Any) -> None:
    # Together longer than one step's share of prompt tokens, so that a prompt is read in pieces.
    prompts = [prompt(n) for n in (1, 5, 300, 40, 350, 2, 480, 17)]
    assert sum(map(len, prompts)) > 2 * PREFILL_TOKENS
    for ids, events in zip(prompts, ask(engine, *(greedy(prompt_ids=p) for p in prompts)), strict=True):
        assert ids_of(events) == expected(reference, ids)


def test_rows_join_and_leave_while_others_run(engine: TransformersEngine, reference: Any) -> None:
    requests = [greedy(prompt_ids=prompt(5 + 7 * i), max_tokens=3 + 17 * (i % 4)) for i in range(20)]
    for request, events in zip(requests, ask(engine, *requests, stagger_s=0.004), strict=True):
        assert ids_of(events) == expected(reference, request.prompt_ids, request.max_tokens or 0)


def test_one_long_row_among_many_short_ones(engine: TransformersEngine, reference: Any) -> None:
    prompts = [prompt(490)] + [prompt(6, seed=i) for i in range(24)]  # wide enough that each row attends by itself
    for ids, events in zip(prompts, ask(engine, *(greedy(prompt_ids=p) for p in prompts)), strict=True):
        assert ids_of(events) == expected(reference, ids)


def test_more_requests_than_rows(engine: TransformersEngine, reference: Any) -> None:
    prompts = [prompt(3, seed=i) for i in range(MAX_ROWS + 10)]
    for ids, events in zip(prompts, ask(engine, *(greedy(prompt_ids=p) for p in prompts)), strict=True):
        assert ids_of(events) == expected(reference, ids)


def test_real_model_equals_generate(smollm: Path) -> None:
    chat = Chat.load(smollm)
    questions = ("What is the capital of France?", "Write a haiku about the sea.", "Explain gravity in one sentence. " * 5)
    prompts = [chat.prompt([{"role": "user", "content": q}]) for q in questions]
    engine = TransformersEngine(smollm, dtype=torch.float32, num_threads=1)
    answers = ask(engine, *(greedy(prompt_ids=p, max_tokens=10) for p in prompts))
    engine.close()
    assert text_of(answers[0]) == "The capital of France is Paris." and answers[0][-1].finish_reason == "stop"
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    for ids, events in zip(prompts, answers, strict=True):
        assert ids_of(events) == expected(model, ids, 10)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_in_one_batch_equal_peft(engine: TransformersEngine, tiny: Path, adapters: list[str]) -> None:
    prompts = [prompt(9, seed=i) for i in range(3)]
    cases = [(ids, adapter) for ids in prompts for adapter in (None, *adapters)]
    answers = ask(engine, *(greedy(prompt_ids=ids, adapter=adapter) for ids, adapter in cases), stagger_s=0.002)
    for (ids, adapter), events in zip(cases, answers, strict=True):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        assert ids_of(events) == expected(model, ids)
        assert ids_of(events) == ids_of(ask(engine, greedy(prompt_ids=ids, adapter=adapter))[0])
    by_adapter = {adapter: tuple(ids_of(e)) for (_, adapter), e in zip(cases[:4], answers[:4], strict=True)}
    assert len(set(by_adapter.values())) == 4  # else the test could not tell them apart


def test_a_live_stream_keeps_its_adapter(tiny: Path, adapters: list[str]) -> None:
    probe = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    alone = ids_of(ask(probe, greedy(prompt_ids=prompt(9), adapter=adapters[0], max_tokens=300))[0])
    sizes = [probe.adapters.acquire(a).num_bytes for a in adapters]
    probe.close()
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1, max_adapter_bytes=sizes[0] + max(sizes[1:]))

    others = (*adapters[1:], *adapters[1:])

    async def main() -> tuple[list[int], int]:
        """(what the stream said, how many others were answered while it ran)"""
        async with aclosing(engine.generate(greedy(prompt_ids=prompt(9), adapter=adapters[0], max_tokens=300))) as stream:
            ids, met = [(await anext(stream)).id], 0
            for other in others:
                await collect(engine, greedy(prompt_ids=prompt(5), adapter=other, max_tokens=2))
                kept = adapters[0] in engine.adapters.loaded() and len(engine.adapters.loaded()) == 2
                if any(row.request.max_tokens == 300 for row in engine._decoding):
                    assert kept
                    met += 1
            return ids + [event.id async for event in stream], met

    met = 0
    for _ in range(20):  # on a busy machine the stream may be over before the others were answered
        said, met = asyncio.run(main())
        assert said == alone
        if met == len(others):
            break
    assert met == len(others)
    engine.close()


def test_no_room_for_an_adapter_is_said(tiny: Path, adapters: list[str]) -> None:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1, max_adapter_bytes=1000)
    with pytest.raises(Unavailable, match="max_adapter_bytes"):
        ask(engine, greedy(prompt_ids=prompt(5), adapter=adapters[0]))
    engine.close()


def test_a_broken_adapter_harms_nobody_else(engine: TransformersEngine, reference: Any, tmp_path: Path) -> None:
    async def main() -> Any:
        return await asyncio.gather(
            collect(engine, greedy(prompt_ids=prompt(5))),
            collect(engine, greedy(prompt_ids=prompt(5), adapter=str(tmp_path))),
            return_exceptions=True,
        )

    good, bad = asyncio.run(main())
    assert ids_of(good) == expected(reference, prompt(5))
    assert isinstance(bad, ModelError)


# -- where an answer ends ----------------------------------------------------------------------------------------------


def test_stop_strings_cut_the_answer(engine: TransformersEngine) -> None:
    whole = text_of(ask(engine, greedy(prompt_ids=prompt(9), max_tokens=40))[0])
    stop = whole[10:14]
    events = ask(engine, greedy(prompt_ids=prompt(9), max_tokens=40, stop=("never there", stop)))[0]
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop" and all(e.finish_reason is None for e in events[:-1])


def test_max_tokens_and_context(engine: TransformersEngine) -> None:
    events = ask(engine, greedy(prompt_ids=prompt(9), max_tokens=7))[0]
    assert len(events) == 7 and events[-1].finish_reason == "length"
    filled = ask(engine, greedy(prompt_ids=prompt(500), max_tokens=None))[0]
    assert len(filled) == 12 or filled[-1].finish_reason == "stop"
    with pytest.raises(UserError, match=r"500 tokens .* 13.* 512"):
        ask(engine, greedy(prompt_ids=prompt(500), max_tokens=13))
    with pytest.raises(UserError, match="Shorten"):
        ask(engine, greedy(prompt_ids=prompt(512), max_tokens=None))


def test_end_of_turn_is_not_text(engine: TransformersEngine, tiny: Path) -> None:
    stop_ids = Chat.load(tiny).stop_ids
    # So hot that every token is about equally likely: sooner or later one ends the turn.
    answers = ask(engine, *(GenerateRequest(prompt_ids=prompt(8), temperature=100.0, seed=s) for s in range(8)))
    ended = [events for events in answers if events[-1].finish_reason == "stop"]
    assert ended
    for events in ended:
        assert events[-1].id in stop_ids and not stop_ids & set(ids_of(events[:-1]))
        assert text_of(events) == Chat.load(tiny).decode(ids_of(events))


def test_a_request_says_which_ids_end_it(engine: TransformersEngine) -> None:
    plain = ids_of(ask(engine, greedy(prompt_ids=prompt(8), max_tokens=20))[0])
    last = plain[5]
    events = ask(engine, greedy(prompt_ids=prompt(8), max_tokens=20, stop_ids=frozenset({last})))[0]
    assert ids_of(events) == plain[: plain.index(last) + 1] and events[-1].finish_reason == "stop" and events[-1].text == ""


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_means_the_same_alone_and_in_company(engine: TransformersEngine) -> None:
    seeded = [GenerateRequest(prompt_ids=prompt(6), max_tokens=20, seed=s, top_p=p) for s in (1, 2) for p in (1.0, 0.8)]
    company = [GenerateRequest(prompt_ids=prompt(30, seed=i), max_tokens=25) for i in range(10)]
    alone = [ids_of(ask(engine, r)[0]) for r in seeded]
    together = [ids_of(e) for e in ask(engine, *seeded, *company)[: len(seeded)]]
    assert alone == together and len({tuple(ids) for ids in alone}) == len(seeded)
    without_seed = [tuple(ids_of(e)) for e in ask(engine, *[GenerateRequest(prompt_ids=prompt(6), max_tokens=20)] * 2)]
    assert len(set(without_seed)) == 2


def test_no_nucleus_and_no_heat_are_greedy(engine: TransformersEngine) -> None:
    likeliest = ids_of(ask(engine, greedy(prompt_ids=prompt(6)))[0])
    narrow = GenerateRequest(prompt_ids=prompt(6), max_tokens=12, top_p=0.0)
    cold = GenerateRequest(prompt_ids=prompt(6), max_tokens=12, temperature=1e-4)
    assert [ids_of(e) for e in ask(engine, narrow, cold)] == [likeliest, likeliest]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probs = torch.tensor([0.1, 0.5, 0.0, 0.25, 0.15])
    points = (torch.arange(1000) + 0.5) / 1000
    counts = torch.bincount(torch.tensor([pick(probs.cumsum(-1), p) for p in points]), minlength=5)
    assert counts.tolist() == [100, 500, 0, 250, 150]
    sums, ids = nucleus(probs, 0.7)  # 0.5 alone is not enough, 0.5 + 0.25 is
    assert ids.tolist() == [1, 3] and pick(sums, torch.tensor(0.66)) == 0 and pick(sums, torch.tensor(0.67)) == 1


def test_a_wide_nucleus_is_not_cut_short() -> None:
    flat = torch.full((5000,), 1 / 5000)
    assert abs(len(nucleus(flat, 0.9)[1]) - 4500) <= 2


# -- leaving -----------------------------------------------------------------------------------------------------------


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_a_consumer_that_leaves_frees_its_row_and_adapter(engine: TransformersEngine, adapters: list[str]) -> None:
    async def main() -> None:
        ran = False
        for _ in range(20):  # on a busy machine all may be said before we look
            async with aclosing(engine.generate(greedy(prompt_ids=prompt(5), adapter=adapters[0], max_tokens=500))) as stream:
                await anext(stream)
                if ran := engine.num_running == 1:
                    break
        assert ran
        waiting = asyncio.create_task(collect(engine, greedy(prompt_ids=prompt(5), adapter=adapters[1], max_tokens=500)))
        await asyncio.sleep(0.05)
        waiting.cancel()

    asyncio.run(main())
    wait_until(lambda: engine.num_running == 0)

    def ours_alone() -> bool:
        held = [engine.adapters.acquire(a) for a in adapters[:2]]
        users = [a.num_users for a in held]
        for adapter in held:
            engine.adapters.release(adapter)
        return users == [1, 1]

    wait_until(ours_alone)


def test_close_ends_what_runs(tiny: Path) -> None:
    async def main(engine: TransformersEngine) -> bool:
        """Whether the stream was told to end; else it had ended by itself."""
        async with aclosing(engine.generate(greedy(prompt_ids=prompt(5), max_tokens=500))) as stream:
            await anext(stream)
            await asyncio.to_thread(engine.close)
            try:
                async for _ in stream:
                    pass
                return False
            except Unavailable as error:
                return "stopped" in error.message

    tries = 1
    while not asyncio.run(main(engine := TransformersEngine(tiny, dtype=torch.float32, num_threads=1))):
        tries += 1
        assert tries < 20
    with pytest.raises(Unavailable, match="stopped"):
        ask(engine, greedy(prompt_ids=prompt(5)))
