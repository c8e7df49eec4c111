"""What meets in a model in training: the model, what of it is trained, the optimizer, and how workers share all that.

    build -> for every step: zero, forward and backward on micro-batches, reduce, update

Weights stream from the base's files into place: a plain tensor, or this worker's rows of one (see trainers.weights). What is trained has a
master, which the optimizer owns and checkpoints hold. It is the parameter itself, or, where blocks compute in bf16 with unsharded fp32
masters, a copy of it; gradients then add up in fp32 beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainers import methods, model, optim, parallel, shards, weights
from trainers.errors import ModelError
from trainers.loss import Objective
from trainers.parallel import World
from trainers.spec import JobSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Learner:
    """One worker's part of a model in training. All workers build theirs with the same arguments, and call the same methods in step."""

    def __init__(self, spec: JobSpec, trainee: model.Trainee, world: World, over: DeviceMesh | None) -> None:
        self.spec, self.trainee, self.world, self.over = spec, trainee, world, over
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in trainee.model.named_parameters() if p.requires_grad}
        """What is trained, by name, in a fixed order; DTensors where sharded."""
        self.masters: dict[str, Tensor] = {n: self._master(p) for n, p in self.parameters.items()}
        """What the optimizer owns, by the same names."""
        self.optimizer: torch.optim.Optimizer

    @classmethod
    def build(cls, spec: JobSpec, model_dir: Path, world: World) -> Learner:
        """Load `model_dir` and make it trainable as the (resolved) spec says. Raises ModelError, SpecError."""
        compute = DTYPES[spec.scale.precision]
        over = parallel.mesh(world, spec.scale.sharding)
        bare = model.skeleton(model_dir, _stored(spec, compute, over is not None))
        method = methods.of(spec.method)
        method.apply(bare, spec.method)
        trainee = model.Trainee(bare, Objective(spec.optim.label_smoothing, spec.optim.z_loss), spec.optim.neftune_alpha)
        parallel.recompute(trainee, spec.scale.activation_checkpointing)
        if over is not None:
            parallel.shard(trainee, over, spec.scale, compute)
        weights.materialise(trainee, "cpu" if spec.scale.cpu_offload else world.device)
        if over is None and trainee.tied:
            bare.tie_weights()
        learner = cls(spec, trainee, world, over)
        learner._read(model_dir)
        method.initialise(bare, spec.method, spec.optim.seed, world.rank)
        learner.optimizer = optim.build(learner.masters, spec.optim, spec.scale.master, spec.optim.seed)
        return learner

    def _master(self, parameter: nn.Parameter) -> Tensor:
        if self.spec.scale.master == "bf16" or parameter.dtype != torch.bfloat16:
            return parameter
        return torch.empty_like(parameter, dtype=torch.float32)

    def _read(self, folder: Path) -> None:
        """The base's weights: into the parameters, and what is trained into its masters at the files' own precision."""
        parameters, takers = weights.targets_of(self.trainee.model)
        masters = {name.replace(".base.", "."): m for name, m in self.masters.items()}
        targets = {n: [p, *([masters[n]] if n in masters and masters[n] is not p else [])] for n, p in parameters.items()}
        weights.read(folder, targets, takers, self.world.rank)

    # -- one step ------------------------------------------------------------------------------------------------------

    def zero(self) -> None:
        """Begin a step: no gradients."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if isinstance(parameter, DTensor):
                parameter.grad = None  # FSDP2 puts it there, summed
            elif master.grad is None:
                master.grad = torch.zeros_like(master)
                if master is not parameter:
                    parameter.register_post_accumulate_grad_hook(_add_to(master))
            else:
                master.grad.zero_()

    def gradients(self) -> list[Tensor]:
        """This worker's gradients of the masters: whole ones, or its rows."""
        found = (self.masters[name].grad for name in self.parameters)
        return [g.to_local() if isinstance(g, DTensor) else g for g in found if g is not None]

    def reduce(self, totals: Tensor) -> None:
        """Sum gradients and `totals` (fp64 on the CPU) over all workers; sharded gradients were summed in the backward pass."""
        self.world.sum_([totals] if self.over is not None else [*self.gradients(), totals])

    def scale(self, weight: float, max_norm: float) -> float:
        """Divide gradients by the step's weight and clip them to a global norm; the norm before clipping."""
        gradients = self.gradients()
        # FSDP2 divides by the number of workers.
        factor = (self.world.size if self.over is not None else 1) / weight
        norms = torch._foreach_norm(gradients) if gradients else []  # type: ignore[attr-defined]
        square = torch.stack([n.double() for n in norms]).square().sum().cpu() if norms else torch.zeros((), dtype=torch.float64)
        if self.over is not None:
            self.world.sum_([square])
            square /= parallel.copies(self.over)
        norm = math.sqrt(square.item()) * factor if math.isfinite(square.item()) else math.inf
        if norm > max_norm:
            factor *= max_norm / norm
        if gradients and math.isfinite(factor):
            torch._foreach_mul_(gradients, factor)  # type: ignore[attr-defined]
        return norm

    def update(self, rate: float) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.loaded()

    # -- state ---------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Live references to all that a checkpoint holds: `model.{name}` and `optimizer.{name}.{slot}`."""
        slots = optim.state(self.optimizer, self.masters)
        return {f"model.{n}": m.detach() for n, m in self.masters.items()} | {f"optimizer.{n}": s for n, s in slots.items()}

    @torch.no_grad()
    def loaded(self) -> None:
        """Masters have changed: what computes follows."""
        for module in self.trainee.modules() if self.over is not None else ():
            if isinstance(module, FSDPModule):  # weights that are still gathered, from a pass without gradients, are those before
                module.reshard()
        pairs = [(p, self.masters[n]) for n, p in self.parameters.items() if self.masters[n] is not p]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])  # type: ignore[attr-defined]

    def learned(self) -> dict[str, Tensor]:
        """Copies of all that is trained, whole and on the CPU; a collective, of which only the leader keeps anything."""
        out = {}
        for name, master in self.masters.items():
            tensor = shards.whole(master)
            if self.world.rank == 0:
                out[name] = tensor.to("cpu", copy=True)
        return out

    # -- what is told --------------------------------------------------------------------------------------------------

    def line(self) -> str:
        """What is trained, how, and by whom, in one line."""
        scale, count = self.spec.scale, sum(p.numel() for p in self.parameters.values())
        total = sum(p.numel() for p in self.trainee.model.parameters())
        what = methods.of(self.spec.method).line(self.trainee.model, self.spec.method)
        told = [f"{count:,} of {total:,} parameters ({count / total:.2%}): {what}", f"{scale.precision}, masters in {scale.master}"]
        if self.over is not None:
            told.append(f"sharded over {self.world.size // parallel.copies(self.over)} worker(s)")
        if scale.activation_checkpointing != "none":
            told.append(f"{scale.activation_checkpointing} activation checkpointing")
        return "; ".join(told)

    # -- checks and speed ----------------------------------------------------------------------------------------------

    def compile(self, backend: Any = "inductor") -> None:
        """torch.compile for each block by itself: blocks are alike, so one graph serves all."""
        torch._dynamo.config.recompile_limit = 64  # layers of several shapes, with and without gradients, share code objects
        for block in parallel.blocks(self.trainee):
            block.compile(dynamic=True, backend=backend)

    def uncompile(self) -> None:
        for block in parallel.blocks(self.trainee):
            block._compiled_call_impl = None

    @torch.no_grad()
    def probe(self) -> None:
        """Refuse to train where examples of one row see each other, or where the model gives no numbers: nothing later would tell.

        Two short examples in one row, and each alone: the loss of each must be the same. Raises ModelError.
        """
        vocabulary = self.trainee.head_VE.shape[0]
        rng = np.random.default_rng(0)
        first, second = (
            (rng.integers(0, vocabulary, n).astype(np.int32), np.r_[np.zeros(1), np.ones(n - 1)].astype(np.float32)) for n in (12, 8)
        )
        together, *alone = (self._loss(pack) for pack in ([first, second], [first], [second]))
        tolerance = 0.02 if self.spec.scale.precision == "bf16" else 1e-4
        if not abs(together - sum(alone)) <= tolerance * sum(alone):
            raise ModelError(
                f"Packed examples see each other: their loss is {together:.5g} in one row, {sum(alone):.5g} apart.",
                "This is a fault of the installed transformers or torch: install the versions in constraints.txt.",
            )

    def _loss(self, examples: list[model.Example]) -> float:
        result: Any = self.trainee(model.collate(examples, self.world.device))
        return float(result[0])


def _stored(spec: JobSpec, compute: torch.dtype, sharded: bool) -> torch.dtype:
    """What the base's parameters are kept in: sharded full fine-tuning shards its fp32 masters, which are cast as they are gathered."""
    full_masters = spec.method.type == "full" and spec.scale.master == "fp32"
    return torch.float32 if sharded and full_masters else compute


def _add_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to its master's and frees it, so that sums over micro-batches are in fp32."""

    def hook(parameter: Tensor) -> None:
        assert master.grad is not None and parameter.grad is not None
        master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
