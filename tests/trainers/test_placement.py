"""World sizes from free resources, as a table."""

from __future__ import annotations

import pytest

from trainers.errors import SpecError
from trainers.placement import Node, Short, choose
from trainers.spec import Placement, Workers

LAPTOP = [Node(cpus=8, free_cpus=8)]
BUSY = [Node(cpus=8, free_cpus=3)]
PAIR = [Node(cpus=4, free_cpus=4), Node(cpus=6, free_cpus=6)]
GPUS = [Node(cpus=16, free_cpus=16, gpus=4, free_gpus=4), Node(cpus=16, free_cpus=16, gpus=4, free_gpus=1)]
TAKEN = [Node(cpus=16, gpus=4, free_gpus=0.5)]

CHOSEN = [
    ("CPU: one worker, all cores", "auto", LAPTOP, (1, 8, "cpu")),
    ("CPU: busy now, free later", "auto", BUSY, (1, 8, "cpu")),
    ("CPU: the largest node", "auto", PAIR, (1, 6, "cpu")),
    ("CPU: as many as asked", 3, LAPTOP, (3, 2, "cpu")),
    ("CPU: no worker on two nodes", 3, PAIR, (3, 3, "cpu")),
    ("CPU: bounds, all free", Workers(min=1, max=4), LAPTOP, (4, 2, "cpu")),
    ("CPU: bounds, some free", Workers(min=1, max=4), BUSY, (3, 1, "cpu")),
    ("GPU: all that are free", "auto", GPUS, (5, 4, "cuda")),
    ("GPU: as many as asked", 2, GPUS, (2, 4, "cuda")),
    ("GPU: bounds", Workers(min=2, max=4), GPUS, (4, 4, "cuda")),
    ("GPU: fewer than the most", Workers(min=2, max=8), GPUS, (5, 4, "cuda")),
]


@pytest.mark.parametrize(("asked", "nodes", "chosen"), [row[1:] for row in CHOSEN], ids=[row[0] for row in CHOSEN])
def test_chosen(asked: int | Workers, nodes: list[Node], chosen: tuple[int, int, str]) -> None:
    workers, threads, device = chosen
    assert choose(asked, nodes) == Placement(workers=workers, threads_per_worker=threads, device=device)  # type: ignore[arg-type]


def test_too_little_is_free() -> None:
    assert choose(6, GPUS) == Short(6, "GPU", "6 GPU(s) are needed, and 5 of the cluster's 8 are free")
    assert choose("auto", TAKEN) == Short(1, "GPU", "1 GPU(s) are needed, and 0 of the cluster's 4 are free")
    assert choose(Workers(min=9, max=16), GPUS) == Short(9, "GPU", "9 GPU(s) are needed, and 5 of the cluster's 8 are free")
    assert choose(Workers(min=4, max=8), BUSY) == Short(4, "CPU", "4 CPU(s) are needed, and 3 of the cluster's 8 are free")


@pytest.mark.parametrize("asked", [9, Workers(min=9, max=10)])
def test_more_workers_than_cores_would_wait_for_ever(asked: int | Workers) -> None:
    with pytest.raises(SpecError, match="is 9, but there are 8 CPUs"):
        choose(asked, LAPTOP)
