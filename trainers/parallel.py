"""Several workers: who they are, and the sum of what they found.

Every worker holds the whole model and works on its own micro-batches of the same step; gradients are summed, never averaged,
and divided once by the weight of the whole step. One collective per step carries gradients and counters together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This worker's place among its peers."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> World:
        """The process group that a launcher (Ray Train, torchrun) has set up, or a world of one."""
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo", timeout=timedelta(minutes=10))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else cls(device=device)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, on every worker, by its sum over all workers (one flat all-reduce per dtype)."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.flatten() for t in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
