"""A step's loss and gradient do not depend on how it is computed, and are what transformers computes."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.numerics.runs import random_examples
from trainers import batching, methods, model
from trainers.spec import Full, Lora

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


METHODS = {"lora": Lora(r=4, alpha=8), "full": Full()}


def build(folder: Path, dtype: torch.dtype, method: Lora | Full) -> model.Trainee:
    """A model whose adapters are not at their zero start, so that every gradient is alive."""
    bare = model.load(folder, dtype)
    methods.of(method).apply(bare, method)
    trainee = model.Trainee(bare)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable(trainee).items():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    if dtype == torch.float64:  # transformers' norm always computes in fp32, which would hide what we look for
        for norm in trainee.modules():
            if isinstance(norm, LlamaRMSNorm):
                norm.forward = types.MethodType(lambda self, x: F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon), norm)
    return trainee


def trainable(trainee: model.Trainee) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in trainee.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=[(d, m) for d in TOLERANCE for m in METHODS], ids=lambda p: f"{p[0]}-{p[1]}".removeprefix("torch."))
def trainee(request: pytest.FixtureRequest, tiny: Path) -> model.Trainee:
    dtype, method = request.param
    return build(tiny, dtype, METHODS[method])


def gradients(trainee: model.Trainee, micro_batches: list[list]) -> tuple[float, torch.Tensor]:
    """(loss sum, all gradients as one fp64 vector) of these micro-batches, one after the other."""
    parameters = trainable(trainee)
    for parameter in parameters.values():
        parameter.grad = None
    total = 0.0
    for examples in micro_batches:
        loss, _ = trainee(model.collate(examples))
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten().double() for p in parameters.values()])  # type: ignore[union-attr]


def reference(trainee: model.Trainee, examples: list) -> tuple[float, torch.Tensor]:
    """Plain transformers: the whole padded batch, its own attention with a mask, the full logits, torch's own cross-entropy."""
    parameters = trainable(trainee)
    for parameter in parameters.values():
        parameter.grad = None
    longest = max(len(ids) for ids, _ in examples)
    ids_BL = torch.zeros(len(examples), longest, dtype=torch.long)
    labels_BL = torch.full_like(ids_BL, -100)
    mask_BL = torch.zeros_like(ids_BL)
    for row, (ids, weights) in enumerate(examples):
        ids_BL[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        labels_BL[row, : len(ids)] = torch.where(torch.from_numpy(weights) > 0, ids_BL[row, : len(ids)], -100)
        mask_BL[row, : len(ids)] = 1
    trainee.model.config._attn_implementation = "sdpa"
    try:
        logits_BLV = trainee.model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
    finally:
        trainee.model.config._attn_implementation = "packed"
    loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in parameters.values()])  # type: ignore[union-attr]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@settings(max_examples=260, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 8), budget=st.integers(16, 200), ranks=st.integers(1, 4))
def test_packed_accumulated_and_spread_equals_the_padded_reference(
    trainee: model.Trainee, seed: int, count: int, budget: int, ranks: int
) -> None:
    examples = random_examples(np.random.default_rng(seed), count)
    plan = batching.plan([len(ids) for ids, _ in examples], ranks, budget)
    micro_batches = [[examples[i] for i in pack] for rank in plan for pack in rank]  # dummies included
    loss, gradient = gradients(trainee, micro_batches)
    want_loss, want = reference(trainee, examples)
    tolerance = TOLERANCE[trainee.model.dtype]
    assert abs(loss - want_loss) <= tolerance * abs(want_loss)
    assert relative(gradient, want) <= tolerance


def test_one_pack_of_eight_equals_eight_of_one(trainee: model.Trainee) -> None:
    examples = random_examples(np.random.default_rng(5), 8)
    together, alone = gradients(trainee, [examples]), gradients(trainee, [[e] for e in examples])
    assert relative(together[1], alone[1]) <= TOLERANCE[trainee.model.dtype]


def test_loss_of_a_step_is_transformers_own_loss(trainee: model.Trainee) -> None:
    ids, weights = random_examples(np.random.default_rng(7), 1, longest=30)[0]
    labels = torch.where(torch.from_numpy(weights) > 0, torch.from_numpy(ids.astype(np.int64)), -100)[None]
    trainee.model.config._attn_implementation = "sdpa"
    try:
        want = trainee.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], labels=labels, use_cache=False).loss.item()
    finally:
        trainee.model.config._attn_implementation = "packed"
    loss, _ = gradients(trainee, [[(ids, weights)]])
    assert loss / float(weights.sum()) == pytest.approx(want, rel=1e-6)  # transformers takes the loss of fp32 logits


def test_examples_of_a_pack_do_not_see_each_other(trainee: model.Trainee) -> None:
    rng = np.random.default_rng(11)
    examples = random_examples(rng, 4)
    others = [(rng.integers(4, 300, len(ids)).astype(np.int32), weights * 0) for ids, weights in examples[1:]]
    with torch.no_grad():
        first = trainee(model.collate([examples[0], *[(ids, weights * 0) for ids, weights in examples[1:]]]))[0].item()
        second = trainee(model.collate([examples[0], *others]))[0].item()
    assert first == pytest.approx(second, rel=1e-6)


def test_fractional_weights_scale_each_token(trainee: model.Trainee) -> None:
    ids, weights = random_examples(np.random.default_rng(13), 1)[0]
    with torch.no_grad():
        whole, half = (trainee(model.collate([(ids, weights * w)]))[0].item() for w in (1.0, 0.5))
    assert half == pytest.approx(whole / 2, rel=1e-6)


def test_real_model_in_fp32_equals_the_padded_reference(smollm: Path) -> None:
    trainee = build(smollm, torch.float32, METHODS["lora"])
    examples = random_examples(np.random.default_rng(3), 4, vocab=49000, longest=24)
    loss, gradient = gradients(trainee, [examples[:3], examples[3:]])
    want_loss, want = reference(trainee, examples)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert relative(gradient, want) <= 1e-5
