"""The engine against transformers' own generate and PEFT's own forward, alone and in every mixture."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from serve.engine import GenerateRequest, PromptEvent, TokenEvent
from serve.slots import SlotCache
from serve.transformers_engine import MAX_ROWS, PREFILL_TOKENS, TransformersEngine
from trainers.chat import Chat
from trainers.errors import ModelError, Unavailable, UserError


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work out, the more the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(length + 1000 * seed)).tolist()


def greedy(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"temperature": 0.0, "max_tokens": 12, **fields})


async def collect(engine: TransformersEngine, request: GenerateRequest, delay_s: float = 0) -> list[TokenEvent]:
    await asyncio.sleep(delay_s)
    return [event async for event in engine.generate(request) if isinstance(event, TokenEvent)]


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


def test_packed_weights_change_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[list[Any]]:
        engine = TransformersEngine(tiny, num_threads=1)  # bfloat16
        found = everything(engine, *(greedy(prompt_ids=prompt(n), logprobs=2, max_tokens=8) for n in (1, 40, 90)))
        engine.close()
        return found

    packed_ones = answers()
    monkeypatch.setattr("serve.adapters.packed", lambda linear: linear)
    monkeypatch.setattr("serve.transformers_engine.packed", lambda linear: linear)
    for ours, plain in zip(packed_ones, answers(), strict=True):
        assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in plain], abs=0.05) or ids_of(ours) != ids_of(plain)
        assert ours[0].logprob == pytest.approx(plain[0].logprob, abs=0.05)


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
            ids, met = [(await anext(stream)).id], 0  # type: ignore[union-attr]
            for other in others:
                await collect(engine, greedy(prompt_ids=prompt(5), adapter=other, max_tokens=2))
                kept = adapters[0] in engine.adapters.loaded() and len(engine.adapters.loaded()) == 2
                if any(row.request.max_tokens == 300 for row in engine._decoding):
                    assert kept
                    met += 1
            return ids + [event.id async for event in stream if isinstance(event, TokenEvent)], met

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


# -- log-probabilities -------------------------------------------------------------------------------------------------


def reference_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """Of every next token: T x V, by transformers' own forward."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def check_scores(scores: Any, tops: Any, ids: list[int], logprobs_TV: torch.Tensor, num_top: int) -> None:
    for id, logprob, top, row in zip(ids, scores, tops, logprobs_TV, strict=True):
        assert logprob == pytest.approx(float(row[id]), abs=1e-4)
        best = row.topk(num_top).values.tolist()
        assert [p for _, p in top] == pytest.approx(best, abs=1e-4)
        assert [float(row[i]) for i, _ in top] == pytest.approx(best, abs=1e-4)


def test_log_probabilities_of_answers(engine: TransformersEngine, reference: Any) -> None:
    schema = '{"type": "string", "pattern": "^[a-z ]{1,30}$"}'
    requests = [
        greedy(prompt_ids=prompt(9), logprobs=5),
        GenerateRequest(prompt_ids=prompt(30), logprobs=2, max_tokens=12, temperature=2.0, top_p=0.9, frequency_penalty=1.0, seed=1),
        GenerateRequest(prompt_ids=prompt(3), logprobs=2, max_tokens=12, json_schema=schema, logit_bias={70: 3.0}, seed=2),
        greedy(prompt_ids=prompt(9), logprobs=0),
        greedy(prompt_ids=prompt(9)),
    ]
    answers = ask(engine, *requests)
    for request, events in zip(requests[:4], answers[:4], strict=True):
        ids = ids_of(events)
        logprobs_TV = reference_logprobs(reference, request.prompt_ids + ids)[len(request.prompt_ids) - 1 : -1]
        check_scores([e.logprob for e in events], [e.top for e in events], ids, logprobs_TV, request.logprobs or 0)
    assert ids_of(answers[3]) == ids_of(answers[4]) and all(e.logprob is None and e.top == () for e in answers[4])


async def collect_all(engine: TransformersEngine, request: GenerateRequest) -> list[Any]:
    return [event async for event in engine.generate(request)]


def everything(engine: TransformersEngine, *requests: GenerateRequest) -> list[list[Any]]:
    async def main() -> list[list[Any]]:
        return await asyncio.gather(*(collect_all(engine, r) for r in requests))

    return asyncio.run(main())


