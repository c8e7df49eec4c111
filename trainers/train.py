"""The training loop, from one worker's point of view. Imports no Ray: a launcher (Ray Train, torchrun, nothing) calls `train`.

    restore -> for every step: forward and backward over this worker's micro-batches, one sum over all workers, one update
            -> now and then: validate, save a checkpoint

Every decision that changes what is computed depends on the spec, the token store and the step number only, so a run that was
killed and resumed is the run that was not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainers import batching, checkpoint, lora, model, optim, trend
from trainers.batching import Order
from trainers.checkpoint import Progress
from trainers.errors import UserError
from trainers.parallel import World
from trainers.records import TEMPLATE_FILE, CheckpointRecord, RunDir, StepRecord, TrainRecord
from trainers.spec import JobSpec
from trainers.store import TokenStore

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLUSH_S = 1.0
"""Metrics reach the run directory at most this late."""


@dataclass(frozen=True)
class Measured:
    """Sums over the supervised tokens of some examples, over all workers."""

    loss: float
    """Weighted mean, nats per supervised token."""
    accuracy: float
    weight: float


def train(
    spec: JobSpec,
    model_dir: Path,
    store: Path,
    run: RunDir,
    world: World,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepRecord], None] = lambda _: None,
) -> TrainRecord:
    """Train until done or asked to stop. `spec` is resolved (no `auto`); all workers pass the same arguments.

    `should_stop` is asked once a step on each worker; if any says yes, all save a checkpoint and return. What the job's owner must
    mend is returned as a failed record, not raised: launchers retry what is raised.
    """
    try:
        return _train(spec, model_dir, store, run, world, should_stop, on_step)
    except UserError as error:
        return TrainRecord(status="failed", error=error.to_dict())


def _train(
    spec: JobSpec,
    model_dir: Path,
    store: Path,
    run: RunDir,
    world: World,
    should_stop: Callable[[], bool],
    on_step: Callable[[StepRecord], None],
) -> TrainRecord:
    examples, held_out = TokenStore(store, "train"), TokenStore(store, "validation")
    order = Order(examples.key, len(examples), spec.optim.epochs, int(spec.optim.batch_size), spec.optim.seed)

    trainee = model.Trainee(lora.apply(model.load(model_dir, DTYPES[spec.scale.precision], world.device), spec.method, spec.optim.seed))
    parameters = lora.trainable(trainee.model)
    optimizer = optim.build(parameters, spec.optim)
    leader = world.rank == 0
    progress = checkpoint.restore(run, parameters, optimizer, lambda line: run.event(line, "warn") if leader else None)
    log = StepLog(run) if leader else None
    if leader:
        count = sum(p.numel() for p in parameters.values())
        start = f"Training resumes after step {progress.step}" if progress.step else "Training starts"
        run.event(
            f"{start}: {order.num_steps} steps of {order.batch_size} examples, {count:,} trainable parameters, {world.size} worker(s)."
        )

    stopping = False
    enough = trend.should_stop(progress.history, spec.validate_.early_stopping)
    while progress.step < order.num_steps and not stopping and not enough:
        started = time.perf_counter()
        rate = optim.learning_rate(spec.optim, progress.step, order.num_steps)
        chosen = order.step(progress.step)
        measured, norm, skipped, stopping = train_step(
            trainee, parameters, optimizer, examples, chosen, rate, spec, world, should_stop, progress.norms
        )
        guard(progress, measured, norm, skipped, spec, run if leader else None)
        tokens = int(examples.lengths[chosen].sum())
        progress.step += 1
        progress.trained_tokens += tokens
        progress.seconds += time.perf_counter() - started
        record = StepRecord(
            step=progress.step,
            num_steps=order.num_steps,
            epoch=min(progress.step * order.batch_size / order.num_examples, order.epochs),
            train_loss=measured.loss if math.isfinite(measured.loss) else progress.last_loss,
            train_accuracy=measured.accuracy if math.isfinite(measured.accuracy) else 0.0,
            learning_rate=rate,
            grad_norm=norm if math.isfinite(norm) else 0.0,
            tokens=tokens,
            supervised_tokens=int(examples.supervised[chosen].sum()),
            seconds=time.perf_counter() - started,
            skipped=skipped,
        )
        if not skipped:
            progress.losses.append(measured.loss)
        last = progress.step == order.num_steps
        if len(held_out) and (last or progress.step % int(spec.validate_.every_steps) == 0):
            valid, slices = evaluate(trainee, held_out, spec, world)
            record = record.model_copy(update={"valid_loss": valid.loss, "valid_accuracy": valid.accuracy, "valid_slices": slices})
            progress.history.append([progress.step, sum(progress.losses) / max(1, len(progress.losses)), valid.loss])
            progress.losses.clear()
            enough = trend.should_stop(progress.history, spec.validate_.early_stopping)
        if log:
            log.add(record)
            if record.valid_loss is not None:
                tell_trend(run, progress, spec, last=last, enough=enough)
        if last or stopping or enough or progress.step % int(spec.checkpoint.every_steps) == 0:
            if log:
                log.flush()
                save(run, spec, trainee, parameters, optimizer, progress, record, model_dir.name)
            world.barrier()  # no worker runs ahead of a checkpoint that may yet fail
        on_step(record)

    winner = checkpoint.best(run)
    return TrainRecord(
        status="finished" if enough or progress.step == order.num_steps else "stopped",
        step=progress.step,
        num_steps=order.num_steps,
        trained_tokens=progress.trained_tokens,
        best_step=winner.step if winner else None,
        seconds=progress.seconds,
    )


def train_step(
    trainee: model.Trainee,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    examples: TokenStore,
    chosen: np.ndarray,
    rate: float,
    spec: JobSpec,
    world: World,
    should_stop: Callable[[], bool],
    norms: list[float],
) -> tuple[Measured, float, bool, bool]:
    """One optimizer step on `chosen` examples: (loss before the update, gradient norm before clipping, whether skipped, whether to stop).

    `norms` are those of the steps before; a gradient that `optim.is_bad` beside them changes nothing.
    """
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    sums = _forward(trainee, examples, chosen, spec, world, backward=True)

    # The loss of a step is the weighted sum over all its tokens, wherever they were computed, divided once by the summed weights.
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    totals = torch.tensor([*sums, float(should_stop())], dtype=torch.float64)
    world.sum_([*gradients, totals])
    loss, correct, weight, stop = totals.tolist()
    for gradient in gradients:
        gradient /= weight
    norm = optim.clip(gradients, spec.optim.max_grad_norm)
    if optim.is_bad(norm, norms, spec.optim.max_spike):
        return Measured(loss / weight, correct / weight, weight), norm, True, stop > 0
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return Measured(loss / weight, correct / weight, weight), norm, False, stop > 0


def guard(progress: Progress, measured: Measured, norm: float, skipped: bool, spec: JobSpec, run: RunDir | None) -> None:
    """Remember the norm, or tell of a skipped step; raises UserError when too many were skipped in a row."""
    if not skipped:
        progress.norms = [*progress.norms[1 - optim.NORMS_KEPT :], norm]
        progress.skipped = 0
        return
    progress.skipped += 1
    what = f"the gradient's norm is {norm:.4g}" if math.isfinite(norm) else "the gradient is not finite"
    if progress.skipped > spec.optim.max_skipped:
        raise UserError(
            f"Step {progress.step + 1}: {what} (loss {measured.loss:.4g}), as in the {progress.skipped - 1} steps before it.",
            "Lower `optim.learning_rate`.",
            "optim.learning_rate",
        )
    if run is not None:
        run.event(f"Step {progress.step + 1} is skipped: {what} (loss {measured.loss:.4g}).", "warn", step=progress.step + 1)


def evaluate(trainee: model.Trainee, examples: TokenStore, spec: JobSpec, world: World) -> tuple[Measured, dict[str, dict[str, float]]]:
    """Loss and accuracy over all examples and over each slice of them, shared between the workers, without gradients."""
    members: dict[str | None, list[int]] = {}
    for i in range(len(examples)):
        members.setdefault(examples.slice(i), []).append(i)
    names = sorted(members, key=lambda name: (name is not None, name or ""))
    totals = torch.tensor(
        [_forward(trainee, examples, np.array(members[name]), spec, world, backward=False) for name in names], dtype=torch.float64
    )
    world.sum_([totals])
    loss, correct, weight = totals.sum(0).tolist()
    slices = {
        name: {"loss": part_loss / part_weight, "accuracy": part_correct / part_weight, "supervised_tokens": part_weight}
        for name, (part_loss, part_correct, part_weight) in zip(names, totals.tolist(), strict=True)
        if name is not None
    }
    return Measured(loss / weight, correct / weight, weight), slices


def tell_trend(run: RunDir, progress: Progress, spec: JobSpec, *, last: bool, enough: bool) -> None:
    """Say in an event what the losses say, when it becomes true."""
    best = min(progress.history, key=lambda entry: entry[2])
    if trend.overfits(progress.history):
        run.event(
            f"Validation loss rose {trend.RISES} times in a row while training loss fell: the model begins to learn its examples by heart. "
            f"Best so far is step {best[0]:.0f}, which is what the job will use.",
            "warn",
        )
    rule = spec.validate_.early_stopping
    if enough and not last and rule is not None:
        run.event(f"Training ends early: {rule.patience} validations in a row were no better than step {best[0]:.0f} ({best[2]:.4f}).")
    elif last and trend.underfits(progress.history):
        run.event("Training and validation loss were both still falling at the end: more epochs or a higher learning rate may help.")


def _forward(
    trainee: model.Trainee, examples: TokenStore, chosen: np.ndarray, spec: JobSpec, world: World, *, backward: bool
) -> tuple[float, float, float]:
    """This worker's sums (loss, right predictions, weight) over its share of `chosen`; gradients add up where `backward`."""
    packs = batching.plan(examples.lengths[chosen].tolist(), world.size, int(spec.scale.tokens_per_microbatch))[world.rank]
    loss = correct = weight = 0.0
    with nullcontext() if backward else torch.no_grad():
        for pack in packs:
            batch = model.collate([examples.get(int(chosen[i])) for i in pack], world.device)
            batch_loss, batch_correct = trainee(batch)
            if backward:
                batch_loss.backward()
            loss += batch_loss.item()
            correct += batch_correct.item()
            weight += batch.weight_N.sum().item()
    return loss, correct, weight


