"""Checkpoints: the named state of a run, whole or not there.

A checkpoint is a folder `step-000100-a2` (step, attempt) with safetensors and JSON in it: no pickle is written or read. Each worker writes
its own rows into its own shard file, beside the next steps; once all have, the leader writes MANIFEST.json with every file's size and hash,
and with that the checkpoint exists. Any number of workers can go on from it, each reading its own rows.
Reading checks the manifest: a damaged checkpoint is passed over, with an event, for the one before it.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainers import manifest, shards, vault
from trainers.errors import CheckpointError, SpecError, Unavailable, UserError
from trainers.manifest import best as best
from trainers.manifest import fetch as fetch
from trainers.manifest import folders as folders
from trainers.manifest import prune as prune
from trainers.manifest import read_manifest as read_manifest
from trainers.manifest import seal
from trainers.parallel import World
from trainers.records import CheckpointRecord, RunDir, checkpoint_name, parse_checkpoint_name, write_atomic
from trainers.spec import CheckpointPart
from trainers.state import SUFFIX, Image, shard_file
from trainers.state import State as State
from trainers.vault import MANIFEST, Stated

PROGRESS = "progress.json"
RETRIES_S = (1.0, 4.0, 16.0)
"""Waits between tries where storage fails."""

T = TypeVar("T")


@dataclass
class Progress:
    """What the loop must know to go on as if it had never stopped. The data position is `step` alone (see batching.Order)."""

    step: int = 0
    """Optimizer steps made."""
    trained_tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps, over all attempts."""
    history: list[list[float]] = field(default_factory=list)
    """trend.History of the run."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each step since the last validation."""
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last 50 steps that were made."""
    skipped: int = 0
    """Steps skipped in a row."""

    @property
    def last_loss(self) -> float:
        """Training loss of the last step that had one, or the mean before the last validation; 0 at the start."""
        return self.losses[-1] if self.losses else self.history[-1][1] if self.history else 0.0


# -- one worker's view -------------------------------------------------------------------------------------------------------


class _Task(threading.Thread):
    """A thread whose error is kept for whoever waits for it."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="checkpoint")
        self.act = act
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.act()
        except BaseException as error:
            self.error = error


@dataclass
class _Save:
    """A checkpoint on its way."""

    name: str
    step: int
    state: dict[str, Tensor]
    progress: str
    """progress.json."""
    record: CheckpointRecord
    adapter: Callable[[Path], None] | None
    copied: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.perf_counter)
    stall_s: float = 0.0
    """How long the loop has stood still for it on this worker."""


