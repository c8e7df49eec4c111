"""AdamW whose two moments are kept in 8 bits, 256 to a scale (Dettmers et al., 2022, arXiv:2110.02861): 2.03 bytes a weight, not 8.

The arithmetic is bitsandbytes' own, tensor by tensor; what is ours is a state that is there from the start, and all of it tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainers import nf4

BLOCK = 256
"""Elements that share a scale."""
MIN_ELEMENTS = 4096
"""Smaller tensors keep fp32 moments, as in bitsandbytes: they save nothing."""
CHUNK = 2**18
"""Elements updated at once on the host, whose kernel makes four fp32 copies of what it is given. A multiple of BLOCK."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over whole tensors; state `exp_avg` and `exp_avg_sq` in uint8, `{...}_scale` in fp32, or both in fp32; `step` on the CPU."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for tensor in group["params"]:
                self.state[tensor] = _zeros(tensor)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    _update(tensor, tensor.grad, self.state[tensor], group)


def _zeros(tensor: Tensor) -> dict[str, Tensor]:
    small = tensor.numel() < MIN_ELEMENTS
    state = {"step": torch.zeros(())}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(tensor, dtype=torch.float32 if small else torch.uint8, requires_grad=False)
        if not small:
            state[f"{name}_scale"] = torch.zeros(-(-tensor.numel() // BLOCK), dtype=torch.float32, device=tensor.device)
    return state


def _update(tensor: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    bnb = nf4.bitsandbytes()
    state["step"] += 1
    step, (beta1, beta2), eps, lr, decay = int(state["step"]), group["betas"], group["eps"], group["lr"], group["weight_decay"]
    if "exp_avg_scale" not in state:
        bnb.optimizer_update_32bit(
            "adam", grad, tensor, state["exp_avg"], beta1, eps, step, lr, state["exp_avg_sq"], beta2, weight_decay=decay
        )
        return
    weights, grads = tensor.view(-1), grad.reshape(-1)
    averages, squares = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    signed, unsigned = (nf4.dynamic_code(tensor.device, signed=s) for s in (True, False))
    size = CHUNK if tensor.device.type == "cpu" else weights.numel()
    for start in range(0, weights.numel(), size):
        part, scales = slice(start, start + size), slice(start // BLOCK, -(-(start + size) // BLOCK))
        bnb.optimizer_update_8bit_blockwise(
            "adam",
            grads[part],
            weights[part],
            averages[part],
            squares[part],
            beta1,
            beta2,
            0.0,
            0.0,
            eps,
            step,
            lr,
            signed,
            unsigned,
            state["exp_avg_scale"][scales],
            state["exp_avg_sq_scale"][scales],
            decay,
        )
