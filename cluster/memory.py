"""How much memory a training worker needs, by component, before anything runs. Pure arithmetic: no torch, no Ray, no download.

    python -m cluster.memory JOB.yaml [--workers N] [--gpu-memory GIB]

A step is followed through the moments at which memory peaks: the first block of the forward pass, its end in the loss, the backward pass
of a block, that of the embedding, the update. The largest of them is what a worker needs. The terms are those of our own loop under FSDP2;
`tests/numerics/test_70b.py` holds them, component by component, to a simulation of that loop. Activations are those of uncompiled blocks:
torch.compile keeps fewer, so a compiled run needs less than is said here.

Shape letters: E hidden size, F intermediate size, Q width of all query heads, K width of all key heads, V vocabulary, L layers,
T tokens of a micro-batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.shape import ModelShape
from trainers import resolve
from trainers.catalogue import Base, find_any
from trainers.errors import SpecError, TuneyardError
from trainers.spec import Adapter, Full, JobSpec, Lora, Optim, Placement, QLora, Scale

GIB = 2**30
Device = Literal["cpu", "cuda"]
PROCESS = {"cuda": int(0.8 * GIB), "cpu": GIB}
"""A CUDA context, cuBLAS' workspaces and kernels; on CPUs the interpreter with torch, and what malloc keeps."""
COMMUNICATION = {"cuda": GIB, "cpu": 0}
"""NCCL's buffers, where there are several workers."""
LOGIT_BYTES = {"cuda": 512 * 2**20, "cpu": 24 * 2**20}
"""As in trainers/loss.py: fp32 logits of one chunk."""
UPDATED_AT_ONCE = {"cuda": 2**26, "cpu": 2**16}
"""As in trainers/adam_bf16.py: elements."""
COMPONENTS = ("weights", "masters", "adapters", "gradients", "optimizer", "gathered", "unreduced", "activations", "head", "fixed")
"""`gathered`: blocks and root made whole by FSDP2; `unreduced`: gradients before they are summed over the workers; `head`: logits, and the
gradients that the loss makes; `fixed`: what CUDA and NCCL take."""
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill: the allocator loses some between the tensors."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Memory:
    """What one worker needs, in bytes."""

    moments: dict[str, dict[str, int]]
    """Moment of a step -> component -> bytes."""
    host: dict[str, int] = field(default_factory=dict)
    """Component -> bytes of its node's memory beside them, on GPUs."""
    bytes_per_weight: float = 0.0
    """Weights, masters, gradients and optimizer state of the whole job (of one copy of them), per weight of the model."""

    @property
    def moment(self) -> str:
        """When memory is at its highest."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def components(self) -> dict[str, int]:
        """What it then consists of."""
        return self.moments[self.moment]

    @property
    def peaks(self) -> dict[str, int]:
        """The most that each component ever takes; not all at the same moment."""
        names = dict.fromkeys(name for parts in self.moments.values() for name in parts)
        return {name: max(parts.get(name, 0) for parts in self.moments.values()) for name in names}

    @property
    def total(self) -> int:
        return sum(self.components.values())

    def fits(self, limit_bytes: float) -> bool:
        """Whether a GPU of this much memory is enough, with what its allocator loses between the tensors."""
        return self.total <= USABLE * limit_bytes

    def __str__(self) -> str:
        rows = [(name, size, self.peaks[name]) for name, size in self.components.items() if self.peaks[name]]
        lines = [f"{'GiB per worker':<22}{'at the peak':>12}{'at most':>10}"]
        lines += [f"{name:<22}{size / GIB:12.2f}{peak / GIB:10.2f}" for name, size, peak in rows]
        lines += [f"{'total':<22}{self.total / GIB:12.2f}   ({self.moment})"]
        if self.host:
            lines += [f"{'in its node':<22}{sum(self.host.values()) / GIB:12.2f}   ({', '.join(self.host)})"]
        return "\n".join([*lines, f"{self.bytes_per_weight:.3g} bytes a weight in weights, masters, gradients and optimizer state"])


def estimate(
    shape: ModelShape,
    method: Lora | QLora | Full,
    optim: Optim,
    scale: Scale,
    workers: int,
    gpus_per_node: int = GPUS_PER_NODE,
    device: Device = "cuda",
) -> Memory:
    """Memory of one of `workers` workers, each micro-batch full and all its tokens supervised.

    `scale` is resolved (no `auto`). Raises SpecError where it is not, or where four-bit weights or 8-bit moments are to be sharded.
    """
    if "auto" in (scale.tokens_per_microbatch, scale.sharding, scale.activation_checkpointing):
        raise SpecError("`scale` still holds `auto`.", "Resolve the spec first (trainers/resolve.py).", "scale")
    plan = _Plan(shape, method, optim, scale, workers, gpus_per_node, device)
    return Memory(plan.moments(), plan.host(), plan.bytes_per_weight())


@dataclass(frozen=True)
class _Plan:
    shape: ModelShape
    method: Lora | QLora | Full
    optim: Optim
    scale: Scale
    workers: int
    gpus_per_node: int
    device: Device

    @property
    def compute(self) -> int:
        """Bytes of a number in the forward and backward pass."""
        return 2 if self.scale.precision == "bf16" else 4

    @property
    def sharded(self) -> bool:
        return self.scale.sharding != "none"

    @property
    def shards(self) -> int:
        """How many workers share one copy."""
        return {"none": 1, "full": self.workers, "hybrid": min(self.workers, self.gpus_per_node)}[str(self.scale.sharding)]

    @property
    def tokens(self) -> int:
        return int(self.scale.tokens_per_microbatch)

    # -- what stays from step to step ----------------------------------------------------------------------------------

    def targets(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a block's layers that have an adapter."""
        if isinstance(self.method, Full):
            return []
        wanted = self.method.targets
        return [size for name, size in self.shape.linears.items() if wanted == "all-linear" or name in wanted]

    def adapters(self) -> int:
        """Numbers in the adapters of one block; each matrix with rows to spare where they do not go evenly among the shards."""
        if isinstance(self.method, Full):
            return 0
        r, dora = self.method.r, isinstance(self.method, Lora) and self.method.dora

        def padded(rows: int) -> int:
            return -(-rows // self.shards) * self.shards

        return sum(padded(r) * i + padded(o) * (r + (1 if dora else 0)) for i, o in self.targets())

    def trained(self) -> int:
        """Numbers that are trained, in the whole model."""
        return self.shape.total if isinstance(self.method, Full) else self.shape.layers * self.adapters()

    def base_bytes(self) -> float:
        """Weights of the base as they are kept, in the whole model."""
        master = {"fp32": 4, "bf16": 2}[self.scale.master]
        if isinstance(self.method, Full):
            return self.shape.total * (master if self.sharded else self.compute)
        if isinstance(self.method, QLora):
            packed = self.shape.layers * self.shape.linear
            return packed * nf4_bytes(self.method.double_quant) + (self.shape.total - packed) * self.compute
        return self.shape.total * self.compute

    def resident(self) -> dict[str, float]:
        """Component -> bytes of all shards together."""
        full = isinstance(self.method, Full)
        master = 2 if full and self.scale.master == "bf16" else 4
        num = self.trained()
        own_copy = full and not self.sharded and master > self.compute
        return {
            "weights": self.base_bytes(),
            "masters": num * master if own_copy else 0,
            "adapters": 0 if full else num * 4,
            "gradients": num * master,
            "optimizer": num * (2 + 8 / 256 if self.optim.type == "adamw8bit" else 2 * master),
        }

    def bytes_per_weight(self) -> float:
        return sum(self.resident().values()) / self.shape.total

    def host(self) -> dict[str, int]:
        """What a worker holds in its node's memory: with offload all that stays; always the copy from which a checkpoint is written."""
        resident = self.resident()
        kept = {name: int(size / self.shards) for name, size in resident.items() if size and self.scale.cpu_offload}
        trained = resident["masters"] or (resident["weights"] if isinstance(self.method, Full) else resident["adapters"])
        return {**kept, "checkpoint": int((trained + resident["optimizer"]) / self.shards)}

    # -- what comes and goes in a step ---------------------------------------------------------------------------------

    def kept(self) -> int:
        """Bytes of activations that all blocks keep for the backward pass, per token."""
        layers = self.shape.layers
        again = {"none": 0, "selective": layers - layers // 2, "full": layers}[str(self.scale.activation_checkpointing)]
        needless = 0 if again or isinstance(self.method, Full) else 4 * self.shape.hidden  # frozen embeddings need no gradient
        return again * self.compute * self.shape.hidden + (layers - again) * self.saved() - needless

    def saved(self) -> int:
        """Bytes that autograd saves of one block when nothing is computed again, per token.

        A norm: its input in fp32, the normalised input where its weight is trained, its output. Attention: queries, keys, values, its
        output (which is the input of o_proj) and a log-sum per head. The MLP: gate, silu(gate), up, their product.
        """
        c, s = self.compute, self.shape
        full = isinstance(self.method, Full)
        norms = 2 * ((4 + (2 if full else 1) * c) * s.hidden + 4)
        attention = c * (2 * s.query + 2 * s.key) + 4 * s.heads
        return norms + attention + 4 * c * s.intermediate + self.low_rank()

    def low_rank(self) -> int:
        """Between an adapter's matrices; with dropout its input after it, and what it dropped; with DoRA the output before its scale."""
        if isinstance(self.method, Full):
            return 0
        dora = isinstance(self.method, Lora) and self.method.dora
        return self.compute * sum(self.method.r + (2 * i if self.method.dropout else 0) + (o if dora else 0) for i, o in self.targets())

    def head(self) -> int:
        """Bytes of the loss at its highest: a chunk's logits, the gradients of hidden states and head, and what is added to the latter."""
        c, s = self.compute, self.shape
        weight = s.vocab * s.hidden if isinstance(self.method, Full) else 0
        rows = max(1, min(self.tokens, LOGIT_BYTES[self.device] // (4 * s.vocab)))
        chunk = rows * s.vocab * (c + 4)
        return chunk + c * self.tokens * s.hidden + (4 + c) * weight

    def moments(self) -> dict[str, dict[str, int]]:
        """Each moment at which memory may be at its highest."""
        c, s, t = self.compute, self.shape, self.tokens
        full = isinstance(self.method, Full)
        stays = {name: 0.0 if self.scale.cpu_offload else size / self.shards for name, size in self.resident().items()}
        fixed = PROCESS[self.device] + (COMMUNICATION[self.device] if self.workers > 1 else 0)

        block, root = (c * (s.block + self.adapters()), c * s.root) if self.sharded else (0, 0)
        buffer = 1 if self.shards > 1 else 0  # what NCCL gathers into, from where weights are copied into place
        others = 0 if self.scale.reshard else s.layers - 1  # blocks that stay gathered after their forward pass

        trained, trained_root = (s.block, s.root) if full else (self.adapters(), 0)
        summed = 4 if self.sharded else 0  # FSDP2 copies a group's gradients into one fp32 buffer
        head_grad = c * s.vocab * s.hidden if full else 0
        tied = head_grad if s.tied else 0  # autograd keeps it until the embedding's is there, to add it
        alone = head_grad if self.sharded and not s.tied else 0  # FSDP2 keeps it until the whole root's are there
        largest = c * max(i * o for i, o in self.shape.linears.values()) if full else 0
        # The sums of a group, in fp32 and as they are kept, before they are added to those of earlier micro-batches.
        new = (4 + (2 if full and self.scale.master == "bf16" else 0)) / self.shards if self.sharded else 0
        copied = s.layers * trained if self.scale.sharding == "hybrid" else 0  # held until nodes have summed them, too

        mode = str(self.scale.activation_checkpointing)
        kept, embedded = self.kept() * t, c * s.hidden * t
        last_again = mode == "full" or (mode == "selective" and s.layers % 2 == 1)  # of every second block, the first is one
        last = embedded if last_again else self.saved() * t  # of `kept`, the last block's
        work_last, work = self.at_work(last_again), self.at_work(mode != "none")
        forward = c * (3 * s.intermediate + 2 * s.hidden) if last_again else self.saved()
        norm = (4 + (c if full else 0)) * s.hidden * t

        def moment(gathered: float, activations: float, head: float = 0, unreduced: float = 0, **more: float) -> dict[str, int]:
            parts = stays | {"gathered": gathered, "activations": activations, "head": head, "unreduced": unreduced, "fixed": fixed}
            return {name: int(parts[name] + more.get(name, 0)) for name in COMPONENTS}

        again = 0 if mode == "full" else embedded  # the embeddings, which are a block's input where that is kept
        whole = root + (buffer + others + (others > 0)) * block  # after the forward pass
        two = root + (1 + max(buffer, others)) * block  # a block and the next, gathered early
        waiting = alone + (largest if self.sharded else 0)  # one by one without FSDP2: at_work
        sums = (c + summed) * trained if self.sharded else 0
        early = min(kept - last, 2 * kept / s.layers)  # of `kept`, the first two blocks'; by then hybrid holds the sums of all others

        return {
            "forward pass begins": moment((1 + buffer) * (root + block), embedded),
            "last block gathered": moment(root + (1 + 2 * buffer + others) * block, kept - last + embedded),
            "forward of the last block": moment(root + (1 + buffer + others) * block, kept - last + forward * t),
            "loss": moment(whole, kept + norm + 2 * embedded + again, self.head()),
            "backward of the last norm": moment(whole, kept + 24 * s.hidden * t, tied, alone),
            "backward of the last block": moment(two, kept + work_last, tied, waiting),
            "backward of a block": moment(two, kept - last + work, tied, waiting + summed * trained),
            "backward of the second block": moment(
                two, early + work, tied, waiting + summed * trained, gradients=new * copied * max(0, s.layers - 2) / s.layers
            ),
            "backward of a block's first norm": moment(two, kept - last + embedded + 24 * s.hidden * t, tied, alone + sums),
            "gradients of a block": moment(two - block, kept - last + embedded, tied, alone + sums, gradients=new * trained),
            "gradients of the root": moment(
                0,
                embedded + (0 if self.sharded else head_grad),
                0 if self.sharded else tied,
                (c + summed) * trained_root if self.sharded else 0,
                gradients=new * (copied + trained_root),
            ),
            "update": moment(0, 0, optimizer=self.scratch()),
        }

    def at_work(self, again: bool) -> int:
        """Bytes of a block's backward pass beyond what it kept: what it computes `again`, and gradients of activations."""
        c, s = self.compute, self.shape
        gradients = self.tokens * c * (2 * s.intermediate + s.hidden)
        matrix = max(i * o for i, o in s.linears.values())
        if isinstance(self.method, QLora) or (isinstance(self.method, Full) and not self.sharded):
            # One at a time: the weight out of its four bits, or its gradient.
            gradients = max(gradients, self.tokens * c * (s.intermediate + s.hidden) + c * matrix)
        if isinstance(self.method, Lora) and self.method.dora:  # the norms of its rows: in fp32, and squared
            gradients = max(gradients, 8 * matrix)
        return gradients + (self.tokens * self.saved() if again else 0)

    def scratch(self) -> int:
        """fp32 copies with which bf16 masters are updated (trainers/adam_bf16.py)."""
        if not (isinstance(self.method, Full) and self.scale.master == "bf16"):
            return 0
        tensor = max(self.shape.vocab * self.shape.hidden, *(i * o for i, o in self.shape.linears.values())) // self.shards
        return 7 * 4 * min(UPDATED_AT_ONCE[self.device], tensor)


def nf4_bytes(double_quant: bool) -> float:
    """Bytes of a weight in four bits: half a byte, and its share of the scales (64 weights each; 256 scales each)."""
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)


def suggest(
    shape: ModelShape, spec: JobSpec, limit_bytes: float, workers: int, gpus_per_node: int = GPUS_PER_NODE, device: Device = "cuda"
) -> list[str]:
    """Which plans would fit a job that does not, each in one line with its numbers, the least harmful first.

    `spec` is resolved. First come plans that cost time or machines only (fewer tokens at once, recomputation, sharding, offload, more
    workers); where none of them does with the workers there are, also those that change the arithmetic (8-bit moments, bf16 masters,
    four-bit weights). Where nothing fits, one line says so and names the smallest plan.
    """

    def of(plan: _Change) -> Memory:
        changed = _changed(spec, plan.keys)
        return estimate(shape, changed.method, changed.optim, changed.scale, plan.workers, gpus_per_node, device)

    def need(plan: _Change) -> int:
        return of(plan).total

    def say(plan: _Change) -> str:
        told = [f"`{key}` {str(value).lower() if isinstance(value, bool) else value}" for key, value in plan.keys.items()]
        told += [f"{plan.workers} workers"] if plan.workers != workers else []
        host = sum(of(plan).host.values()) if plan.keys.get("scale.cpu_offload") else 0
        more = f", and {host / GIB:.0f} GiB of its node's memory" if host else ""
        return f"{', '.join(told)}: {need(plan) / GIB:.1f} GiB per worker{more}"

    def fitting(kinds: list[list[_Change]]) -> list[_Change]:
        candidates = (next((plan for plan in kind if need(plan) <= USABLE * limit_bytes), None) for kind in kinds)
        return [plan for plan in candidates if plan is not None]

    harmless, changing = _plans(spec, workers)
    found = fitting(harmless)
    if not any(plan.workers == workers for plan in found):
        found += fitting(changing)
    if found:
        return [say(plan) for plan in found]
    now = _Change({}, workers)
    smallest = min([now, *(plan for kind in harmless + changing for plan in kind)], key=need)
    what = "this one" if smallest is now else say(smallest)
    told = f"No plan fits {limit_bytes / GIB:.0f} GiB (now {need(now) / GIB:.1f}). The smallest is {what}."
    return [f"{told} Take a smaller base or larger GPUs."]


@dataclass(frozen=True)
class _Change:
    """Another plan: keys of the spec with their new values, and how many workers."""

    keys: dict[str, Any]
    workers: int


def _plans(spec: JobSpec, workers: int) -> tuple[list[list[_Change]], list[list[_Change]]]:
    """Kinds of plans, each from mild to strong: those that cost only time or machines, and those that change the arithmetic."""
    scale, method = spec.scale, spec.method
    tokens = int(scale.tokens_per_microbatch)
    fewer = [t for t in (tokens >> n for n in range(1, 20)) if t >= spec.model.max_length]
    short = {"scale.tokens_per_microbatch": fewer[-1]} if fewer else {}
    again = {"scale.activation_checkpointing": "full"} if scale.activation_checkpointing != "full" else {}
    lean = {**short, **again, **({} if scale.reshard else {"scale.reshard": True})}
    can_shard = method.type != "qlora" and spec.optim.type == "adamw"
    shared = {**lean, **({"scale.sharding": "full"} if scale.sharding == "none" else {})}
    more = [workers << n for n in range(1, 9) if workers << n <= 1024]

    harmless = [[_Change({"scale.tokens_per_microbatch": t}, workers) for t in fewer]]
    harmless += [[_Change(again, workers)]] if again and not fewer else [[_Change({**short, **again}, workers)]] if again else []
    harmless += [[_Change(lean, workers)]] if not scale.reshard else []
    if can_shard:
        harmless += [[_Change(shared, workers)]] if workers > 1 and scale.sharding == "none" else []
        harmless += [[_Change(shared, n) for n in more]]
        harmless += [[_Change({**shared, "scale.cpu_offload": True}, workers)]] if not scale.cpu_offload else []

    alone = {**lean, **({"scale.sharding": "none"} if scale.sharding != "none" else {})}
    if scale.cpu_offload:
        alone["scale.cpu_offload"] = False
    changing: list[list[_Change]] = []
    if method.type == "full" and scale.master == "fp32":
        changing += [[_Change({**alone, "optim.type": "adamw8bit"}, workers)]] if spec.optim.type == "adamw" else []
        eight = {"optim.type": "adamw"} if spec.optim.type == "adamw8bit" else {}
        changing += [[_Change({**(shared if workers > 1 else lean), **eight, "scale.master": "bf16"}, workers)]]
    if method.type != "qlora" and not (isinstance(method, Lora) and (method.dora or method.modules_to_save)):
        changing += [[_Change({**alone, "method.type": "qlora"}, workers)]]
    return harmless, changing


def _changed(spec: JobSpec, keys: Mapping[str, Any]) -> JobSpec:
    parts: dict[str, Any] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        part = parts.get(section, getattr(spec, section))
        if name == "type" and section == "method":
            parts[section] = QLora(**{k: v for k, v in part.model_dump().items() if k in Adapter.model_fields})
        else:
            parts[section] = part.model_copy(update={name: value})
    return spec.model_copy(update=parts)


def planned(spec: JobSpec, base: Base, workers: int, device: Device = "cuda", models: Path | None = None) -> tuple[ModelShape, JobSpec]:
    """(the base's shape, the spec with every `auto` of its scale as it becomes there)."""
    shape = ModelShape.of_base(base, models)
    place = Placement(workers=workers, device=device)
    return shape, resolve.schedule(resolve.defaults(spec, base), 1, place, 2 * shape.total)


def num_workers(spec: JobSpec) -> int:
    """As many as the spec names; the most of its bounds; one for `auto`."""
    asked = spec.scale.workers
    return asked if isinstance(asked, int) else 1 if isinstance(asked, str) else asked.max


def main() -> None:
    parser = argparse.ArgumentParser(description="How much memory each GPU of a job needs. Computed, not measured.")
    parser.add_argument("job", type=Path)
    parser.add_argument("--workers", type=int, help="training processes, one to a GPU; by default those of the job")
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of one GPU (80)")
    args = parser.parse_args()
    try:
        spec = JobSpec.load(args.job)
        workers = args.workers or num_workers(spec)
        shape, spec = planned(spec, find_any(spec.model.base), workers)
        memory = estimate(shape, spec.method, spec.optim, spec.scale, workers)
        print(f"{spec.model.base}, {spec.method.type}, {workers} GPU(s), {spec.scale.tokens_per_microbatch} tokens at once\n{memory}")
        if not memory.fits(args.gpu_memory * GIB):
            print(f"\nDoes not fit {args.gpu_memory:.0f} GiB. What would:")
            print(*suggest(shape, spec, args.gpu_memory * GIB, workers), sep="\n")
            sys.exit(1)
    except TuneyardError as error:
        sys.exit(f"error: {error.message}\n  fix: {error.remedy}")


if __name__ == "__main__":
    main()
