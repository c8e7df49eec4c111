"""Choosing the next token against plain references: transformers' own logits processors, and counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from serve.engine import GenerateRequest
from serve.sampling import Choice, choose, draw_likely, pick, score

VOCAB = 3000


def logits(rows: int, seed: int = 0, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def choice(vocab: int = VOCAB, **fields: Any) -> Choice:
    return Choice(GenerateRequest(**{"prompt_ids": [1], **fields}), vocab)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "spread"),
    [(1.0, None, 0.9, 3.0), (0.7, 5, 1.0, 3.0), (1.3, 40, 0.8, 2.0), (1.0, None, 0.95, 0.1), (1.0, 100, 0.5, 0.5), (1.0, 1, 0.1, 1.0)],
)
def test_the_same_candidates_as_transformers(temperature: float, top_k: int | None, top_p: float, spread: float) -> None:
    logits_NV = logits(6, spread=spread)
    expected_NV = TemperatureLogitsWarper(temperature)(None, logits_NV.clone())  # type: ignore[arg-type]
    if top_k:
        expected_NV = TopKLogitsWarper(top_k)(None, expected_NV)  # type: ignore[arg-type]
    if top_p < 1:
        expected_NV = TopPLogitsWarper(top_p)(None, expected_NV)  # type: ignore[arg-type]
    expected_NV = expected_NV.softmax(-1)
    # Evenly spaced points must fall on each token as often as it is likely.
    num_points = 1000
    points = ((torch.arange(num_points) + 0.5) / num_points).double()
    for logits_V, expected_V in zip(logits_NV, expected_NV, strict=True):
        rows = (logits_V / temperature).expand(num_points, -1)
        k, p = torch.full((num_points,), top_k or VOCAB), torch.full((num_points,), top_p)
        ids = draw_likely(rows, k, p, points)
        drawn_V = torch.bincount(ids, minlength=VOCAB) / num_points
        assert not drawn_V[expected_V == 0].any()
        assert (drawn_V - expected_V).abs().max() <= 1.01 / num_points


def test_all_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probs = torch.tensor([0.1, 0.5, 0.0, 0.25, 0.15])
    points = ((torch.arange(1000) + 0.5) / 1000).double()
    counts = torch.bincount(pick(probs.expand(1000, -1), points), minlength=5)
    assert counts.tolist() == [100, 500, 0, 250, 150]


def test_a_wide_nucleus_is_not_cut_short() -> None:
    flat = torch.zeros(1500, 2000)
    points = ((torch.arange(1500) + 0.5) / 1500).double()
    ids = draw_likely(flat, torch.full((1500,), 2000), torch.full((1500,), 0.9), points)
    assert len(ids.unique()) >= 1450  # 1,800 tokens reach 0.9; a cut at 1,024 would show


def test_rows_do_not_feel_each_other() -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 1, "top_p": 0.9},
        {"seed": 2, "top_k": 7, "temperature": 2.0},
        {"temperature": 0.0, "logit_bias": {5: 100.0}},
        {"seed": 3, "frequency_penalty": 2.0, "logprobs": 2},
    ]
    logits_NV = logits(len(settings))
    together, alone = [choice(**s) for s in settings], [choice(**s) for s in settings]
    ids: list[int] = []
    for _ in range(5):
        ids, scores = choose(logits_NV.clone(), together)
        for i, one in enumerate(alone):
            assert choose(logits_NV[i : i + 1].clone(), [one]) == ([ids[i]], [scores[i]])
    assert ids[4] == 5


def test_no_nucleus_and_no_heat_are_greedy() -> None:
    logits_NV = logits(4)
    likeliest = logits_NV.argmax(-1).tolist()
    settings: list[dict[str, Any]] = [{"top_p": 0.0}, {"temperature": 1e-4}, {"temperature": 1e-30}, {"top_k": 1}]
    for fields in settings:
        assert choose(logits_NV.clone(), [choice(**fields) for _ in range(4)])[0] == likeliest


def test_penalties_as_openai_defines_them() -> None:
    raw = logits(1)
    one = choice(temperature=0.0, frequency_penalty=0.7, presence_penalty=0.4, logit_bias={7: 1.5})
    taken: list[int] = []
    for _ in range(60):
        expected = raw[0].clone()
        expected[7] += 1.5
        for id in set(taken):
            expected[id] -= taken.count(id) * 0.7 + 0.4
        (id,), _ = choose(raw.clone(), [one])
        assert expected[id] == pytest.approx(float(expected.max()), abs=1e-4)
        taken.append(id)
    assert len(set(taken)) < len(taken)  # some came again, or nothing was counted


def test_a_mask_leaves_only_what_it_allows() -> None:
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[17, 2999]] = True
    rows = [choice(temperature=0.0), choice(temperature=5.0), choice(temperature=5.0, top_p=0.9), choice(temperature=0.0)]
    for seed in range(20):
        logits_NV = logits(4, seed)
        ids, _ = choose(logits_NV.clone(), rows, {0: allowed, 1: allowed, 2: allowed})
        assert set(ids[:3]) <= {17, 2999} and ids[3] == int(logits_NV[3].argmax())


def test_log_probabilities_are_the_models_own() -> None:
    logits_NV = logits(2)
    expected_NV = logits_NV.double().log_softmax(-1)
    rows = [choice(logprobs=3, temperature=0.5, logit_bias={11: 100.0}), choice(logprobs=0, temperature=0.0)]
    ids, scores = choose(logits_NV.clone(), rows)
    assert ids[0] == 11
    for row, id, (logprob, top) in zip(expected_NV, ids, scores, strict=True):
        assert logprob == pytest.approx(float(row[id]), abs=1e-5)
        best = row.topk(len(top))
        assert [i for i, _ in top] == best.indices.tolist()
        assert [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [len(top) for _, top in scores] == [3, 0]
    assert choose(logits_NV.clone(), [choice(), choice()])[1] == [(None, ()), (None, ())]


def test_more_likeliest_than_there_are_tokens() -> None:
    (logprob, top), *_ = score(torch.zeros(1, 3), [0], [20])
    assert len(top) == 3 and logprob == pytest.approx(-1.0986, abs=1e-3)
