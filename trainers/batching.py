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
    """Pack examples of these lengths (tokens) into as few micro-batches as fit, as many on each rank.

    Longest first, each into the fullest micro-batch that still has room (best fit decreasing); an example longer than the
    budget gets a micro-batch of its own. Then micro-batches go to ranks, costliest first, to the rank with the least work
    among those with the fewest micro-batches left to take. Deterministic: ties are broken by index.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted: the first one with enough room is the fullest that fits
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([i])
            bisect.insort(room, (max(tokens_per_microbatch - lengths[i], 0), len(bins) - 1))
        else:
            free, b = room.pop(at)
            bins[b].append(i)
            bisect.insort(room, (free - lengths[i], b))
    return _share(bins, lengths, ranks)


def _share(bins: list[list[int]], lengths: Sequence[int], ranks: int) -> Plan:
    """Deal micro-batches to ranks: equal counts (collectives need it), balanced cost."""
    per_rank = max(1, -(-len(bins) // ranks))
    out: Plan = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]  # (tokens given so far, rank)
    for members in sorted(bins, key=lambda b: (-sum(lengths[i] for i in b), b)):
        tokens, rank = heapq.heappop(heap)
        out[rank].append(members)
        if len(out[rank]) < per_rank:
            heapq.heappush(heap, (tokens + sum(lengths[i] for i in members), rank))
    return [mine + [[] for _ in range(per_rank - len(mine))] for mine in out]
