"""Both engines say the same: token by token, with adapters, in one batch, under every way to steer the choice that is not random.

Both run in fp32. Two engines sum in different orders, so where the two likeliest tokens are closer than that may shift, either is right:
there the comparison of an answer ends, and the test says so; further apart, a difference fails.
"""

from __future__ import annotations

from typing import Any

import pytest

from serve.engine import ANY_OBJECT, Engine, GenerateRequest, PromptEvent, TokenEvent
from tests.vllm.conftest import Events, ask, ids, said

TOLERANCE = 2e-3
"""Of a log-probability. Both engines' fp32 differ by about 1e-4."""


def greedy(prompt_ids: list[int], **fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt_ids": prompt_ids, "temperature": 0.0, "max_tokens": 32, "logprobs": 2, **fields})


def compare(name: str, theirs: Events, ours: Events) -> tuple[int, float]:
    """(tokens compared, largest difference of their log-probabilities); fails where the answers differ beyond rounding."""
    largest, num_compared = 0.0, 0
    tokens = [[e for e in events if isinstance(e, TokenEvent)] for events in (theirs, ours)]
    for i, (a, b) in enumerate(zip(*tokens, strict=False)):
        if a.id != b.id:
            differ = f"{name}, token {i}: vLLM says {a.id}, transformers {b.id}"
            assert b.top and b.top[1][0] == a.id, differ
            gap = b.top[0][1] - b.top[1][1]
            assert gap < TOLERANCE, f"{differ}, {gap:.4f} apart"
            print(f"{name}: a tie at token {i} ({gap:.1e} apart); the rest is not compared")
            break
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason), f"{name}, token {i}"
        num_compared += 1
        if a.logprob is None or b.logprob is None:
            assert a.logprob == b.logprob, f"{name}, token {i}: one engine tells no log-probability"
            continue
        largest = max(largest, abs(a.logprob - b.logprob), *(abs(p - q) for (_, p), (_, q) in zip(a.top, b.top, strict=True)))
    else:
        assert len(tokens[0]) == len(tokens[1]), name
    assert largest < TOLERANCE, f"{name}: log-probabilities differ by {largest}"
    return num_compared, largest


def test_the_same_greedy_tokens_with_and_without_adapters_in_one_batch(
    vllm_engine: Engine, reference: Engine, prompts: list[list[int]], lora_folders: list[str]
) -> None:
    adapters = [None, *lora_folders[:3]]
    requests = [greedy(p, adapter=adapter) for p in prompts for adapter in adapters]
    theirs, ours = ask(vllm_engine, *requests), ask(reference, *requests)
    compared = [compare(f"prompt {i // 4}, adapter {i % 4}", a, b) for i, (a, b) in enumerate(zip(theirs, ours, strict=True))]
    num_compared, num_said = sum(n for n, _ in compared), sum(len(events) for events in ours)
    print(f"{num_compared} of {num_said} tokens of {len(requests)} answers compared; ", end="")
    print(f"log-probabilities differ by {max(d for _, d in compared):.1e} at most (tolerance {TOLERANCE:.0e})")
    assert num_compared > 0.8 * num_said
    assert len({tuple(ids(events)) for events in theirs[:4]}) == 4, "the adapters change nothing"
    assert "Paris" in said(theirs[0])
    for i, a in enumerate(theirs):  # the answer of another adapter, or of none, would not have passed
        for j in range(i - i % 4, i - i % 4 + 4):
            if i != j:
                with pytest.raises(AssertionError):
                    compare("another adapter", a, ours[j])


ANSWER = '{"properties":{"answer":{"maxLength":30,"type":"string"}},"required":["answer"],"type":"object"}'
STEERED: dict[str, dict[str, Any]] = {
    "stop": {"stop": ("Paris", "blue")},
    "stop ids": {"stop_ids": frozenset({30})},
    "cut": {"max_tokens": 3},
    "bias": {"logit_bias": {7042: -100.0, 504: -3.0}},
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    "schema": {"json_schema": ANSWER, "logprobs": None},
    "any object": {"json_schema": ANY_OBJECT, "logprobs": None},
    "no logprobs but its own": {"logprobs": 0},
}


@pytest.fixture(scope="module")
def unsteered(reference: Engine, prompts: list[list[int]]) -> list[str]:
    return [said(events) for events in ask(reference, greedy(prompts[0]), greedy(prompts[5]))]


@pytest.mark.parametrize("name", STEERED)
def test_the_same_answers_when_steered(
    vllm_engine: Engine, reference: Engine, prompts: list[list[int]], unsteered: list[str], name: str
) -> None:
    requests = [greedy(p, **{"logprobs": 2, **STEERED[name]}) for p in (prompts[0], prompts[5])]
    theirs = ask(vllm_engine, *requests)
    for i, (a, b) in enumerate(zip(theirs, ask(reference, *requests), strict=True)):
        print(f"{name}, prompt {i}: {said(a)!r}; compared {compare(name, a, b)}")
    assert ([said(a) for a in theirs] == unsteered) == (name == "no logprobs but its own"), "it steers nothing"


def test_prompts_are_scored_alike(vllm_engine: Engine, reference: Engine, prompts: list[list[int]], lora_folders: list[str]) -> None:
    fields = {"max_tokens": 0, "prompt_logprobs": 3, "logprobs": None}
    requests = [greedy(p, adapter=adapter, **fields) for p in prompts[:3] for adapter in (None, lora_folders[0])]
    largest = 0.0
    told = ask(reference, *requests)
    for (bare,), (adapted,) in zip(told[::2], told[1::2], strict=True):
        assert isinstance(bare, PromptEvent) and isinstance(adapted, PromptEvent)
        apart = max(abs((p or 0) - (q or 0)) for p, q in zip(bare.logprobs, adapted.logprobs, strict=True))
        assert apart > 100 * TOLERANCE, "the adapter changes nothing"
    for (theirs,), (ours,) in zip(ask(vllm_engine, *requests), told, strict=True):
        assert isinstance(theirs, PromptEvent) and isinstance(ours, PromptEvent)
        assert theirs.logprobs[0] is None and theirs.top[0] == ()
        assert len(theirs.logprobs) == len(ours.logprobs) and [len(t) for t in theirs.top] == [len(t) for t in ours.top]
        for p, q in zip(theirs.logprobs[1:], ours.logprobs[1:], strict=True):
            assert p is not None and q is not None
            largest = max(largest, abs(p - q))
        largest = max(
            largest, *(abs(p - q) for a, b in zip(theirs.top, ours.top, strict=True) for (_, p), (_, q) in zip(a, b, strict=True))
        )
    print(f"log-probabilities of prompts differ by {largest:.1e} at most (tolerance {TOLERANCE:.0e})")
    assert largest < TOLERANCE


def test_a_scored_prompt_comes_before_its_answer(vllm_engine: Engine, prompts: list[list[int]]) -> None:
    (events,) = ask(vllm_engine, greedy(prompts[0], prompt_logprobs=0, max_tokens=4))
    assert [type(e) for e in events] == [PromptEvent] + 4 * [TokenEvent]
