"""The optimizer, its schedule and the clip: small enough to read, exact enough to resume bit for bit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainers.spec import Optim

NORMS_KEPT = 50
SPIKE_STEPS = 10
"""So many norms are needed before one can be called a spike."""


def build(parameters: dict[str, nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    """AdamW over all parameters, fp32 state; vectors (norms, biases) are never decayed."""
    decayed = [p for p in parameters.values() if p.dim() > 1]
    kept = [p for p in parameters.values() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=float(optim.learning_rate), betas=optim.betas, fused=True)


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


def clip(gradients: Iterable[Tensor], max_norm: float) -> float:
    """Scale gradients in place to a global norm of at most `max_norm`; returns the norm before."""
    gradients = list(gradients)
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm
