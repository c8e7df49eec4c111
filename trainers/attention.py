"""Attention over packed rows: several examples in one row of tokens, none of which sees another.

A micro-batch is one row of T tokens without padding. Linear layers run on it as it is. Only attention needs to know where examples
begin, and it never needs a mask. On GPUs, variable-length flash attention takes the row with the examples' bounds. On CPUs, examples of
similar length are lifted into a rectangle, padded on the right, where plain causal attention does: no real token ever looks at the
padding behind it.

Registered with transformers under the name "packed"; reaches every layer as the keyword argument `packing` of the model's
forward. Shape letters: T tokens of the row, H query heads, K key heads, R query heads of a key head, D head size, G examples of a group,
L longest of them, B queries of a block, S keys up to the end of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "packed"


@dataclass(frozen=True)
class Group:
    """Examples of similar length, next to each other in the row."""

    start: int
    stop: int
    """Its tokens in the row: start <= t < stop."""
    shape: tuple[int, int]
    """(G, L)."""
    cell: Tensor | None
    """int64[stop - start]: where in the rectangle, counted row by row, each token goes. None where all lengths are equal."""


@dataclass(frozen=True)
class Packing:
    """Where the examples of one row lie."""

    position_ids: Tensor
    """int64[1, T]: position of each token in its own example."""
    groups: tuple[Group, ...] = ()
    """On CPUs."""
    bounds: Tensor | None = None
    """int32[examples + 1], on GPUs: where each example begins, and the end of the row."""
    longest: int = 0


@dataclass(frozen=True)
class Alone:
    """One example, a few tokens at a time with a cache of what came before: how a sample is generated."""


def pack(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """Lay out examples of these lengths (longest first, so that neighbours are alike) in one row."""
    if list(lengths) != sorted(lengths, reverse=True):
        raise ValueError("examples of a row are packed longest first")
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    if torch.device(device).type == "cuda":
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        return Packing(positions, bounds=bounds, longest=lengths[0])
    groups: list[Group] = []
    start = first = 0
    for i in range(1, len(lengths) + 1):
        # At most half of a rectangle's width is padding, except among short examples, where one kernel call beats the waste.
        if i < len(lengths) and (2 * lengths[i] >= lengths[first] or lengths[first] <= 128):
            continue
        groups.append(_group(start, lengths[first:i], device))
        start, first = groups[-1].stop, i
    return Packing(positions, tuple(groups), longest=lengths[0])


def _group(start: int, lengths: Sequence[int], device: torch.device | str) -> Group:
    longest = lengths[0]
    real_GL = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    cell = None if lengths[-1] == longest else real_GL.flatten().nonzero().squeeze(1).to(device)
    return Group(start, start + sum(lengths), (len(lengths), longest), cell)


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | Alone | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns (1, T, H, D) and no attention weights."""
    if packing is None or attention_mask is not None:
        raise ValueError("packed attention takes `packing` and no mask")
    scale = scaling or query_1HTD.shape[-1] ** -0.5
    if isinstance(packing, Alone):  # the first call brings the whole prompt, later ones a token each
        causal = query_1HTD.shape[2] > 1
        out_1HTD = F.scaled_dot_product_attention(query_1HTD, key_1KTD, value_1KTD, is_causal=causal, scale=scale, enable_gqa=True)
        return out_1HTD.transpose(1, 2), None
    q_THD, k_TKD, v_TKD = (x.transpose(1, 2)[0] for x in (query_1HTD, key_1KTD, value_1KTD))
    if packing.bounds is not None:
        b, n = packing.bounds, packing.longest
        gqa = q_THD.shape[1] != k_TKD.shape[1]
        out = varlen_attn(q_THD, k_TKD, v_TKD, b, b, n, n, scale=scale, window_size=(-1, 0), enable_gqa=gqa)
        return out[None], None  # type: ignore[index]
    return _on_cpu(q_THD, k_TKD, v_TKD, packing.groups, scale)[None], None  # type: ignore[call-arg]


