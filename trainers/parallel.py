"""Several workers: who they are, what they share, and the sum of what they found.

Without sharding every worker holds the whole model and works on its own micro-batches of the same step; gradients are summed, never
averaged, and divided once by the weight of the whole step. With sharding (FSDP2; Zhao et al., 2023) each holds rows of every matrix, blocks
are gathered while they are computed, and gradients arrive summed and divided by the number of workers, which the loop multiplies out.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from trainers.spec import Scale

FLAT = 2**20
"""Tensors of fewer elements travel together in one collective."""


@dataclass(frozen=True)
class World:
    """This worker's place among its peers."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls) -> World:
        """The process group that a launcher (Ray Train, torchrun) has set up, or a world of one."""
        gpu = torch.cuda.is_available()
        if gpu and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(minutes=10))
        device = "cuda" if gpu else "cpu"
        return cls(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else cls(device=device)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor, on every worker, by its sum over all workers; small ones of a dtype share one collective."""
        if self.size == 1:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() >= FLAT:
                dist.all_reduce(tensor)
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for group in small.values():
            flat = torch.cat([t.flatten().to(self.device) for t in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wait_for_leader(self) -> None:
        """A barrier before which the first worker may have hours of work (preparing data); collectives give up after minutes."""
        if self.size > 1:
            dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=7)))  # type: ignore[arg-type]


def leave(code: int) -> None:
    """End a process that belongs to no launcher, where it is one of several: torch's own threads can abort a Python that shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def mesh(world: World, sharding: str) -> DeviceMesh | None:
    """Who shares weights with whom: one dimension for `full`, (copies, shards) with a node's workers as shards for `hybrid`."""
    if sharding == "none":
        return None
    if sharding == "hybrid":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return init_device_mesh(world.device, (world.size // local, local), mesh_dim_names=("copies", "shards"))
    if not dist.is_initialized():  # one worker that offloads
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(world.device, (world.size,), mesh_dim_names=("shards",))


def copies(over: DeviceMesh | None) -> int:
    """How many workers hold the same rows."""
    return over.size(0) if over is not None and over.ndim == 2 else 1


def blocks(trainee: Any) -> list[nn.Module]:
    """The decoder layers."""
    return list(trainee.body.layers)


def shard(trainee: Any, over: DeviceMesh, scale: Scale, compute: torch.dtype) -> None:
    """Shard a Trainee over `over`: each block is gathered by itself; embedding, last norm and head stay with the root.

    The root must be the module whose forward runs body and head: a head outside it would be used while it is only a shard. `compute` is
    what gathered weights are cast to; gradients are summed in fp32.
    """
    if trainee.tied:
        trainee.model.set_output_embeddings(nn.Identity())  # the head is the embedding; two names would become two tensors
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=over.device_type == "cuda") if scale.cpu_offload else OffloadPolicy()
    for block in blocks(trainee):
        fully_shard(block, mesh=over, reshard_after_forward=scale.reshard, mp_policy=policy, offload_policy=offload)
    fully_shard(trainee, mesh=over, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)


def recompute(trainee: Any, mode: str) -> None:
    """Activation checkpointing (Chen et al., 2016): `full` keeps only the input of each block, `selective` of every second one."""
    for block in {"none": [], "selective": blocks(trainee)[::2], "full": blocks(trainee)}[mode]:
        # Our noise is a hash, not a state: there is none to preserve.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
