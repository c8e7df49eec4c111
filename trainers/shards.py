"""What one worker holds of a tensor: all of it, or rows of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Part:
    """This worker's part of one tensor."""

    local: Tensor
    """What it holds, sharing memory with the tensor; may be empty where there are fewer rows than workers."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where `local` begins in the whole tensor, per dimension."""
    writes: bool
    """Whether this worker is the one to write it: of equal copies, one is written."""


def part(tensor: Tensor, rank: int) -> Part:
    """The part of `tensor` that the worker of this rank holds."""
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim(), rank == 0)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinates = tensor.device_mesh.get_coordinate() or ()
    copies = [c for c, placement in zip(coordinates, tensor.placements, strict=True) if placement.is_replicate()]
    local = tensor.detach().to_local()  # type: ignore[attr-defined]
    return Part(local, tuple(tensor.shape), tuple(offset), not any(copies) and local.numel() > 0)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every worker; a collective where it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, rows: Tensor, rank: int) -> None:
    """Set a tensor to `rows`, the whole of its values, of which each worker takes its part."""
    mine = part(tensor, rank)
    with torch.no_grad():
        mine.local.copy_(rows[tuple(slice(o, o + n) for o, n in zip(mine.offset, mine.local.shape, strict=True))])
