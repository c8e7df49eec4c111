"""The optimizer, its schedule, and what gradient it must not use: small enough to read, exact enough to resume bit for bit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainers.adam8bit import AdamW8bit
from trainers.adam_bf16 import AdamWBf16
from trainers.errors import SpecError
from trainers.spec import Optim

NORMS_KEPT = 50
SPIKE_STEPS = 10
"""So many norms are needed before one can be called a spike."""


def build(masters: Mapping[str, Tensor], optim: Optim, master: Literal["fp32", "bf16"] = "fp32", seed: int = 0) -> torch.optim.Optimizer:
    """AdamW over all masters; vectors (norms, biases) are never decayed.

    Every slot of its state exists at once, all zeros, so that a checkpoint can be read into it. `master` is the dtype of the masters.
    Raises SpecError for what cannot be had together.
    """
    decayed = [m for m in masters.values() if m.dim() > 1]
    kept = [m for m in masters.values() if m.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    rate = float(optim.learning_rate)
    if optim.type == "adamw8bit":
        _check_8bit(masters, master)
        return AdamW8bit(groups, rate, optim.betas)
    if master == "bf16":
        _check_bf16(masters)
        return AdamWBf16(groups, {m: name for name, m in masters.items()}, rate, optim.betas, seed)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=optim.betas, fused=True)
    for tensor in masters.values():
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),  # where and what the fused kernel wants
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }
    return optimizer


def state(optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's own tensors, as `{name}.{slot}`."""
    return {f"{name}.{slot}": value for name, tensor in masters.items() for slot, value in optimizer.state[tensor].items()}


def _check_8bit(masters: Mapping[str, Tensor], master: str) -> None:
    if master == "bf16":
        raise SpecError(
            "`optim.type` is adamw8bit and `scale.master` is bf16: each rounds in its own way, and both at once were never tried.",
            "Set `scale.master` to fp32, or `optim.type` to adamw.",
            "optim.type",
        )
    if any(isinstance(m, DTensor) for m in masters.values()):
        raise SpecError(
            "`optim.type` is adamw8bit where weights are sharded: a scale's 256 elements would lie on two workers.",
            "Set `optim.type` to adamw, or `scale.sharding` to none.",
            "optim.type",
        )


def _check_bf16(masters: Mapping[str, Tensor]) -> None:
    if other := [m.dtype for m in masters.values() if m.dtype != torch.bfloat16]:
        raise SpecError(
            f"`scale.master` is bf16, but what is trained here is {str(other[0]).removeprefix('torch.')}: adapters always are.",
            "Set `scale.master` to fp32, or train all weights (`method.type: full`) with `scale.precision: bf16`.",
            "scale.master",
        )


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0): linear warm-up to the peak, then the schedule down to zero after the last step."""
    peak = float(optim.learning_rate)
    warmup = math.ceil(optim.warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optim.schedule]


def is_bad(norm: float, before: list[float], max_spike: float | None) -> bool:
    """Whether a gradient of this norm must not be used: not finite, or a spike beside the norms of the steps before it."""
    if not math.isfinite(norm):
        return True
    return max_spike is not None and len(before) >= SPIKE_STEPS and norm > max_spike * statistics.median(before)
