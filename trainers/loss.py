"""The loss of the supervised positions, without ever holding all their logits.

Shape letters: N supervised positions of one micro-batch, E hidden size, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGIT_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
"""Upper bound of one chunk's logits in fp32, per kind of device. On CPUs it stays below what malloc gives back to the system each time."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: -log p(target), and what may be added to it."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


NLL = Objective()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of -log p(target). The gradient is made chunk by chunk in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, head_VE: Tensor, target_N: Tensor, weight_N: Tensor, what: Objective) -> tuple[Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(hidden_NE.dtype, torch.float32)  # at least fp32; fp64 stays fp64
        loss = hidden_NE.new_zeros((), dtype=exact)
        correct = hidden_NE.new_zeros((), dtype=exact)
        grad_hidden_NE = torch.empty_like(hidden_NE) if need_hidden else None
        grad_head_VE = torch.zeros_like(head_VE, dtype=exact) if need_head else None
        vocabulary = head_VE.shape[0]
        rows = max(1, LOGIT_BYTES[hidden_NE.device.type] // (4 * vocabulary))
        for start in range(0, hidden_NE.shape[0], rows):
            part = slice(start, start + rows)
            hidden_CE, target_C1, weight_C = hidden_NE[part], target_N[part, None], weight_N[part].to(exact)
            logits_CV = hidden_CE @ head_VE.T
            top_C1 = logits_CV.argmax(-1, keepdim=True)
            most_C1 = logits_CV.gather(1, top_C1).to(exact)
            picked_C1 = logits_CV.gather(1, target_C1).to(exact)
            correct += torch.dot((top_C1 == target_C1).squeeze(1).to(exact), weight_C)
            # From here on `scaled` is exp(logit - largest logit): never above 1, and written over in place.
            scaled_CV = torch.sub(logits_CV, most_C1, out=torch.empty_like(logits_CV, dtype=exact))
            mean_C1 = scaled_CV.mean(-1, keepdim=True) + most_C1 if what.label_smoothing else picked_C1
            sum_C1 = scaled_CV.exp_().sum(-1, keepdim=True)
            lse_C1 = sum_C1.log() + most_C1
            aim_C1 = (1 - what.label_smoothing) * picked_C1 + what.label_smoothing * mean_C1
            loss += torch.dot((lse_C1 - aim_C1 + what.z_loss * lse_C1.square()).squeeze(1), weight_C)
            if need_hidden or need_head:
                # d loss / d logit = p (1 + 2 z lse) - (1 - smoothing) [target] - smoothing / V, times the token's weight.
                scaled_CV.mul_(weight_C[:, None] * (1 + 2 * what.z_loss * lse_C1) / sum_C1)
                scaled_CV.scatter_add_(1, target_C1, -(1 - what.label_smoothing) * weight_C[:, None])
                if what.label_smoothing:
                    scaled_CV.sub_(weight_C[:, None] * (what.label_smoothing / vocabulary))
                logits_CV.copy_(scaled_CV)  # from here on, their gradient
            if grad_hidden_NE is not None:
                torch.matmul(logits_CV, head_VE, out=grad_hidden_NE[part])
            if grad_head_VE is not None:
                grad_head_VE += logits_CV.T @ hidden_CE
            del logits_CV, scaled_CV  # before the next chunk's are made
        ctx.grads = (grad_hidden_NE, None if grad_head_VE is None else grad_head_VE.to(head_VE.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # `grad_loss` is 1 in the loop, where normalisation happens once per step on the summed gradients.
        grads, ctx.grads = ctx.grads, None  # given away, not kept: the head's is as large as the head
        scaled = [None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in grads]
        return (*scaled, None, None, None)


def cross_entropy_sum(
    hidden_NE: Tensor, head_VE: Tensor, target_N: Tensor, weight_N: Tensor, what: Objective = NLL
) -> tuple[Tensor, Tensor]:
    """(weighted sum of token losses in nats, weighted count of right predictions), both scalars in at least fp32.

    hidden_NE and head_VE share a dtype; target_N is int64, weight_N a float. N = 0 gives zeros. One backward pass at most.
    """
    return _ChunkedCrossEntropy.apply(hidden_NE, head_VE, target_N, weight_N, what)  # type: ignore[return-value]
