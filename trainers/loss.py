"""The loss of the supervised positions, without ever holding all their logits.

Shape letters: N supervised positions of one micro-batch, E hidden size, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGIT_BYTES = 64 * 2**20
"""Upper bound of one chunk's fp32 logits."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of -log p(target). The gradient is made chunk by chunk in the forward pass, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, head_VE: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(hidden_NE.dtype, torch.float32)  # at least fp32; fp64 stays fp64
        loss = hidden_NE.new_zeros((), dtype=exact)
        correct = hidden_NE.new_zeros((), dtype=exact)
        grad_hidden_NE = torch.empty_like(hidden_NE) if need_hidden else None
        grad_head_VE = torch.zeros_like(head_VE, dtype=exact) if need_head else None
        rows = max(1, LOGIT_BYTES // (4 * head_VE.shape[0]))
        for start in range(0, hidden_NE.shape[0], rows):
            part = slice(start, start + rows)
            hidden_CE, target_C, weight_C = hidden_NE[part], target_N[part], weight_N[part].to(exact)
            logits_CV = (hidden_CE @ head_VE.T).to(exact)
            lse_C = torch.logsumexp(logits_CV, dim=-1)
            picked_C = logits_CV.gather(1, target_C[:, None]).squeeze(1)
            loss += torch.dot(lse_C - picked_C, weight_C)
            correct += torch.dot((logits_CV.argmax(-1) == target_C).to(exact), weight_C)
            if grad_hidden_NE is None and grad_head_VE is None:
                continue
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_()  # softmax, in place
            grad_CV[torch.arange(len(target_C), device=grad_CV.device), target_C] -= 1
            grad_CV = grad_CV.mul_(weight_C[:, None]).to(hidden_NE.dtype)
            if grad_hidden_NE is not None:
                torch.matmul(grad_CV, head_VE, out=grad_hidden_NE[part])
            if grad_head_VE is not None:
                grad_head_VE += grad_CV.T @ hidden_CE
        ctx.grads = (grad_hidden_NE, None if grad_head_VE is None else grad_head_VE.to(head_VE.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # `grad_loss` is 1 in the loop, where normalisation happens once per step on the summed gradients.
        grad_hidden_NE, grad_head_VE = ctx.grads
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in (grad_hidden_NE, grad_head_VE)]
        return (*scaled, None, None)


def cross_entropy_sum(hidden_NE: Tensor, head_VE: Tensor, target_N: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted sum of token losses in nats, weighted count of right predictions), both scalars in at least fp32.

    hidden_NE and head_VE share a dtype; target_N is int64, weight_N a float. N = 0 gives zeros.
    """
    return _ChunkedCrossEntropy.apply(hidden_NE, head_VE, target_N, weight_N)  # type: ignore[return-value]
