"""The keys and values of what is being generated, and attention over them.

Every step packs one token of each decoding row and pieces of prompts into a single row of tokens, without padding; only attention
looks at the sequences apart.

Shape legend: T tokens of a step, N decoding rows, S slots, L layers, H heads, K key/value heads, G = H / K, C capacity of a
slot in tokens, W width (the longest decoding row), D head size.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "tuneyard_slots"
CHUNK = 256
"""Tokens by which slots grow where memory is short."""


def usual_room(device: torch.device) -> int:
    """Bytes for keys and values: a quarter of a machine's memory, or half of what is free on a GPU (the old ones stay while new ones are
    copied from them)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class SlotCache:
    """Keys and values of the running rows: a slot for each row, all of one capacity.

    On a CPU the system gives memory only to pages that are written, so a slot may be far wider than its row. Elsewhere every slot takes its
    whole width.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device, max_bytes: int) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (config.num_hidden_layers, config.num_key_value_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._is_paged = device.type == "cpu"
        self._pages: list[mmap.mmap] = []
        self.bytes_per_token = 2 * math.prod(self._shape) * dtype.itemsize
        self.max_tokens = max(1, max_bytes // self.bytes_per_token // CHUNK) * CHUNK
        """Of all rows together, each counted in whole chunks."""
        self.reset()

    def reset(self) -> None:
        """Forget all rows and give back their memory."""
        self.num_slots, self.capacity = (8, CHUNK) if self._is_paged else (1, CHUNK)
        self._pages.clear()
        self.keys_LSKCD, self.values_LSKCD = self._zeros(), self._zeros()

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether there is memory for rows of these lengths beside each other."""
        chunks = list(map(in_chunks, lengths))
        return (sum(chunks) if self._is_paged else len(chunks) * max(chunks, default=0)) <= self.max_tokens

    def reserve(self, num_slots: int, capacity: int, used_slots: int, used_length: int) -> None:
        """Make room for this many slots of this many tokens, which must fit; the first `used_length` tokens of the first `used_slots`
        slots stay."""
        if num_slots <= self.num_slots and capacity <= self.capacity:
            return
        # Twice of what there was, as each growth is a copy; where that is too much, no more than is needed.
        generous = doubled(self.num_slots, num_slots), doubled(self.capacity, in_chunks(capacity))
        is_short = not self._is_paged and math.prod(generous) > self.max_tokens
        self.num_slots, self.capacity = (num_slots, in_chunks(max(capacity, used_length))) if is_short else generous
        self._pages.clear()
        for name in ("keys_LSKCD", "values_LSKCD"):
            grown, used = self._zeros(), (slice(None), slice(used_slots), slice(None), slice(used_length))
            grown[used] = getattr(self, name)[used]
            setattr(self, name, grown)

    def vacate(self, slot: int) -> None:
        """A slot's row has left: give back its memory. What is read there before it is written again are zeros."""
        num_layers, num_heads, head_dim = self._shape
        size = num_heads * self.capacity * head_dim * self._dtype.itemsize
        for pages in self._pages:
            for layer in range(num_layers):
                start = (layer * self.num_slots + slot) * size
                first, end = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE  # whole pages only
                if first < end:
                    pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot into another."""
        for cache in (self.keys_LSKCD, self.values_LSKCD):
            cache[:, target, :, :length] = cache[:, source, :, :length]

    def num_bytes(self, lengths: Sequence[int]) -> int:
        """What is taken while rows of these lengths are in it."""
        tokens = sum(map(in_chunks, lengths)) if self._is_paged else self.num_slots * self.capacity
        return tokens * self.bytes_per_token

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
        if not self._is_paged:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        pages = mmap.mmap(-1, math.prod(shape) * self._dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._pages.append(pages)
        return torch.frombuffer(pages, dtype=self._dtype).view(shape)


def in_chunks(length: int) -> int:
    """Rounded up."""
    return -(-length // CHUNK) * CHUNK


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
        self.slot_N = torch.arange(len(self.position_N), device=self.position_N.device)


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


def causal_mask(start: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Which tokens a piece of a prompt sees; None where the plain causal rule or no rule is enough."""
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril_(start) if start and length > 1 else None