class Checkpointer:
    """Reads and writes the checkpoints of one run, as one worker of it. All workers make the same calls in the same order.

    Of a step: `written()` (its answer travels in the step's all-reduce), `wait_copied()`, the optimizer, `settle(...)`, and now and then
    `begin(...)`.
    """

    def __init__(self, run: RunDir, world: World, part: CheckpointPart) -> None:
        """Raises SpecError where `part.to` is no place."""
        self.run, self.world, self.part = run, world, part
        self.vault = vault.at(run, part)
        self._leader = world.rank == 0
        self._events = RunDir(run.root, run.attempt, f"checkpoint{world.rank}")  # the loop writes its own from another thread
        self._image = Image()
        self._pending: _Save | None = None
        self._voted: _Save | None = None
        self._reserving: _Task | None = None
        self._writing: _Task | None = None
        self._publishing: _Task | None = None
        self._saved_step = 0
        self._proven: set[str] = set()  # good: written or verified by us
        self._damaged: set[str] = set()

    # -- reading

    def restore(self, targets: dict[str, Tensor], say: Callable[[str], None]) -> Progress:
        """Fill the targets from the newest whole checkpoint, each worker its own rows; a fresh Progress where there is none.

        A collective. `say` gets a line for each checkpoint that is passed over. Raises CheckpointError where a checkpoint is whole but
        not of these targets, SpecError where checkpoints cannot be written at all, Unavailable where storage does not answer.
        """
        candidates = self._together(lambda: self._candidates(say) if self._leader else [])
        while name := self._proposed(candidates):
            damage = self._together(lambda name=name: self._damage(name))
            found = torch.tensor([damage is not None], dtype=torch.int64, device=self.world.device)
            self.world.sum_([found])
            if not found.item():
                break
            if self._leader:
                self._damaged.add(candidates.pop())
                say(f"Checkpoint {name} is damaged ({damage or 'as another worker found'}); going back to the one before it.")
        self._reserving = _Task(lambda: self._image.reserve(self._mine(targets)))  # beside the first step
        if not name:
            return Progress()
        progress = self._together(lambda: self._load(name, targets))
        self._saved_step = progress.step
        self._proven = {name}
        return progress

    def _candidates(self, say: Callable[[str], None]) -> list[str]:
        """Checkpoints, oldest first, after what was left unfinished is removed."""
        if self.part.to is not None:
            self.vault.check()
        names = manifest.ordered(self.vault.names())
        unfinished = [n for n in names if MANIFEST not in self.vault.files(n)]
        for name in unfinished:
            if (parse_checkpoint_name(name) or (0, 0))[1] <= self.run.attempt:
                say(f"Checkpoint {name} was never finished; it is removed.")
                self.vault.delete(name)
        return [n for n in names if n not in unfinished]

    def _proposed(self, candidates: list[str]) -> str:
        """The leader's newest candidate, on every worker: their views of a shared folder may differ for a while."""
        key = parse_checkpoint_name(candidates[-1]) if candidates else None
        told = torch.tensor([1, *key] if key else [0, 0, 0], dtype=torch.int64, device=self.world.device)
        self.world.sum_([told])
        there, step, attempt = told.tolist()
        return checkpoint_name(step, attempt) if there else ""

    def _damage(self, name: str) -> CheckpointError | None:
        """What is wrong with this worker's share of a checkpoint's files."""
        try:
            files = manifest.record_of(self.vault, name).files
            manifest.check_files(self.vault, name, {f: files[f] for f in sorted(files)[self.world.rank :: self.world.size]})
        except CheckpointError as error:
            return error
        return None

    def _load(self, name: str, targets: dict[str, Tensor]) -> Progress:
        files = manifest.record_of(self.vault, name).files
        state = State({file: self.vault.open(name, file) for file in sorted(files) if file.endswith(SUFFIX)})
        parts = {key: shards.part(tensor, self.world.rank) for key, tensor in targets.items()}
        present = set(state.names())
        for key, mine in parts.items():
            if key not in present or (state.shape(key), state.dtype(key)) != (mine.shape, mine.local.dtype):
                raise CheckpointError(f"{name} does not hold this run's {key}.", "The job or the code has changed since: start a new job.")
        with torch.no_grad():
            for key in state.names():
                if key in parts and parts[key].local.numel():
                    _fill(parts[key], state, key)
        known = {f.name for f in fields(Progress)}
        told = json.loads(vault.read(self.vault, name, PROGRESS))
        return Progress(**{key: value for key, value in told.items() if key in known})

    # -- writing

    def _mine(self, state: dict[str, Tensor]) -> dict[str, shards.Part]:
        """What this worker writes of a state."""
        parts = {key: shards.part(tensor, self.world.rank) for key, tensor in state.items()}
        return {key: part for key, part in parts.items() if part.writes}

    def begin(self, state: dict[str, Tensor], progress: Progress, record: CheckpointRecord, adapter: Callable[[Path], None] | None) -> None:
        """Start to save, and go on at once (after the checkpoint before, where that is still on its way).

        A thread copies this worker's parts of `state` to host memory; until `wait_copied` nothing may change them. Then it writes them,
        and the leader's calls `adapter(folder)`: what that writes must be copies already. Raises what `settle` raises.
        """
        started = time.perf_counter()
        if self._pending is not None:
            self.finish()
        if progress.step == self._saved_step:  # saved or restored just now: a good checkpoint is never written over
            return
        self._told(self._publishing)
        self._saved_step = progress.step
        record = record.model_copy(update={"attempt": self.run.attempt, "world_size": self.world.size})
        save = _Save(checkpoint_name(progress.step, self.run.attempt), progress.step, state, json.dumps(asdict(progress)), record, adapter)
        self._pending = save
        on_device = _after_now(self.world.device)
        self._writing = _Task(lambda: self._work(save, on_device))
        save.stall_s += time.perf_counter() - started

    def wait_copied(self) -> None:
        """Wait until the state may change. (What went wrong while it was copied, `settle` raises.)"""
        if self._pending is not None and not self._pending.copied.is_set():
            started = time.perf_counter()
            self._pending.copied.wait()
            self._pending.stall_s += time.perf_counter() - started

    def written(self) -> bool:
        """This worker's vote: nothing is on its way, or its part is durable."""
        self._voted = self._pending
        return self._pending is None or (self._writing is not None and not self._writing.is_alive() and self._writing.error is None)

    def settle(self, all_written: bool) -> None:
        """With every worker's vote: the leader publishes, tells and prunes, in a thread.

        Raises what went wrong since: Fenced where a later attempt holds the lease, Unavailable where storage failed again and again. The
        checkpoints before are left as they are.
        """
        if self._writing is not None and not self._writing.is_alive():
            self._told(self._writing)
        if self._publishing is not None and not self._publishing.is_alive():
            self._told(self._publishing)
        if all_written and self._pending is not None and self._pending is self._voted:
            self._publish()

    def finish(self) -> None:
        """Wait until the checkpoint on its way is published; a collective. Raises what `settle` raises, on every worker."""
        self._together(lambda: self._told(self._writing))

        def publish() -> None:
            self._publish()
            self._told(self._publishing)

        self._together(publish)

    def _publish(self) -> None:
        save, self._pending = self._pending, None
        if self._leader and save is not None:
            self._told(self._publishing)
            self._publishing = _Task(lambda: self._make_public(save))

    def _work(self, save: _Save, on_device: Callable[[], Any]) -> None:
        """The writing thread."""
        try:
            with on_device(), torch.no_grad():
                if self._reserving is not None:
                    self._reserving.join()
                mine = self._mine(save.state)
                self._image.take(mine)
        finally:
            save.state = {}
            save.copied.set()
        try:
            self._patiently(save, lambda: self._write(save, bool(mine)))
        except Unavailable:  # of a full disk, give back what was taken; the rest goes when the job is started again
            with suppress(OSError, Unavailable):
                self.vault.remove(save.name, shard_file(self.world.rank))
            raise

    def _write(self, save: _Save, has_shard: bool) -> None:
        self.run.check_lease()
        files: dict[str, Stated] = {}
        if self._leader:
            self.vault.remove(save.name, MANIFEST)  # this attempt's own and damaged, from before a worker was lost
            files[PROGRESS] = self.vault.write(save.name, PROGRESS, save.progress.encode())
        if has_shard:
            file = shard_file(self.world.rank)
            files[file] = self.vault.write(save.name, file, self._image.content)
        if self._leader and save.adapter is not None:
            publish_adapter(self.run, save.step, save.adapter)
        self.vault.write(save.name, _note(self.world.rank), json.dumps(files).encode())

    def _make_public(self, save: _Save) -> None:
        """The leader's thread, once all have written their parts."""
        record = self._patiently(save, lambda: self._write_manifest(save))
        self._proven = {save.name}
        told = ""
        if record.valid_loss is not None:
            told = f", validation loss {record.valid_loss:.4f} (perplexity {math.exp(min(record.valid_loss, 700)):.4g})"
        with suppress(OSError):  # the loop meets the same when it writes its metrics, and says so
            self._events.event(
                f"Checkpoint at step {record.step}: training loss {record.train_loss:.4f}{told}.",
                stall_s=round(save.stall_s, 3),
                written_s=round(time.perf_counter() - save.began, 3),
                bytes=sum(int(stated["bytes"]) for stated in record.files.values()),
            )
        try:
            self._tidy(save.name, record)
        except (OSError, Unavailable) as error:  # the next checkpoint tries again
            with suppress(OSError):
                self._events.event(f"Old checkpoints could not be deleted: {_why(error)}.", "warn")

    def _write_manifest(self, save: _Save) -> CheckpointRecord:
        files: dict[str, Stated] = {}
        for rank in range(self.world.size):
            files |= json.loads(vault.read(self.vault, save.name, _note(rank)))
        record = save.record.model_copy(update={"files": dict(sorted(files.items()))})
        if not manifest.sizes_match(self.vault, save.name, record):
            raise OSError("files that were written are not there")
        text = seal(record)
        self.run.check_lease()
        self.vault.write(save.name, MANIFEST, text.encode())
        if self.part.to is not None:  # the service looks into the run directory
            write_atomic(self.run.path("checkpoints", save.name, MANIFEST), text)
        return record

    def _tidy(self, name: str, record: CheckpointRecord) -> None:
        for file in set(self.vault.files(name)) - {*record.files, MANIFEST}:
            self.vault.remove(name, file)
        for old in prune(self.vault, self.part.keep_last, self.part.keep_best, self._proven, self._damaged):
            if self.part.to is not None:
                shutil.rmtree(self.run.path("checkpoints", old), ignore_errors=True)

    # -- what can go wrong

    def _patiently(self, save: _Save, act: Callable[[], T]) -> T:
        """Try again where storage fails; raise Unavailable when that does not help."""
        for wait_s in RETRIES_S:
            try:
                return act()
            except (OSError, Unavailable) as error:
                with suppress(OSError):
                    self._events.event(
                        f"Writing the checkpoint of step {save.step} failed ({_why(error)}); trying again in {wait_s:g} s.", "warn"
                    )
            time.sleep(wait_s)
        try:
            return act()
        except (OSError, Unavailable) as error:
            raise Unavailable(
                f"The checkpoint of step {save.step} could not be written to {self.vault.where}: {_why(error)}.",
                "Free or mend that storage; the job then goes on from the checkpoint before, which is kept.",
            ) from error

    def _told(self, task: _Task | None) -> None:
        """Wait for a thread and raise what it met."""
        if task is not None:
            task.join()
            if task.error is not None:
                raise task.error

    def _together(self, act: Callable[[], T]) -> T:
        """What `act` returns; where it raises on one worker, all raise. A collective."""
        error: Exception | None = None
        result: T | None = None
        try:
            result = act()
        except Exception as caught:
            error = caught
        failed = torch.tensor([error is not None, isinstance(error, UserError)], dtype=torch.int64, device=self.world.device)
        self.world.sum_([failed])
        if error is not None:
            raise error
        if failed[0]:
            kind = SpecError if failed[1] else Unavailable
            raise kind(f"Another worker could not use the checkpoints in {self.vault.where}.", "Its own error says why.")
        return result  # type: ignore[return-value]


