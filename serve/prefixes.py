"""Keys and values of prompts and answers that were read before: who begins the same need not be read again.

A request takes over the longest beginning that it shares with something kept, token by token, under the same adapter. So a system
prompt is read once, and a conversation's next turn reads only what is new. The keys and values are copies: nothing is shared
between what runs, and what is kept can be dropped at any time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

SHORTEST = 16
"""Tokens; fewer are read again as quickly as they are looked for."""
MOST_ENTRIES = 128
"""Each look-up compares with all that begin alike."""


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two rows of ids."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


@dataclass(frozen=True)
class Prefix:
    """A sequence that was read, and what attention needs of it."""

    adapter: int | None
    """Which load of which adapter read it; None = the bare base."""
    ids: np.ndarray
    keys_LKTD: torch.Tensor
    values_LKTD: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.ids.nbytes + self.keys_LKTD.nbytes + self.values_LKTD.nbytes


class PrefixStore:
    """The sequences kept, least recently used first, within a number of bytes. One thread uses it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._numbers = count()

    def wants(self, adapter: int | None, ids: np.ndarray, bytes_per_token: int) -> bool:
        """Whether a sequence is worth copying: long enough, not too large, and not all there already."""
        if len(ids) < SHORTEST or len(ids) * bytes_per_token > self.max_bytes:
            return False
        _, length = self.find(adapter, ids)
        return length < len(ids)

    def keep(self, prefix: Prefix) -> None:
        """Keep a sequence; those that it continues leave, as do the least recently used where there is no room."""
        for number, other in list(self._kept.items()):
            if other.adapter == prefix.adapter and shared(other.ids, prefix.ids) == len(other.ids):
                self._drop(number)
        self._kept[next(self._numbers)] = prefix
        self.num_bytes += prefix.num_bytes
        while self.num_bytes > self.max_bytes or len(self._kept) > MOST_ENTRIES:
            self._drop(next(iter(self._kept)))

    def find(self, adapter: int | None, ids: np.ndarray) -> tuple[Prefix | None, int]:
        """What shares the longest beginning with these ids, and its length; (None, 0) if nothing shares enough."""
        best, longest = None, SHORTEST - 1
        for number, prefix in self._kept.items():
            if prefix.adapter == adapter and (length := shared(prefix.ids, ids)) > longest:
                best, longest = number, length
        if best is None:
            return None, 0
        self._kept.move_to_end(best)
        return self._kept[best], longest

    def _drop(self, number: int) -> None:
        self.num_bytes -= self._kept.pop(number).num_bytes
