"""Attention over packed rows: several examples in one row of tokens, none of which sees another.

A micro-batch is one row of T tokens without padding. Linear layers run on it as it is. Only attention needs to know where
examples begin: it lifts examples of similar length into a rectangle, padded on the right, and runs plain causal attention
on that. With causal attention no real token ever looks at the padding behind it, so no mask exists at all, and nothing can leak.

Registered with transformers under the name "packed"; reaches every layer as the keyword argument `packing` of the model's
forward. Shape letters: T tokens of the row, H query heads, K key heads, D head size, G examples of a group, L longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAME = "packed"
SHORT = 128
"""Longest example, in tokens, whose attention is written out on a CPU."""


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
    future: Tensor | None
    """bool[L, L], true where the key comes after the query; only of groups that take the short way."""


@dataclass(frozen=True)
class Packing:
    """Where the examples of one row lie."""

    groups: tuple[Group, ...]
    position_ids: Tensor
    """int64[1, T]: position of each token in its own example."""


def pack(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
    """Lay out examples of these lengths (longest first, so that neighbours are alike) in one row."""
    if list(lengths) != sorted(lengths, reverse=True):
        raise ValueError("examples of a row are packed longest first")
    groups: list[Group] = []
    start = first = 0
    for i in range(1, len(lengths) + 1):
        # At most half of a rectangle's width is padding, except among short examples, where one kernel call beats the waste.
        if i < len(lengths) and (2 * lengths[i] >= lengths[first] or lengths[first] <= 128):
            continue
        groups.append(_group(start, lengths[first:i], device))
        start, first = groups[-1].stop, i
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Packing(tuple(groups), positions[None].to(device))


def _group(start: int, lengths: Sequence[int], device: torch.device | str) -> Group:
    num, longest = len(lengths), lengths[0]
    stop = start + sum(lengths)
    real_GL = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    cell = None if lengths[-1] == longest else real_GL.flatten().nonzero().squeeze(1).to(device)
    short = longest <= SHORT and torch.device(device).type == "cpu"
    future = torch.ones(longest, longest, dtype=torch.bool).triu_(1) if short else None
    return Group(start, stop, (num, longest), cell, future)


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: returns (1, T, H, D) and no attention weights."""
    if packing is None or attention_mask is not None:
        raise ValueError("packed attention takes `packing` and no mask")
    query_THD, key_TKD, value_TKD = (x.transpose(1, 2)[0] for x in (query_1HTD, key_1KTD, value_1KTD))
    gqa = query_THD.shape[1] != key_TKD.shape[1]
    parts = []
    for group in packing.groups:
        q, k, v = (_lift(x[group.start : group.stop], group) for x in (query_THD, key_TKD, value_TKD))
        if group.future is not None:
            out_GHLD = _short_attention(q, k, v, group.future, scaling or q.shape[-1] ** -0.5)
        else:
            out_GHLD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        flat = out_GHLD.transpose(1, 2).reshape(-1, *query_THD.shape[1:])
        parts.append(flat if group.cell is None else flat.index_select(0, group.cell))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _lift(x_nHD: Tensor, group: Group) -> Tensor:
    """(tokens of the group, heads, D) -> (G, heads, L, D), zeros where the rectangle has padding."""
    if group.cell is not None:
        x_nHD = x_nHD.new_zeros(group.shape[0] * group.shape[1], *x_nHD.shape[1:]).index_copy(0, group.cell, x_nHD)
    return x_nHD.unflatten(0, group.shape).transpose(1, 2)


def _short_attention(q_GHLD: Tensor, k_GKLD: Tensor, v_GKLD: Tensor, future_LL: Tensor, scaling: float) -> Tensor:
    """Causal attention written out: the CPU's flash kernel takes three times as long for short examples."""
    num_groups, num_heads, length, size = q_GHLD.shape
    # The query heads that share a key head become queries of that head, one after the other.
    q_GKRD = (q_GHLD * scaling).reshape(num_groups, k_GKLD.shape[1], -1, size)
    scores_GKRL = q_GKRD @ k_GKLD.transpose(-1, -2)
    scores_GKRL = scores_GKRL.masked_fill(future_LL.repeat(q_GKRD.shape[2] // length, 1), float("-inf"))
    return (scores_GKRL.softmax(-1) @ v_GKLD).view(num_groups, num_heads, length, size)


AttentionInterface.register(NAME, packed_attention)
