"""The keys and values of what is being generated, and attention over them.

Every step packs one token of each decoding row and pieces of prompts into a single row of tokens, without padding; only attention
looks at the sequences apart.

Shape legend: T tokens of a step, N decoding rows, S slots, L layers, H heads, K key/value heads, G = H / K, C capacity of a
slot in tokens, W width (the longest decoding row), D head size.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "tuneyard_slots"


class SlotCache:
    """Keys and values of the running rows: a slot for each row, all of one capacity, grown by doubling."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (config.num_hidden_layers, config.num_key_value_heads, head_dim)
        self._dtype = dtype
        self.bytes_per_token = 2 * math.prod(self._shape) * dtype.itemsize
        self.reset()

    def reset(self) -> None:
        """Forget all rows and give back their memory."""
        self.num_slots, self.capacity = 8, 256
        self.keys_LSKCD, self.values_LSKCD = self._zeros(), self._zeros()

    def reserve(self, num_slots: int, capacity: int, used_slots: int, used_length: int) -> None:
        """Make room for this many slots of this many tokens; the first `used_length` tokens of the first `used_slots` slots stay."""
        if num_slots <= self.num_slots and capacity <= self.capacity:
            return
        self.num_slots, self.capacity = doubled(self.num_slots, num_slots), doubled(self.capacity, capacity)
        for name in ("keys_LSKCD", "values_LSKCD"):
            grown, used = self._zeros(), (slice(None), slice(used_slots), slice(None), slice(used_length))
            grown[used] = getattr(self, name)[used]
            setattr(self, name, grown)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for cache in (self.keys_LSKCD, self.values_LSKCD):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    @property
    def num_bytes(self) -> int:
        """What keys and values would take with every slot full; the system gives memory only to what was written."""
        return self.keys_LSKCD.nbytes + self.values_LSKCD.nbytes

    def copy_out(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of the first `length` tokens of a slot, each L x K x length x D, as copies."""
        return tuple(cache[:, slot, :, :length].clone() for cache in (self.keys_LSKCD, self.values_LSKCD))  # type: ignore[return-value]

    def copy_in(self, slot: int, keys_LKTD: torch.Tensor, values_LKTD: torch.Tensor) -> None:
        """The reverse, into the beginning of a slot."""
        for cache, part in ((self.keys_LSKCD, keys_LKTD), (self.values_LSKCD, values_LKTD)):
            cache[:, slot, :, : part.shape[2]] = part

    def _zeros(self) -> torch.Tensor:
        # Zeros, because attention reads (and masks) what lies behind a row's end, and 0 * NaN is NaN. Small pages straight from
        # the system cost no memory until they are written: a slot may be far wider than its row.
        num_layers, num_heads, head_dim = self._shape
        shape = (num_layers, self.num_slots, num_heads, self.capacity, head_dim)
        pages = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(pages, dtype=self._dtype).view(shape)


def doubled(now: int, needed: int) -> int:
    return now if needed <= now else max(2 * now, needed)


@dataclass
class Segment:
    """Tokens of one row in a step that attend by themselves: a piece of a prompt, or a row too long for the common batch."""

    slot: int
    start: int
    """Tokens of the row that are in the cache already."""
    first: int
    """Where the segment's tokens begin in the step."""
    length: int
    mask: torch.Tensor | None = None
    """Needed when there is both a past and more than one token: length x (start + length), True = visible."""


@dataclass
class Step:
    """What attention must know: tokens 0..N-1 are one new token each of slots 0..N-1, the rest are segments."""

    cache: SlotCache
    position_N: torch.Tensor
    mask_N11W: torch.Tensor
    """Added to the scores: 0 inside a row, -inf behind its end."""
    segments: list[Segment]
    slot_N: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.slot_N = torch.arange(len(self.position_N))


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *, scaling: float, step: Step, **_: Any
) -> tuple[torch.Tensor, None]:
    """Store the step's keys and values (1 x K x T x D) and attend for query (1 x H x T x D) -> 1 x T x H x D."""
    keys_SKCD, values_SKCD = step.cache.keys_LSKCD[module.layer_idx], step.cache.values_LSKCD[module.layer_idx]
    q_THD, k_KTD, v_KTD = query[0].transpose(0, 1), key[0], value[0]
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv = k_KTD.shape[0]
    out_THD = query.new_empty(num_tokens, num_heads, head_dim)
    n, width = len(step.slot_N), step.mask_N11W.shape[-1]
    if n:
        keys_SKCD[step.slot_N, :, step.position_N] = k_KTD[:, :n].transpose(0, 1)
        values_SKCD[step.slot_N, :, step.position_N] = v_KTD[:, :n].transpose(0, 1)
        # The G heads that share a key/value head go in as G queries of it: no copy of the cache is made.
        q_NKGD = q_THD[:n].reshape(n, num_kv, -1, head_dim)
        o_NKGD = scaled_dot_product_attention(
            q_NKGD, keys_SKCD[:n, :, :width], values_SKCD[:n, :, :width], attn_mask=step.mask_N11W, scale=scaling
        )
        out_THD[:n] = o_NKGD.reshape(n, num_heads, head_dim)
    for s in step.segments:
        here, end = slice(s.first, s.first + s.length), s.start + s.length
        keys_SKCD[s.slot, :, s.start : end] = k_KTD[:, here]
        values_SKCD[s.slot, :, s.start : end] = v_KTD[:, here]
        o_1HTD = scaled_dot_product_attention(
            query[:, :, here],
            keys_SKCD[None, s.slot, :, :end],
            values_SKCD[None, s.slot, :, :end],
            attn_mask=s.mask,
            is_causal=s.mask is None and s.length > 1,
            scale=scaling,
            enable_gqa=True,
        )
        out_THD[here] = o_1HTD[0].transpose(0, 1)
    return out_THD[None], None


AttentionInterface.register(ATTENTION, attend)  # no mask function goes with it: the step carries its own masks


def causal_mask(start: int, length: int) -> torch.Tensor | None:
    """Which tokens a piece of a prompt sees; None where the plain causal rule or no rule is enough."""
    return torch.ones(length, start + length, dtype=torch.bool).tril_(start) if start and length > 1 else None