def test_log_probabilities_of_prompts(engine: TransformersEngine, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.transformers_engine.SCORED_LOGITS", 300 * 50)  # fifty tokens at a time
    lengths = (1, 2, 300, 490, 40)  # together read in several steps, one of them beginning inside a prompt
    requests = [greedy(prompt_ids=prompt(n), prompt_logprobs=3, max_tokens=4) for n in lengths]
    for request, events in zip(requests, everything(engine, *requests), strict=True):
        first, *tokens = events
        assert isinstance(first, PromptEvent) and first.logprobs[0] is None and first.top[0] == ()
        logprobs_TV = reference_logprobs(reference, request.prompt_ids)
        check_scores(first.logprobs[1:], first.top[1:], request.prompt_ids[1:], logprobs_TV[:-1], 3)
        assert ids_of(tokens) == expected(reference, request.prompt_ids, 4)


def test_a_prompt_can_be_scored_without_an_answer(engine: TransformersEngine, reference: Any) -> None:
    whole = prompt(512)  # the context leaves no room for an answer, and none is asked for
    company = greedy(prompt_ids=prompt(7))
    scored, tokens = everything(engine, greedy(prompt_ids=whole, prompt_logprobs=0, max_tokens=0), company)
    assert len(scored) == 1 and len(scored[0].logprobs) == 512
    check_scores(scored[0].logprobs[1:], [()] * 511, whole[1:], reference_logprobs(reference, whole)[:-1], 0)
    assert ids_of(tokens) == expected(reference, prompt(7))
    wait_until(lambda: engine.num_running == 0)


# -- what was read before ----------------------------------------------------------------------------------------------


@pytest.fixture
def reads(tiny: Path) -> Iterator[tuple[TransformersEngine, list[int]]]:
    """An engine of its own, and the number of tokens of each of its forward passes."""
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    sizes: list[int] = []
    decoder: Any = engine._model.get_decoder()
    hook = decoder.layers[0].register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[1]))
    yield engine, sizes
    hook.remove()
    engine.close()


def test_the_next_turn_reads_only_what_is_new(reads: tuple[TransformersEngine, list[int]], reference: Any) -> None:
    engine, sizes = reads
    history = prompt(60)
    for turn in range(4):
        sizes.clear()
        fresh = greedy(prompt_ids=history, logprobs=3)
        events = ask(engine, fresh)[0]
        assert ids_of(events) == expected(reference, history)
        logprobs_TV = reference_logprobs(reference, history + ids_of(events))[len(history) - 1 : -1]
        check_scores([e.logprob for e in events], [e.top for e in events], ids_of(events), logprobs_TV, 3)
        assert sizes[0] == (60 if turn == 0 else 11)  # the answer's last token was never read
        history = history + ids_of(events) + prompt(10, seed=turn)


def test_a_shared_beginning_is_read_once(reads: tuple[TransformersEngine, list[int]], reference: Any) -> None:
    engine, sizes = reads
    system = prompt(200)
    prompts = [system + prompt(5 + i, seed=i) for i in range(12)]
    for ids, events in zip(prompts, ask(engine, *(greedy(prompt_ids=p, max_tokens=3) for p in prompts)), strict=True):
        assert ids_of(events) == expected(reference, ids, 3)
    assert sum(sizes) < 200 + 12 * 30
    sizes.clear()
    same = ask(engine, *(greedy(prompt_ids=system, seed=i, max_tokens=3) for i in range(4)))  # as for n = 4
    assert all(ids_of(e) == expected(reference, system, 3) for e in same) and sum(sizes) < 30


def test_beginnings_of_one_adapter_are_not_anothers(reads: tuple[TransformersEngine, list[int]], tiny: Path, adapters: list[str]) -> None:
    engine, _ = reads
    ids = prompt(80)
    for adapter in (None, *adapters, None, *adapters):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        assert ids_of(ask(engine, greedy(prompt_ids=ids, adapter=adapter, max_tokens=5))[0]) == expected(model, ids, 5)


def test_what_is_kept_is_bounded(tiny: Path, reference: Any) -> None:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1, max_prefix_bytes=100_000)
    for seed in range(8):
        ids = prompt(150, seed=seed)
        assert ids_of(ask(engine, greedy(prompt_ids=ids, max_tokens=4))[0]) == expected(reference, ids, 4)
        assert engine._prefixes.num_bytes <= 100_000
    kept = engine._prefixes
    assert kept.num_bytes == sum(p.num_bytes for p in kept._kept.values()) and len(kept._kept) >= 1
    engine.close()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [True, False])
