"""The chunked loss is torch's cross-entropy, with what may be added to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainers import loss
from trainers.loss import Objective, cross_entropy_sum


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_loss_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, smoothing: float, z: float) -> None:
    monkeypatch.setitem(loss.LOGIT_BYTES, "cpu", 4 * 300 * 7)  # chunks of seven
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(300, 16, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(300, (50,)), torch.rand(50)
    got, correct = cross_entropy_sum(hidden, head, target, weight, Objective(smoothing, z))
    logits = hidden @ head.T
    each = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing) + z * logits.logsumexp(-1) ** 2
    want = each @ weight.double()
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    assert correct.item() == pytest.approx(((logits.argmax(-1) == target).double() @ weight.double()).item(), rel=1e-6)
    for mine, reference in zip(torch.autograd.grad(got, (hidden, head)), torch.autograd.grad(want, (hidden, head)), strict=True):
        assert (mine - reference).norm() <= 1e-12 * reference.norm()


def test_no_positions_weigh_nothing() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    total, correct = cross_entropy_sum(hidden, torch.ones(7, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total.backward()
    assert total.item() == correct.item() == 0 and hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_logits_never_take_more_than_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOGIT_BYTES, "cpu", 2**20)
    hidden, head = torch.randn(3000, 8), torch.randn(2000, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cross_entropy_sum(hidden, head, torch.zeros(3000, dtype=torch.long), torch.ones(3000))
    largest = max(e.cpu_memory_usage for e in profile.events() or [] if e.name == "aten::empty")
    assert largest <= 2**20