def adapter_name(step: int) -> str:
    return f"step-{step:06d}"


def publish_adapter(run: RunDir, step: int, adapter: Callable[[Path], None]) -> None:
    """`adapters/step-000100`, whole or not there; it can be served at once."""
    target = run.path("adapters", adapter_name(step))
    if target.exists():  # an attempt before this one made the same step
        return
    scratch = run.path("adapters", f".{adapter_name(step)}.a{run.attempt}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    adapter(scratch)
    vault.sync(scratch)
    scratch.rename(target)
    vault.sync(target.parent)


def _why(error: OSError | Unavailable) -> str:
    told = error.message if isinstance(error, Unavailable) else error.strerror or str(error)
    return told.rstrip(".")


def _note(rank: int) -> str:
    """The file in which a worker tells the leader what it wrote."""
    return f"shard-{rank + 1:05d}.json"


def _fill(mine: shards.Part, state: State, key: str) -> None:
    if not mine.shape:
        mine.local.copy_(state.read(key))
        return
    rows = state.read(key, mine.offset[0], mine.offset[0] + mine.local.shape[0])
    columns = tuple(slice(o, o + n) for o, n in zip(mine.offset[1:], mine.local.shape[1:], strict=True))
    mine.local.copy_(rows[(slice(None), *columns)])


def _after_now(device: str) -> Callable[[], Any]:
    """A context for another thread, in which copies from a GPU see what has been asked of it up to now, and wait for nothing later."""
    if not device.startswith("cuda"):
        return nullcontext
    index, done = torch.cuda.current_device(), torch.cuda.Event()
    done.record()

    def enter() -> Any:
        torch.cuda.set_device(index)
        stream = torch.cuda.Stream()
        stream.wait_event(done)
        return torch.cuda.stream(stream)

    return enter
