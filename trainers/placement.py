"""How many training workers start now, and with how much of each machine: chosen from what the cluster has at that moment. Pure.

The number holds for one start. Ray Train's own range of workers counts what nodes have, not what is free, and can wait for ever beside
whatever else runs on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainers.errors import SpecError
from trainers.spec import Placement, Workers

MANY = 1024


@dataclass(frozen=True)
class Node:
    """A machine's resources as Ray counts them."""

    cpus: float = 0
    free_cpus: float = 0
    gpus: float = 0
    free_gpus: float = 0


@dataclass(frozen=True)
class Short:
    """Too little is free: how many workers there must be at least, each with one of `unit`, and what is missing, in words."""

    workers: int
    unit: Literal["GPU", "CPU"]
    reason: str


def choose(asked: Literal["auto"] | int | Workers, nodes: Sequence[Node]) -> Placement | Short:
    """Where there are GPUs, one for each worker, and `auto` takes all that are free; else one worker with all cores of the largest node.

    Raises SpecError where a cluster without GPUs has fewer cores than workers: it would wait for ever. GPUs may still come.
    """
    low, high = (1, MANY) if asked == "auto" else (asked, asked) if isinstance(asked, int) else (asked.min, asked.max)
    if gpus := int(sum(node.gpus for node in nodes)):
        free = sum(int(node.free_gpus) for node in nodes)
        if free < low:
            return Short(low, "GPU", f"{low} GPU(s) are needed, and {free} of the cluster's {gpus} are free")
        threads = int(sum(node.cpus for node in nodes)) // gpus
        return Placement(workers=min(free, high), threads_per_worker=max(1, threads), device="cuda")

    cores = [int(node.cpus) for node in nodes]
    if asked == "auto":
        return Placement(workers=1, threads_per_worker=max(1, *cores, 1))
    if low > sum(cores):
        raise SpecError(
            f"`scale.workers` is {low}, but there are {sum(cores)} CPUs.", f"Set it to {sum(cores)} or less, or to auto.", "scale.workers"
        )
    if isinstance(asked, int):  # exactly so many: what is busy now will be free
        return Placement(workers=asked, threads_per_worker=_threads(asked, cores))
    free_cores = [int(node.free_cpus) for node in nodes]
    if sum(free_cores) < low:
        return Short(low, "CPU", f"{low} CPU(s) are needed, and {sum(free_cores)} of the cluster's {sum(cores)} are free")
    workers = min(high, sum(free_cores))
    return Placement(workers=workers, threads_per_worker=_threads(workers, free_cores))


def _threads(workers: int, cores: Sequence[int]) -> int:
    """The most threads that each of so many workers can have, none of them spread over two nodes."""
    return max(t for t in range(1, max(cores) + 1) if sum(c // t for c in cores) >= workers)