def save(
    run: RunDir,
    spec: JobSpec,
    trainee: model.Trainee,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    record: StepRecord,
    base: str,
) -> None:
    """Write a checkpoint with its adapter, tell, and delete what the spec does not keep."""
    started = time.perf_counter()
    manifest = CheckpointRecord(
        step=progress.step,
        files={},
        train_loss=record.train_loss,
        train_accuracy=record.train_accuracy,
        valid_loss=record.valid_loss,
        valid_accuracy=record.valid_accuracy,
    )

    def export(folder: Path) -> None:
        lora.export(trainee.model, spec.method, base, folder)
        if run.path(TEMPLATE_FILE).exists():
            shutil.copyfile(run.path(TEMPLATE_FILE), folder / TEMPLATE_FILE)

    checkpoint.save(run, parameters, optimizer, progress, manifest, export)
    checkpoint.prune(run, spec.checkpoint.keep_last, spec.checkpoint.keep_best)
    told = f", validation loss {record.valid_loss:.4f}" if record.valid_loss is not None else ""
    run.event(
        f"Checkpoint at step {progress.step}: training loss {record.train_loss:.4f}{told}.", stall_s=round(time.perf_counter() - started, 3)
    )


class StepLog:
    """Step records on their way to the run directory, in segments of about a second."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.pending: list[StepRecord] = []
        self.flushed = time.perf_counter()

    def add(self, record: StepRecord) -> None:
        self.pending.append(record)
        if time.perf_counter() - self.flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Close the segment and say how far the run is."""
        if not self.pending:
            return
        last, tokens = self.pending[-1], sum(r.tokens for r in self.pending)
        seconds = sum(r.seconds for r in self.pending)
        self.run.append("metrics", self.pending)
        self.run.progress(
            "train",
            done=last.step,
            total=last.num_steps,
            train_loss=last.train_loss,
            valid_loss=last.valid_loss,
            tokens_per_s=round(tokens / seconds, 1),
            left_s=round((last.num_steps - last.step) * seconds / len(self.pending)),
        )
        self.pending, self.flushed = [], time.perf_counter()
