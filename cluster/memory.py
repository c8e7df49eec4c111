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
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers import resolve
from trainers.catalogue import Base, find_any
from trainers.errors import SpecError, TuneyardError
from trainers.spec import Adapter, Full, JobSpec, Lora, Optim, Placement, QLora, Scale

GIB = 2**30
CONTEXT = int(0.8 * GIB)
"""A CUDA context, cuBLAS' workspaces and compiled kernels."""
COMMUNICATION = GIB
"""NCCL's buffers, where there are several workers."""
LOGIT_BYTES = 512 * 2**20
"""As in trainers/loss.py, on GPUs: fp32 logits of one chunk."""
UPDATED_AT_ONCE = 2**26
"""As in trainers/adam_bf16.py, on GPUs: elements."""
COMPONENTS = ("weights", "masters", "adapters", "gradients", "optimizer", "gathered", "unreduced", "activations", "head", "fixed")
"""`gathered`: blocks and root made whole by FSDP2; `unreduced`: gradients before they are summed over the workers; `head`: logits, and the
gradients that the loss leaves; `fixed`: what CUDA and NCCL take."""
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill: the allocator loses some between the tensors."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class ModelShape:
    """What of a Llama's config.json decides its memory."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    """Width of all query heads together."""
    key: int
    """Width of all key heads together; the values' too."""
    heads: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the keys of a config.json. Raises SpecError where one is missing."""
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            size = int(config.get("head_dim") or hidden // heads)
            return cls(
                hidden=hidden,
                intermediate=int(config["intermediate_size"]),
                layers=int(config["num_hidden_layers"]),
                query=heads * size,
                key=int(config.get("num_key_value_heads") or heads) * size,
                heads=heads,
                vocab=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"The model's config.json does not say its size: {error}.", "Name a Llama's folder.", "model.base") from None

    @classmethod
    def of_base(cls, base: Base, models: Path | None = None) -> ModelShape:
        """From the catalogue, or from the config.json of a base that is on this machine."""
        if base.shape:
            return cls.of(base.shape)
        for folder in (base.folder and Path(base.folder), models and models / base.id):
            if folder and (folder / "config.json").exists():
                return cls.of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        raise SpecError(f"The size of {base.id} is not known here.", "Name a base of the catalogue, or a local folder.", "model.base")

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a block's linear layers."""
        e, f = self.hidden, self.intermediate
        attention = {"q_proj": (e, self.query), "k_proj": (e, self.key), "v_proj": (e, self.key), "o_proj": (self.query, e)}
        return attention | {"gate_proj": (e, f), "up_proj": (e, f), "down_proj": (f, e)}

    @property
    def linear(self) -> int:
        """Weights of a block's linear layers."""
        return sum(i * o for i, o in self.linears.values())

    @property
    def block(self) -> int:
        """Weights of a block."""
        return self.linear + 2 * self.hidden

    @property
    def root(self) -> int:
        """Weights outside the blocks: embedding, last norm, head."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def total(self) -> int:
        return self.layers * self.block + self.root


@dataclass(frozen=True)
class Memory:
    """What one worker needs, in bytes."""

    moments: dict[str, dict[str, int]]
    """Moment of a step -> component -> bytes."""
    host: dict[str, int] = field(default_factory=dict)
    """With offload: component -> bytes in the host's memory, per worker."""
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
            lines += [f"{'in host memory':<22}{sum(self.host.values()) / GIB:12.2f}   ({', '.join(self.host)})"]
        return "\n".join([*lines, f"{self.bytes_per_weight:.3g} bytes a weight in weights, masters, gradients and optimizer state"])


def estimate(
    shape: ModelShape, method: Lora | QLora | Full, optim: Optim, scale: Scale, workers: int, gpus_per_node: int = GPUS_PER_NODE
) -> Memory:
    """Memory of one of `workers` workers on GPUs, each micro-batch full and all its tokens supervised.

    `scale` is resolved (no `auto`). Raises SpecError where it is not, or where four-bit weights or 8-bit moments are to be sharded.
    """
    if "auto" in (scale.tokens_per_microbatch, scale.sharding, scale.activation_checkpointing):
        raise SpecError("`scale` still holds `auto`.", "Resolve the spec first (trainers/resolve.py).", "scale")
    plan = _Plan(shape, method, optim, scale, workers, gpus_per_node)
    return Memory(plan.moments(), plan.host(), plan.bytes_per_weight())


