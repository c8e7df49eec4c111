"""The batch contract: which examples make step s, and how they are packed. Pure functions of numbers.

Step s trains on exactly the examples at positions s*B ... (s+1)*B-1 of the concatenated epoch permutations; the last step
holds the rest. Packing, micro-batches and ranks are execution details: they change neither which examples a step sees nor,
beyond rounding, its gradient.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """The order in which a run visits its examples: fixed by data set, seed, epochs and batch size alone."""

    dataset: str
    """The token store's content address."""
    num_examples: int
    epochs: int
    batch_size: int
    seed: int

    @property
    def num_steps(self) -> int:
        return -(-self.num_examples * self.epochs // self.batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch, int64[num_examples]."""
        digest = hashlib.sha256(f"{self.dataset}/{self.seed}/{epoch}".encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).permutation(self.num_examples)

    def step(self, step: int) -> np.ndarray:
        """Examples of step `step` (from 0), int64[<= batch_size]. A step may span two epochs and hold an example twice."""
        start = step * self.batch_size
        stop = min(start + self.batch_size, self.num_examples * self.epochs)
        if not 0 <= start < stop:
            raise IndexError(f"step {step} of {self.num_steps}")
        epochs = range(start // self.num_examples, (stop - 1) // self.num_examples + 1)
        visited = np.concatenate([self.permutation(e) for e in epochs])
        return visited[start - epochs[0] * self.num_examples : stop - epochs[0] * self.num_examples]


Plan = list[list[list[int]]]
"""plan[rank][m] = indices into the step's examples that make this rank's m-th micro-batch; [] = a zero-weight dummy row."""


def plan(lengths: Sequence[int], ranks: int, tokens_per_microbatch: int) -> Plan:
    """Pack examples of these lengths (tokens) into as few micro-batches as fit, as many on each rank, of even cost.

    Best fit decreasing says how many micro-batches are needed; rounded up to a multiple of `ranks`, so that no rank waits for
    another. Into that many, examples go longest first, each into the emptiest; only where that breaks the budget, the tighter first
    packing stays. An example longer than the budget gets a micro-batch of its own. Deterministic: ties are broken by index.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    tight = _best_fit(longest_first, lengths, tokens_per_microbatch)
    count = max(1, -(-len(tight) // ranks)) * ranks
    packs = _even(longest_first, lengths, tokens_per_microbatch, count) or tight + [[] for _ in range(count - len(tight))]
    return _deal(packs, lengths, ranks)


def _best_fit(longest_first: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each example into the fullest pack that still has room for it."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted: the first with enough room is the fullest that fits
    for i in longest_first:
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            packs.append([i])
            bisect.insort(room, (max(budget - lengths[i], 0), len(packs) - 1))
        else:
            free, pack = room.pop(at)
            packs[pack].append(i)
            bisect.insort(room, (free - lengths[i], pack))
    return packs


def _even(longest_first: list[int], lengths: Sequence[int], budget: int, count: int) -> list[list[int]] | None:
    """Each example into the emptiest of `count` packs; None where one would overflow."""
    packs: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, pack) for pack in range(count)]
    for i in longest_first:
        load, pack = heapq.heappop(loads)
        if packs[pack] and load + lengths[i] > budget:
            return None
        packs[pack].append(i)
        heapq.heappush(loads, (load + lengths[i], pack))
    return packs


def _deal(packs: list[list[int]], lengths: Sequence[int], ranks: int) -> Plan:
    """Costliest pack first, each to the rank with the least work that still has a place; as many to each rank."""
    out: Plan = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for load, members in sorted(((sum(lengths[i] for i in pack), pack) for pack in packs), key=lambda p: (-p[0], p[1])):
        given, rank = heapq.heappop(loads)
        out[rank].append(members)
        if len(out[rank]) < len(packs) // ranks:
            heapq.heappush(loads, (given + load, rank))
    return out