def test_rows_that_do_not_fit_wait_and_go_on(tiny: Path, adapters: list[str], paged: bool) -> None:
    # In double precision: over hundreds of tokens, adapters this strong make much of how fp32 rounds in one batch or another.
    roomy = TransformersEngine(tiny, dtype=torch.float64, num_threads=1)
    small = TransformersEngine(tiny, dtype=torch.float64, num_threads=1, max_cache_bytes=roomy._cache.bytes_per_token * 1100)
    small._cache._is_paged = paged  # the other way is that of GPUs
    small._cache.reset()
    assert small.context == roomy.context == 512 and small._cache.max_tokens == 1024
    requests = [
        GenerateRequest(
            prompt_ids=prompt(20 + 31 * (i % 7), seed=i),
            adapter=(None, *adapters)[i % 4],
            temperature=float(i % 3 > 0),
            seed=i,
            max_tokens=(250, 300)[i % 2],
            stop_ids=frozenset(),
            logprobs=1,
            prompt_logprobs=(None, 1)[i % 5 == 0],
        )
        for i in range(10)
    ]
    most = 0

    async def main() -> list[list[Any]]:
        nonlocal most
        asked = [asyncio.create_task(collect_all(small, r)) for r in requests]
        while not all(task.done() for task in asked):
            most = max(most, small.stats()["cache_bytes"] - small._prefixes.num_bytes)
            await asyncio.sleep(0.002)
        return [task.result() for task in asked]

    told = asyncio.run(main())
    assert 0 < most <= 1024 * small._cache.bytes_per_token
    assert small.stats()["preempted"] > 0
    for ours, alone in zip(told, everything(roomy, *requests), strict=True):
        assert [type(e) for e in ours] == [type(e) for e in alone]
        assert [getattr(e, "id", None) for e in ours] == [getattr(e, "id", None) for e in alone]
        for a, b in zip(ours, alone, strict=True):
            if isinstance(a, PromptEvent):
                assert a.logprobs[1:] == pytest.approx(b.logprobs[1:], abs=1e-5)
            else:
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5) and a.finish_reason == b.finish_reason
    small.close()
    roomy.close()


@pytest.mark.parametrize("paged", [True, False])
def test_memory_is_short_and_consumers_leave(tiny: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch, paged: bool) -> None:
    rng = random.Random(0)
    requests = [
        GenerateRequest(
            prompt_ids=prompt(rng.randint(1, 200), seed=rng.randint(0, 3)),
            adapter=rng.choice([None, *adapters]),
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            max_tokens=rng.randint(1, 210),
            stop_ids=frozenset(),
            prompt_logprobs=rng.choice([None, None, 0]),
        )
        for i in range(40)
    ]
    patience = [rng.randint(0, 30) if rng.random() < 0.25 else 1000 for _ in requests]
    delays_s = [rng.random() for _ in requests]

    async def some(engine: TransformersEngine, i: int) -> list[int]:
        await asyncio.sleep(delays_s[i])
        ids = []
        async with aclosing(engine.generate(requests[i])) as stream:
            async for event in stream:
                if isinstance(event, TokenEvent):
                    ids.append(event.id)
                if len(ids) > patience[i]:
                    break
        return ids

    async def main(engine: TransformersEngine) -> list[list[int]]:
        return await asyncio.gather(*(some(engine, i) for i in range(len(requests))))

    roomy = TransformersEngine(tiny, dtype=torch.float64, num_threads=1)
    wanted = asyncio.run(main(roomy))
    monkeypatch.setattr("serve.slots.CHUNK", 16)
    monkeypatch.setattr("serve.transformers_engine.HEADROOM", 4)
    small = TransformersEngine(tiny, dtype=torch.float64, num_threads=1, max_cache_bytes=roomy._cache.bytes_per_token * 520)
    small._cache._is_paged = paged
    small._cache.reset()
    assert asyncio.run(main(small)) == wanted
    assert small.stats()["preempted"] > 5
    wait_until(lambda: small.num_running == 0 and all(a.num_users == 0 for a in small.adapters._loaded.values()))
    small.close()
    roomy.close()


