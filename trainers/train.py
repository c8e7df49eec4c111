"""The training loop, from one worker's point of view. Imports no Ray: a launcher (Ray Train, torchrun, nothing) calls `train`.

    restore -> for every step: forward and backward over this worker's micro-batches, one sum over all workers, one update
            -> now and then: validate, answer a few examples, save a checkpoint beside the next steps

Every decision that changes what is computed depends on the spec, the token store and the step number only, so a run that was
killed and resumed is the run that was not.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainers import batching, checkpoint, methods, model, noise, optim, trend
from trainers.batching import Order
from trainers.checkpoint import Checkpointer, Progress
from trainers.errors import OutOfMemory, UserError
from trainers.learner import Learner
from trainers.parallel import World
from trainers.records import TEMPLATE_FILE, CheckpointRecord, RunDir, SampleRecord, StepRecord, TimingRecord, TrainRecord
from trainers.spec import JobSpec
from trainers.store import TokenStore

FLUSH_S = 1.0
"""Metrics reach the run directory at most this late."""


@dataclass(frozen=True)
class Measured:
    """Sums over the supervised tokens of some examples, over all workers."""

    loss: float
    """Weighted mean, nats per supervised token."""
    accuracy: float
    weight: float


@dataclass(frozen=True)
class Made:
    """What one step did."""

    measured: Measured
    """Before the update."""
    norm: float
    """Of the gradient, before clipping."""
    skipped: bool
    """The gradient was bad, and nothing changed."""
    stop: bool
    """Some worker was asked to stop."""


def train(
    spec: JobSpec,
    model_dir: Path,
    store: Path,
    run: RunDir,
    world: World,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[StepRecord], None] = lambda _: None,
    since: Mapping[str, float] | None = None,
) -> TrainRecord:
    """Train until done or asked to stop. `spec` is resolved (no `auto`); all workers pass the same arguments.

    `should_stop` is asked once a step on each worker; if any says yes, all save a checkpoint and return. What the job's owner must
    mend is returned as a failed record, not raised: launchers retry what is raised. `since` names the moments (seconds since the epoch)
    that came before the loop, in order, for the account of the time up to the first step.
    """
    try:
        return _train(spec, model_dir, store, run, world, should_stop, on_step, dict(since or {}))
    except torch.OutOfMemoryError as error:
        problem = OutOfMemory(
            f"A worker ran out of GPU memory ({str(error).split('. ')[0]}).",
            "Lower `scale.tokens_per_microbatch`, set `scale.activation_checkpointing` to full, or use more workers with sharding.",
            "scale",
        )
        if world.size > 1:  # the others wait in a collective: only the launcher can end them
            raise problem from None
        return TrainRecord(status="failed", error=problem.to_dict())
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
    moments: dict[str, float],
) -> TrainRecord:
    moments["loop started"] = time.time()
    examples, held_out = TokenStore(store, "train"), TokenStore(store, "validation")
    order = Order(examples.key, len(examples), spec.optim.epochs, int(spec.optim.batch_size), spec.optim.seed)
    moments["store opened"] = time.time()

    leader = world.rank == 0
    learner = Learner.build(spec, model_dir, world)
    moments["weights loaded"] = time.time()
    saver = Checkpointer(run, world, spec.checkpoint)
    progress = saver.restore(learner.state(), lambda line: run.event(line, "warn") if leader else None)
    learner.loaded()
    moments["checkpoint restored"] = time.time()
    make_ready(learner, run if leader else None)
    moments["blocks compiled" if spec.scale.compile else "probed"] = time.time()
    log = StepLog(run) if leader else None
    if leader:
        start = f"Training resumes after step {progress.step}" if progress.step else "Training starts"
        run.event(f"{start}: {order.num_steps} steps of {order.batch_size} examples on {world.size} worker(s). {learner.line()}.")

    stopping = False
    enough = trend.should_stop(progress.history, spec.validate_.early_stopping)
    while progress.step < order.num_steps and not stopping and not enough:
        started = time.perf_counter()
        rate = optim.learning_rate(spec.optim, progress.step, order.num_steps)
        chosen = order.step(progress.step)
        made = train_step(learner, examples, chosen, progress, rate, should_stop, saver)
        stopping = made.stop
        guard(progress, made, spec, run if leader else None)
        tokens = int(examples.lengths[chosen].sum())
        progress.step += 1
        progress.trained_tokens += tokens
        progress.seconds += time.perf_counter() - started
        record = StepRecord(
            step=progress.step,
            num_steps=order.num_steps,
            epoch=min(progress.step * order.batch_size / order.num_examples, order.epochs),
            train_loss=made.measured.loss if math.isfinite(made.measured.loss) else progress.last_loss,
            train_accuracy=made.measured.accuracy if math.isfinite(made.measured.accuracy) else 0.0,
            learning_rate=rate,
            grad_norm=made.norm if math.isfinite(made.norm) else 0.0,
            tokens=tokens,
            supervised_tokens=int(examples.supervised[chosen].sum()),
            seconds=time.perf_counter() - started,
            skipped=made.skipped,
        )
        if moments and leader:
            tell_start(run, moments)
        moments.clear()
        if not made.skipped:
            progress.losses.append(made.measured.loss)
        last = progress.step == order.num_steps
        if len(held_out) and (last or progress.step % int(spec.validate_.every_steps) == 0):
            valid, slices = evaluate(learner, held_out)
            record = record.model_copy(update={"valid_loss": valid.loss, "valid_accuracy": valid.accuracy, "valid_slices": slices})
            progress.history.append([progress.step, sum(progress.losses) / max(1, len(progress.losses)), valid.loss])
            progress.losses.clear()
            enough = trend.should_stop(progress.history, spec.validate_.early_stopping)
            answer(learner, held_out, progress.step, run)
        if log:
            log.add(record)
            if record.valid_loss is not None:
                tell_trend(run, progress, spec, last=last, enough=enough)
        if last or stopping or enough or progress.step % int(spec.checkpoint.every_steps) == 0:
            if log:
                log.flush()
            save(learner, saver, progress, record, run, model_dir.name)
        on_step(record)
    saver.finish()

    winner = checkpoint.best(run, spec.checkpoint) if leader else None
    return TrainRecord(
        status="finished" if enough or progress.step == order.num_steps else "stopped",
        step=progress.step,
        num_steps=order.num_steps,
        trained_tokens=progress.trained_tokens,
        best_step=winner.step if winner else None,
        seconds=progress.seconds,
    )


def make_ready(learner: Learner, run: RunDir | None) -> None:
    """Compile where that is asked for, and check that the model can be trained at all; what cannot be compiled runs as it is."""
    if learner.spec.scale.compile:
        learner.compile()
        try:
            return learner.probe()
        except UserError:
            raise
        except Exception as error:  # a compiler fails in a hundred ways, and none of them stops the model from running uncompiled
            learner.uncompile()
            cause: BaseException = error
            while cause.__cause__ is not None:  # the compiler wraps what it met
                cause = cause.__cause__
            told = " ".join(str(cause).split("\n\n")[0].split())[:300]
            if run is not None:
                run.event(f"Blocks run uncompiled: torch.compile failed ({type(cause).__name__}: {told}).", "warn")
    learner.probe()


def train_step(
    learner: Learner,
    examples: TokenStore,
    chosen: np.ndarray,
    progress: Progress,
    rate: float,
    should_stop: Callable[[], bool] = lambda: False,
    saver: Checkpointer | None = None,
) -> Made:
    """One optimizer step on `chosen` examples, the one after `progress`. A gradient that `optim.is_bad` changes nothing."""
    spec = learner.spec
    learner.zero()
    sums = _forward(learner, examples, chosen, progress.step)

    # The loss of a step is the weighted sum over all its tokens, wherever they were computed, divided once by the summed weights.
    written = saver.written() if saver else True
    totals = torch.tensor([*sums, float(should_stop()), float(written)], dtype=torch.float64)
    learner.reduce(totals)
    loss, correct, weight, stop, votes = totals.tolist()
    norm = learner.scale(weight, spec.optim.max_grad_norm)
    skipped = optim.is_bad(norm, progress.norms, spec.optim.max_spike)
    if saver:
        saver.wait_copied()  # a checkpoint on its way is copied beside the forward and backward pass
    if not skipped:
        learner.update(rate)
    if saver:
        saver.settle(votes == learner.world.size)
    return Made(Measured(loss / weight, correct / weight, weight), norm, skipped, stop > 0)


def guard(progress: Progress, made: Made, spec: JobSpec, run: RunDir | None) -> None:
    """Remember the norm, or tell of a skipped step; raises UserError when too many were skipped in a row."""
    if not made.skipped:
        progress.norms = [*progress.norms[1 - optim.NORMS_KEPT :], made.norm]
        progress.skipped = 0
        return
    progress.skipped += 1
    what = f"the gradient's norm is {made.norm:.4g}" if math.isfinite(made.norm) else "the gradient is not finite"
    if progress.skipped > spec.optim.max_skipped:
        raise UserError(
            f"Step {progress.step + 1}: {what} (loss {made.measured.loss:.4g}), as in the {progress.skipped - 1} steps before it.",
            "Lower `optim.learning_rate`.",
            "optim.learning_rate",
        )
    if run is not None:
        run.event(f"Step {progress.step + 1} is skipped: {what} (loss {made.measured.loss:.4g}).", "warn", step=progress.step + 1)


def evaluate(learner: Learner, examples: TokenStore) -> tuple[Measured, dict[str, dict[str, float]]]:
    """Loss and accuracy over all examples and over each slice of them, shared between the workers, without gradients."""
    members: dict[str | None, list[int]] = {}
    for i in range(len(examples)):
        members.setdefault(examples.slice(i), []).append(i)
    names = sorted(members, key=lambda name: (name is not None, name or ""))
    totals = torch.tensor([_forward(learner, examples, np.array(members[name])) for name in names], dtype=torch.float64)
    learner.world.sum_([totals])
    loss, correct, weight = totals.sum(0).tolist()
    slices = {
        name: {"loss": part_loss / part_weight, "accuracy": part_correct / part_weight, "supervised_tokens": part_weight}
        for name, (part_loss, part_correct, part_weight) in zip(names, totals.tolist(), strict=True)
        if name is not None
    }
    return Measured(loss / weight, correct / weight, weight), slices


def answer(learner: Learner, examples: TokenStore, step: int, run: RunDir) -> None:
    """Let the model answer the first validation examples, for people to read. Whoever holds the weights takes part."""
    leader = learner.world.rank == 0
    if learner.over is None and not leader:
        return
    records = []
    for i in range(min(learner.spec.validate_.samples, len(examples))):
        ids, weights = examples.get(i)
        begin = int(np.flatnonzero(weights)[0])
        rest = np.flatnonzero(weights[begin:] == 0)
        end = begin + int(rest[0]) if len(rest) else len(ids)
        stop = frozenset([int(ids[end - 1])])  # what ends the reference's turn
        given = model.greedy(learner.trainee, ids[:begin], learner.spec.validate_.sample_tokens, stop, learner.world.device)
        records.append(
            SampleRecord(step=step, example=i, prompt_ids=ids[:begin].tolist(), answer_ids=given, reference_ids=ids[begin:end].tolist())
        )
    if leader:
        run.append("samples", records)


def tell_start(run: RunDir, moments: dict[str, float]) -> None:
    """Say where the time up to the first step went."""
    moments = {**moments, "first step": time.time()}
    times = list(moments.values())
    parts = {name: round(at - before, 2) for (name, at), before in zip(list(moments.items())[1:], times[:-1], strict=True)}
    told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    run.event(f"First step made {times[-1] - times[0]:.1f} s after {next(iter(moments))} (seconds: {told}).", seconds=parts)
    run.write("timing.json", TimingRecord(phases=parts))


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


def _forward(learner: Learner, examples: TokenStore, chosen: np.ndarray, step: int | None = None) -> tuple[float, float, float]:
    """This worker's sums (loss, right predictions, weight) over its share of `chosen`.

    With `step` (steps made before) it is for training: gradients add up, and there is noise where the spec asks for it.
    """
    spec, world = learner.spec, learner.world
    packs = batching.plan(examples.lengths[chosen].tolist(), world.size, int(spec.scale.tokens_per_microbatch))[world.rank]
    noisy = step is not None and (spec.optim.neftune_alpha > 0 or getattr(spec.method, "dropout", 0) > 0)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # read once: each look at a GPU's number waits for it
    with nullcontext() if step is not None else torch.no_grad():
        for pack in packs:
            rows = [examples.get(int(chosen[i])) for i in pack]
            keys = [noise.token_keys(spec.optim.seed, step, i, len(rows[n][0])) for n, i in enumerate(pack)] if noisy else None  # type: ignore[arg-type]
            batch = model.collate(rows, world.device, keys)
            batch_loss, batch_correct = learner.trainee(batch)
            if step is not None:
                batch_loss.backward()
            sums += torch.stack([batch_loss.detach().double(), batch_correct.double(), batch.weight_N.sum().double()])
    loss, correct, weight = sums.tolist()
    return loss, correct, weight


def save(learner: Learner, saver: Checkpointer, progress: Progress, record: StepRecord, run: RunDir, base: str) -> None:
    """Begin a checkpoint, with its adapter where the method has one."""
    manifest = CheckpointRecord(
        step=progress.step,
        files={},
        train_loss=record.train_loss,
        train_accuracy=record.train_accuracy,
        valid_loss=record.valid_loss,
        valid_accuracy=record.valid_accuracy,
    )
    method = learner.spec.method
    learned = learner.learned() if method.type != "full" else {}

    def export(folder: Path) -> None:
        methods.of(method).export(learned, method, base, folder)
        if run.path(TEMPLATE_FILE).exists():
            shutil.copyfile(run.path(TEMPLATE_FILE), folder / TEMPLATE_FILE)

    saver.begin(learner.state(), progress, manifest, export if learned else None)


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
