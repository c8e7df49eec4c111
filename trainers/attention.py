"""Attention over packed rows: several examples in one row of tokens, none of which sees another.

A micro-batch is one row of T tokens without padding. Linear layers run on it as it is. Only attention needs to know where
examples begin: it lifts examples of similar length into a rectangle, padded on the right, and runs the plain causal kernel
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


@dataclass(frozen=True)
class Group:
    """Examples of similar length, next to each other in the row."""

    start: int
    stop: int
    """Its tokens in the row: start <= t < stop."""
    shape: tuple[int, int]
    """(G, L)."""
    lift: Tensor | None
    """int64[G * L]: the row position (from `start`) of each cell; padding cells repeat one. None where all lengths are equal."""
    drop: Tensor | None
    """int64[stop - start]: the cell of each token; the inverse of `lift`."""


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
    if lengths[-1] == longest:
        return Group(start, stop, (num, longest), None, None)
    length_G = torch.tensor(lengths)
    first_G = length_G.cumsum(0) - length_G
    column_L = torch.arange(longest)
    lift = first_G[:, None] + torch.minimum(column_L[None], length_G[:, None] - 1)
    real = column_L[None] < length_G[:, None]
    return Group(start, stop, (num, longest), lift.flatten().to(device), real.flatten().nonzero().squeeze(1).to(device))


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
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
        out_GHLD = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=gqa)
        flat = out_GHLD.transpose(1, 2).reshape(-1, *query_THD.shape[1:])
        parts.append(flat if group.drop is None else flat.index_select(0, group.drop))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _lift(x_nHD: Tensor, group: Group) -> Tensor:
    """(tokens of the group, heads, D) -> (G, heads, L, D)."""
    cells = x_nHD if group.lift is None else x_nHD.index_select(0, group.lift)
    return cells.unflatten(0, group.shape).transpose(1, 2)


AttentionInterface.register(NAME, packed_attention)
