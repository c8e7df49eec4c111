"""Where every `auto` becomes a number. Pure; the result is saved as `resolved.json` and echoed on the wire."""

from __future__ import annotations

from trainers.catalogue import Base
from trainers.errors import SpecError
from trainers.spec import JobSpec, Placement, Scale

GIB = 2**30
SHARD_BEYOND = 16 * GIB
"""Bytes of a frozen base from which adapters' workers share it instead of each holding all of it."""
RECOMPUTE_BEYOND = 4 * GIB
"""Bytes of a base from which a GPU recomputes its blocks."""


def defaults(spec: JobSpec, base: Base) -> JobSpec:
    """Fill in what depends on the base model alone. Raises SpecError where the base cannot do what the spec asks."""
    if spec.model.max_length > base.context:
        raise SpecError(
            f"`model.max_length` is {spec.model.max_length}, but {base.id} has a context of {base.context} tokens.",
            f"Set it to {base.context} or less.",
            "model.max_length",
        )
    sharded = spec.scale.sharding in ("full", "hybrid")
    if sharded and spec.method.type == "qlora":
        raise SpecError(
            f"`scale.sharding` is {spec.scale.sharding}, but four-bit weights cannot be sharded.",
            "Set it to none (each worker holds the four-bit base), or use `method: {type: lora}`.",
            "scale.sharding",
        )
    if sharded and spec.optim.type == "adamw8bit":
        raise SpecError(
            f"`scale.sharding` is {spec.scale.sharding}, but 8-bit moments cannot be sharded.",
            "Use `optim: {type: adamw}`: sharded, its moments are shared between the workers.",
            "optim.type",
        )
    if spec.scale.cpu_offload and spec.scale.sharding == "none":
        raise SpecError("`scale.cpu_offload` is on, but `scale.sharding` is none.", "Set `scale.sharding` to full.", "scale.cpu_offload")
    if spec.scale.master == "bf16" and (spec.method.type != "full" or spec.scale.precision != "bf16"):
        raise SpecError(
            "`scale.master` is bf16, which is for full fine-tuning in bf16 alone: adapters are small, and always fp32.",
            "Leave it at fp32.",
            "scale.master",
        )
    optim = spec.optim.model_copy(
        update={
            "batch_size": base.batch_size if spec.optim.batch_size == "auto" else spec.optim.batch_size,
            "learning_rate": base.learning_rate[spec.method.type] if spec.optim.learning_rate == "auto" else spec.optim.learning_rate,
        }
    )
    return spec.model_copy(update={"optim": optim})


def schedule(spec: JobSpec, num_examples: int, place: Placement, base_bytes: int = 0) -> JobSpec:
    """Fill in what depends on the data, the place and the base's size (bytes of its files).

    `defaults` has been here, and the token store holds `num_examples` to train on.
    """
    batch_size = int(spec.optim.batch_size)
    num_steps = -(-num_examples * spec.optim.epochs // batch_size)
    every = -(-num_steps // 5) if spec.validate_.every_steps == "auto" else spec.validate_.every_steps
    return spec.model_copy(
        update={
            "validate_": spec.validate_.model_copy(update={"every_steps": every}),
            "checkpoint": spec.checkpoint.model_copy(
                update={"every_steps": every if spec.checkpoint.every_steps == "auto" else spec.checkpoint.every_steps}
            ),
            "scale": _scale(spec, place, base_bytes),
        }
    )


def _scale(spec: JobSpec, place: Placement, base_bytes: int) -> Scale:
    scale, gpu = spec.scale, place.device == "cuda"
    # A CPU's caches like short rows; what a longest example needs is the least that makes sense.
    tokens = max(8192 if gpu else 1024, spec.model.max_length)
    sharding = "none"
    # Sharded state comes in shards of fp32 or bf16; offload is a property of shards, so a spec that asks for it has them on one worker too.
    if spec.method.type == "full" and spec.optim.type == "adamw" and (place.workers > 1 or scale.cpu_offload):
        sharding = "full"
    if spec.method.type == "lora" and (scale.cpu_offload or (place.workers > 1 and base_bytes > SHARD_BEYOND)):
        sharding = "full"
    recompute = "full" if gpu and base_bytes > RECOMPUTE_BEYOND else "none"
    return scale.model_copy(
        update={
            "workers": place.workers,
            "tokens_per_microbatch": tokens if scale.tokens_per_microbatch == "auto" else scale.tokens_per_microbatch,
            "sharding": sharding if scale.sharding == "auto" else scale.sharding,
            "activation_checkpointing": recompute if scale.activation_checkpointing == "auto" else scale.activation_checkpointing,
            "compile": gpu if scale.compile == "auto" else scale.compile,
        }
    )