@dataclass(frozen=True)
class _Plan:
    shape: ModelShape
    method: Lora | QLora | Full
    optim: Optim
    scale: Scale
    workers: int
    gpus_per_node: int

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

    def adapters(self) -> int:
        """Numbers in the adapters of one block."""
        if isinstance(self.method, Full):
            return 0
        num = 0
        for name, (i, o) in self.shape.linears.items():
            if self.method.targets == "all-linear" or name in self.method.targets:
                num += self.method.r * (i + o) + (o if isinstance(self.method, Lora) and self.method.dora else 0)
        return num

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
        if not self.scale.cpu_offload:
            return {}
        return {name: int(size / self.shards) for name, size in self.resident().items() if size}

    # -- what comes and goes in a step ---------------------------------------------------------------------------------

    def kept(self) -> int:
        """Bytes of activations that all blocks keep for the backward pass, per token."""
        layers = self.shape.layers
        again = {"none": 0, "selective": layers - layers // 2, "full": layers}[str(self.scale.activation_checkpointing)]
        return again * self.compute * self.shape.hidden + (layers - again) * self.saved()

    def saved(self) -> int:
        """Bytes that autograd saves of one block when nothing is computed again, per token.

        A norm: its input in fp32, the normalised input where its weight is trained, its output. Attention: queries, keys, values, its output
        (which is the input of o_proj) and a log-sum per head. The MLP: gate, silu(gate), up, their product.
        """
        c, s = self.compute, self.shape
        full = isinstance(self.method, Full)
        norms = 2 * ((4 + (2 if full else 1) * c) * s.hidden + 4)
        attention = c * (2 * s.query + 2 * s.key) + 4 * s.heads
        return norms + attention + 4 * c * s.intermediate + self.low_rank()

    def low_rank(self) -> int:
        """Between an adapter's two matrices; with dropout also the dropped input and what was dropped; with DoRA the output before its scale."""
        if isinstance(self.method, Full):
            return 0
        num = 0
        for name, (i, o) in self.shape.linears.items():
            if self.method.targets == "all-linear" or name in self.method.targets:
                num += self.method.r + (2 * i if self.method.dropout else 0) + (o if isinstance(self.method, Lora) and self.method.dora else 0)
        return self.compute * num

    def head(self) -> tuple[int, int]:
        """Bytes of the loss: (at its highest, what it leaves for the backward pass: the gradients of hidden states and head)."""
        c, s = self.compute, self.shape
        weight = s.vocab * s.hidden if isinstance(self.method, Full) else 0
        rows = max(1, min(self.tokens, LOGIT_BYTES // (4 * s.vocab)))
        chunk = rows * s.vocab * (c + 4)
        two = 2 if self.tokens > rows else 1  # the chunk before is still there while the next one is made
        left = c * (self.tokens * s.hidden + weight)
        summed = 4 * weight
        return c * self.tokens * s.hidden + summed + max(two * chunk, chunk + c * weight), left

    def moments(self) -> dict[str, dict[str, int]]:
        """Each moment at which memory may be at its highest."""
        c, s, t = self.compute, self.shape, self.tokens
        full = isinstance(self.method, Full)
        stays = {name: 0.0 if self.scale.cpu_offload else size / self.shards for name, size in self.resident().items()}
        fixed = CONTEXT + (COMMUNICATION if self.workers > 1 else 0)

        block, root = (c * (s.block + self.adapters()), c * s.root) if self.sharded else (0, 0)
        buffer = 1 if self.shards > 1 else 0  # what NCCL gathers into, from where weights are copied into place
        others = 0 if self.scale.reshard else s.layers - 1  # blocks that stay gathered after their forward pass

        trained, trained_root = (s.block, s.root) if full else (self.adapters(), 0)
        summed = 4 if self.sharded else 0  # FSDP2 copies a group's gradients into one fp32 buffer
        head_grad = c * s.vocab * s.hidden if full else 0  # waits for the whole root's
        largest = c * max(i * o for i, o in self.shape.linears.values()) if full else 0
        new = 4 / self.shards if self.sharded else 0  # the sums of a group, before they are added to those of earlier micro-batches

        copied = s.layers * trained if self.scale.sharding == "hybrid" else 0  # held until nodes have summed them, too

        mode = str(self.scale.activation_checkpointing)
        kept, embedded = self.kept() * t, c * s.hidden * t
        last_again = mode == "full" or (mode == "selective" and s.layers % 2 == 1)  # of every second block, the first is one
        last = embedded if last_again else self.saved() * t  # of `kept`, the last block's
        work_last, work = self.at_work(last_again), self.at_work(mode != "none")
        norm = (4 + (c if full else 0)) * s.hidden * t
        loss, left = self.head()

        def moment(gathered: float, activations: float, head: float, unreduced: float = 0, **more: float) -> dict[str, int]:
            parts = stays | {"gathered": gathered, "activations": activations, "head": head, "unreduced": unreduced, "fixed": fixed}
            return {name: int(parts[name] + more.get(name, 0)) for name in COMPONENTS}

        again = 0 if mode == "full" else embedded  # the embeddings, which are a block's input where that is kept
        whole = root + (buffer + others + (others > 0)) * block  # after the forward pass
        waiting = head_grad + largest

        return {
            "forward pass begins": moment((1 + buffer) * (root + block), embedded, left),
            "forward of the last block": moment(root + (1 + 2 * buffer + others) * block, kept - last + self.saved() * t, left),
            "loss": moment(whole, kept + norm + 2 * embedded + again, loss + left),
            "backward of the last norm": moment(whole, kept + 24 * s.hidden * t, left, head_grad),
            "backward of the last block": moment(root + (1 + max(buffer, others)) * block, kept + work_last, left, waiting),
            "backward of a block": moment(
                root + (1 + max(buffer, others)) * block, kept - last + work, left, waiting + summed * trained
            ),
            "gradients of a block": moment(
                root + max(buffer, others) * block,
                kept - last + embedded,
                left,
                head_grad + (c + summed) * trained if self.sharded else waiting,
                gradients=new * trained,
            ),
            "gradients of the root": moment(
                0, embedded, left, (c + summed) * trained_root if self.sharded else head_grad, gradients=new * (copied + trained_root)
            ),
            "update": moment(0, 0, 0, optimizer=self.scratch()),
        }

    def at_work(self, again: bool) -> int:
        """Bytes of a block's backward pass beyond what it kept: what it computes `again`, and gradients of activations."""
        c, s = self.compute, self.shape
        gradients = self.tokens * c * (2 * s.intermediate + s.hidden)
        matrix = max(i * o for i, o in s.linears.values())
        if isinstance(self.method, QLora):  # one at a time, out of its four bits
            gradients += c * matrix
        if isinstance(self.method, Lora) and self.method.dora:  # the norms of its rows: in fp32, and squared
            gradients = max(gradients, 8 * matrix)
        return gradients + (self.tokens * self.saved() if again else 0)

    def scratch(self) -> int:
        """fp32 copies with which bf16 masters are updated (trainers/adam_bf16.py)."""
        if not (isinstance(self.method, Full) and self.scale.master == "bf16"):
            return 0
        tensor = max(self.shape.vocab * self.shape.hidden, *(i * o for i, o in self.shape.linears.values())) // self.shards
        return 7 * 4 * min(UPDATED_AT_ONCE, tensor)


def nf4_bytes(double_quant: bool) -> float:
    """Bytes of a weight in four bits: half a byte, and its share of the scales (64 weights each; 256 scales each)."""
    return 0.5 + (1 / 64 + 4 / (64 * 256) if double_quant else 4 / 64)