@torch.compiler.disable
def _on_cpu(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, groups: tuple[Group, ...], scale: float) -> Tensor:
    parts = []
    for group in groups:
        q, k, v = (_lift(x[group.start : group.stop], group) for x in (q_THD, k_TKD, v_TKD))
        out_GHLD = CausalAttention.apply(q, k, v, scale)
        flat = out_GHLD.transpose(1, 2).reshape(-1, *q_THD.shape[1:])  # type: ignore[union-attr]
        parts.append(flat if group.cell is None else flat.index_select(0, group.cell))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _lift(x_nHD: Tensor, group: Group) -> Tensor:
    """(tokens of the group, heads, D) -> (G, heads, L, D), zeros where the rectangle has padding."""
    if group.cell is not None:
        x_nHD = x_nHD.new_zeros(group.shape[0] * group.shape[1], *x_nHD.shape[1:]).index_copy(0, group.cell, x_nHD)
    return x_nHD.unflatten(0, group.shape).transpose(1, 2)


class CausalAttention(torch.autograd.Function):
    """Causal attention for CPUs, block of queries by block of queries, each against the keys up to its own end.

    Plain matrix products: torch's flash kernel takes twice as long there, mostly in its backward pass. As flash attention does (Dao et al.,
    2022), the backward pass computes the probabilities again, so memory is linear in L.
    """

    @staticmethod
    def forward(ctx: Any, q_GHLD: Tensor, k_GKLD: Tensor, v_GKLD: Tensor, scale: float) -> Tensor:
        num, heads, length, size = q_GHLD.shape
        # The query heads that share a key head become queries of that head, one after the other.
        q = (q_GHLD * scale).reshape(-1, heads // k_GKLD.shape[1], length, size)
        k, v = k_GKLD.reshape(-1, length, size), v_GKLD.reshape(-1, length, size)
        out = torch.empty_like(q)
        for start, stop in _blocks(length):
            p = _probabilities(q, k, start, stop)
            out[:, :, start:stop] = torch.bmm(p, v[:, :stop]).view(*q.shape[:2], stop - start, size)
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return out.view(num, heads, length, size)

    @staticmethod
    def backward(ctx: Any, grad_GHLD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        num, _, length, size = grad_GHLD.shape
        grad = grad_GHLD.reshape(q.shape)
        exact = torch.promote_types(q.dtype, torch.float32)  # sums over blocks of queries, in at least fp32
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        for start, stop in _blocks(length):
            p = _probabilities(q, k, start, stop)
            grad_B = grad[:, :, start:stop].reshape(k.shape[0], -1, size)
            q_B = q[:, :, start:stop].reshape(k.shape[0], -1, size)
            grad_v[:, :stop] += torch.bmm(p.transpose(1, 2), grad_B)
            grad_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad_B, v[:, :stop].transpose(1, 2)), p, -1, p.dtype)
            grad_q[:, :, start:stop] = torch.bmm(grad_scores, k[:, :stop]).view(*q.shape[:2], stop - start, size)
            grad_k[:, :stop] += torch.bmm(grad_scores.transpose(1, 2), q_B)
        grads_k_v = (g.view(num, -1, length, size).to(q.dtype) for g in (grad_k, grad_v))
        return ((grad_q * ctx.scale).view(grad_GHLD.shape), *grads_k_v, None)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(start, stop) of each block of queries; measured: 64 is best to 512 tokens, 128 beyond."""
    size = 64 if length <= 512 else 128
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _probabilities(q_nRLD: Tensor, k_nLD: Tensor, start: int, stop: int) -> Tensor:
    """Of one block's queries (scaled) over the keys before `stop`: (n, R * B, S)."""
    rows, size = q_nRLD.shape[1], stop - start
    q_nqD = q_nRLD[:, :, start:stop].reshape(q_nRLD.shape[0], rows * size, -1)
    scores_nqS = torch.bmm(q_nqD, k_nLD[:, :stop].transpose(1, 2))
    future_BB = torch.ones(size, size, dtype=torch.bool, device=scores_nqS.device).triu_(1)
    scores_nqS.view(-1, rows, size, stop)[..., start:].masked_fill_(future_BB, float("-inf"))
    return scores_nqS.softmax(-1)


AttentionInterface.register(NAME, packed_attention)