def test_a_row_that_leaves_gives_its_memory_back(tiny: Path) -> None:
    cache = SlotCache(AutoConfig.from_pretrained(tiny), torch.float32, torch.device("cpu"), 1 << 30)
    cache.reserve(4, 20_000, 0, 0)
    for tensor in (cache.keys_LSKCD, cache.values_LSKCD):
        tensor.fill_(1.0)
    before = resident()
    cache.vacate(2)
    freed = (cache.keys_LSKCD.nbytes + cache.values_LSKCD.nbytes) / cache.num_slots
    assert before - resident() > 0.9 * freed > 4e6
    for tensor in (cache.keys_LSKCD, cache.values_LSKCD):
        assert not tensor[:, 2].any() and tensor[:, [0, 1, 3]].all()


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_answers_and_nothing_else(tiny: Path, reference: Any, adapters: list[str]) -> None:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    decoder: Any = engine._model.get_decoder()
    left = [5]

    def fail(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of luck")

    hook = decoder.layers[1].register_forward_pre_hook(fail)

    async def main() -> list[Any]:
        requests = [greedy(prompt_ids=prompt(5 + i), adapter=(None, adapters[0])[i % 2], max_tokens=50) for i in range(6)]
        return await asyncio.gather(*(collect(engine, r) for r in requests), return_exceptions=True)

    assert all(isinstance(outcome, Unavailable) and "RuntimeError" in str(outcome) for outcome in asyncio.run(main()))
    hook.remove()
    assert ids_of(ask(engine, greedy(prompt_ids=prompt(8)))[0]) == expected(reference, prompt(8))
    assert engine.num_running == 0 and [a.num_users for a in engine.adapters._loaded.values()] == [0]
    engine.close()


def test_five_hundred_requests_at_a_time(engine: TransformersEngine, reference: Any) -> None:
    wanted = {n: expected(reference, prompt(n), 2) for n in range(3, 8)}
    requests = [greedy(prompt_ids=prompt(3 + i % 5), max_tokens=2) for i in range(500)]
    for request, events in zip(requests, ask(engine, *requests), strict=True):
        assert ids_of(events) == wanted[len(request.prompt_ids)]
    assert engine._cache.num_slots <= MAX_ROWS


def test_more_than_it_holds_is_refused(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.transformers_engine.MAX_OPEN", 5)

    async def main() -> list[Any]:
        return await asyncio.gather(*(collect(engine, greedy(prompt_ids=prompt(4))) for _ in range(9)), return_exceptions=True)

    outcomes = asyncio.run(main())
    assert sum(isinstance(o, Unavailable) for o in outcomes) == 4 and sum(isinstance(o, list) for o in outcomes) == 5
    monkeypatch.undo()
    assert engine.stats()["waiting"] == 0 and len(ask(engine, greedy(prompt_ids=prompt(4)))) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt_ids": []}, "no tokens"),
        ({"prompt_ids": [5, 300]}, "300"),
        ({"prompt_ids": [-1]}, "-1"),
        ({"logit_bias": {9999: 1.0}}, "9999"),
        ({"max_tokens": 0}, "nothing to generate"),
        ({"adapter": "/nowhere"}, "not a readable PEFT"),
    ],
)
def test_what_would_harm_a_step_is_refused_first(engine: TransformersEngine, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ask(engine, greedy(**{"prompt_ids": prompt(4), **fields}))


def test_an_evicted_adapter_ends_with_its_last_stream(tiny: Path, adapters: list[str], tmp_path: Path) -> None:
    engine = TransformersEngine(tiny, dtype=torch.float32, num_threads=1)
    folder = shutil.copytree(adapters[0], tmp_path / "adapter")
    asked = greedy(prompt_ids=prompt(9), adapter=str(folder), max_tokens=100)
    whole = ids_of(ask(engine, asked)[0])

    async def main() -> list[int]:
        async with aclosing(engine.generate(asked)) as stream:
            ids = [(await anext(stream)).id]  # type: ignore[union-attr]
            shutil.rmtree(folder)
            engine.evict(str(folder))
            assert engine.adapters.loaded() == [] and engine.stats()["adapter_bytes"] > 0
            with pytest.raises(ModelError):
                await collect(engine, asked)
            return ids + [event.id async for event in stream if isinstance(event, TokenEvent)]

    assert asyncio.run(main()) == whole
    wait_until(lambda: engine.num_running == 0 and not engine._mix.adapters)
    assert engine.stats()["adapter_bytes"] == 0
    engine.evict("/never/there")
    engine.close()


def test_a_tokens_bytes(engine: TransformersEngine, tiny: Path) -> None:
    chat = Chat.load(tiny)
    text = "the fox: né 🦊 <filename>"
    assert b"".join(map(engine.piece, chat.encoder.encode(text, "start"))).decode() == text
    assert {engine.piece(id) for id in chat.stop_ids} == {b""} and engine.piece(10**6) == engine.piece(-1) == b""
