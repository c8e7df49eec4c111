"""Where every `auto` becomes a number. Pure; the result is saved as `resolved.json` and echoed on the wire."""

from __future__ import annotations

from trainers.catalogue import Base
from trainers.errors import SpecError
from trainers.spec import JobSpec, Placement


def placement(spec: JobSpec, cpus: int) -> Placement:
    """As many workers as asked for (`auto`: one, which uses every core by threads), sharing the cores between them.

    Raises SpecError where there are fewer cores than workers: they would wait for each other for ever.
    """
    workers = 1 if spec.scale.workers == "auto" else spec.scale.workers
    if workers > cpus:
        raise SpecError(
            f"`scale.workers` is {workers}, but there are {cpus} CPUs.", f"Set it to {cpus} or less, or to auto.", "scale.workers"
        )
    return Placement(workers=workers, threads_per_worker=cpus // workers)


def defaults(spec: JobSpec, base: Base) -> JobSpec:
    """Fill in what depends on the base model alone. Raises SpecError where the base cannot do what the spec asks."""
    if spec.model.max_length > base.context:
        raise SpecError(
            f"`model.max_length` is {spec.model.max_length}, but {base.id} has a context of {base.context} tokens.",
            f"Set it to {base.context} or less.",
            "model.max_length",
        )
    optim = spec.optim.model_copy(
        update={
            "batch_size": base.batch_size if spec.optim.batch_size == "auto" else spec.optim.batch_size,
            "learning_rate": base.learning_rate[spec.method.type] if spec.optim.learning_rate == "auto" else spec.optim.learning_rate,
        }
    )
    return spec.model_copy(update={"optim": optim})


def schedule(spec: JobSpec, num_examples: int, place: Placement) -> JobSpec:
    """Fill in what depends on the data: `defaults` has been here, and the token store holds `num_examples` to train on."""
    batch_size, scale = int(spec.optim.batch_size), spec.scale
    num_steps = -(-num_examples * spec.optim.epochs // batch_size)
    every = -(-num_steps // 5) if spec.validate_.every_steps == "auto" else spec.validate_.every_steps
    # A CPU's caches like short rows; what a longest example needs is the least that makes sense.
    tokens = max(1024, spec.model.max_length) if scale.tokens_per_microbatch == "auto" else scale.tokens_per_microbatch
    return spec.model_copy(
        update={
            "validate_": spec.validate_.model_copy(update={"every_steps": every}),
            "checkpoint": spec.checkpoint.model_copy(
                update={"every_steps": every if spec.checkpoint.every_steps == "auto" else spec.checkpoint.every_steps}
            ),
            "scale": scale.model_copy(update={"workers": place.workers, "tokens_per_microbatch": tokens}),
        }
    )
