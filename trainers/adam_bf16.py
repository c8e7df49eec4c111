"""AdamW whose weights and moments are bf16: 8 bytes a weight with its gradient, where fp32 takes 16.

bf16 keeps 8 significant bits, so that an update below 1/512 of a weight (a step of 1e-5 on a weight of 0.02) rounds to nothing, and a
second moment that decays by a thousandth a step stays where it is. So the update is computed in fp32 and rounded at random, up or down in
proportion to what lies between: right on average, as in Gupta et al., 2015 (arXiv:1502.02551). The random numbers are a hash of seed,
step, tensor and element: a resumed run draws what the uninterrupted one would have drawn, however many workers share the tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainers import shards

CHUNK = {"cpu": 2**18, "cuda": 2**26}
"""Elements updated at once: their fp32 values stay in the cache, and scratch memory stays small."""


class AdamWBf16(torch.optim.Optimizer):
    """AdamW over bf16 tensors, whole or sharded by rows; state `exp_avg` and `exp_avg_sq` in bf16, `step` on the CPU."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: dict[Tensor, str],
        lr: float,
        betas: tuple[float, float],
        seed: int,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.names = names
        self.seed = seed
        for tensor in names:
            self.state[tensor] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(tensor, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    self._update(tensor, tensor.grad, group)

    def _update(self, tensor: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[tensor]
        state["step"] += 1
        step = int(state["step"])
        mine = shards.part(tensor, 0)
        first = mine.offset[0] * math.prod(mine.shape[1:]) if mine.shape else 0  # place of its first element in the whole tensor
        weights, averages, squares = (shards.part(t, 0).local.view(-1) for t in (tensor, state["exp_avg"], state["exp_avg_sq"]))
        grads = shards.part(grad, 0).local.reshape(-1)
        keys = _keys(f"{self.seed}/{step}/{self.names[tensor]}")
        beta1, beta2 = group["betas"]
        size = CHUNK[weights.device.type]
        for start in range(0, weights.numel(), size):
            part = slice(start, start + size)
            gradient = grads[part].to(torch.float32, copy=True)
            average = averages[part].float().lerp_(gradient, 1 - beta1)
            square = squares[part].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            weight = weights[part].float().mul_(1 - group["lr"] * group["weight_decay"])
            spread = torch.sqrt(square, out=gradient).div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            weight.addcdiv_(average, spread, value=-group["lr"] / (1 - beta1**step))
            random = random_bits(first + start, len(weight), keys, weight.device)
            # 16 bits are cut off. The weight's own rounding takes 16 random ones; for the moments 8 each will do.
            _round_into(weights[part], weight, (random >> 16).bitwise_and_(0xFFFF))
            _round_into(averages[part], average, (random & 0xFF00).bitwise_or_(0x80))
            _round_into(squares[part], square, random.bitwise_and_(0xFF).bitwise_left_shift_(8).bitwise_or_(0x80))


def random_bits(first: int, count: int, keys: tuple[int, int], device: torch.device) -> Tensor:
    """int32 (count,): 32 random bits for each of the elements `first`, `first + 1`, ... of the tensor that `keys` stand for.

    A hash of the element's number (two rounds of multiply and xor-shift, constants by C. Wellons, `lowbias32`), keyed before and between.
    """
    bits = torch.arange(count, dtype=torch.int32, device=device).add_(_int32(first + keys[0]))
    bits.bitwise_xor_(_shifted(bits, 16)).mul_(_int32(0x7FEB352D))
    bits.bitwise_xor_(keys[1]).bitwise_xor_(_shifted(bits, 15)).mul_(_int32(0x846CA68B))
    return bits.bitwise_xor_(_shifted(bits, 16))


def _round_into(out: Tensor, exact: Tensor, random: Tensor) -> None:
    """Cut fp32 to bf16 after a random number below one bf16 step was added; `random` (int32, below 2^16) is lost."""
    out.view(torch.int16).copy_(random.add_(exact.view(torch.int32)).bitwise_right_shift_(16))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right, which torch does not have for int32."""
    return (bits >> by).bitwise_and_((1 << (32 - by)) - 1)


def _keys(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return _int32(int.from_bytes(digest[:4], "little")), _int32(int.from_bytes(digest[4:8], "little"))


def _int32(value: int) -> int:
    """The number that has the low 32 bits of `value`."""
    return (value + 2**31) % 2**32 - 2**31
