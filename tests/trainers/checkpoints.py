"""What the tests of checkpoints share: states of known values, workers as threads, and workers as processes that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainers.checkpoint import Checkpointer, Progress, folders
from trainers.parallel import World
from trainers.records import CheckpointRecord, RunDir
from trainers.spec import CheckpointPart

SHAPES = {"a.weight": (7, 3), "b.weight": (2, 5), "c.bias": (4,), "d.norm": (1,)}


def values(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state whose every number depends on the step."""
    draw = torch.Generator().manual_seed(step)
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        state[f"model.{name}"] = torch.randn(shape, generator=draw).to(dtype)
        state[f"optimizer.{name}.exp_avg"] = torch.randn(shape, generator=draw)
        state[f"optimizer.{name}.step"] = torch.tensor(float(step))
    return state


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.full_like(value, -1) for key, value in state.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def record(step: int, valid_loss: float | None = None) -> CheckpointRecord:
    return CheckpointRecord(step=step, files={}, train_loss=1.0, train_accuracy=0.5, valid_loss=valid_loss)


def save(saver: Checkpointer, step: int, state: dict[str, Tensor] | None = None, valid_loss: float | None = None) -> None:
    """One whole checkpoint, as the last one of a run is made."""
    saver.begin(values(step) if state is None else state, Progress(step=step, trained_tokens=step), record(step, valid_loss), None)
    saver.finish()


def saver(root: Path, attempt: int = 1, world: World | None = None, **part: Any) -> Checkpointer:
    return Checkpointer(RunDir(root, attempt, "train"), world or World(), CheckpointPart(**part))


def events(root: Path) -> list[str]:
    return [e.message for _, found in RunDir(root).events() for e in found]


def restored(root: Path, say: Callable[[str], None] = lambda _: None, **part: Any) -> tuple[int, dict[str, Tensor]]:
    """(step, state) that a new attempt begins with."""
    got = blank(values(0))
    return saver(root, 9, **part).restore(got, say).step, got


def names(root: Path) -> list[str]:
    return [folder.name for folder in folders(RunDir(root))]


# -- workers as threads ------------------------------------------------------------------------------------------------------


class Meeting:
    """Where threads add up what they bring."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self.brought: dict[int, list[Tensor]] = {}


class ThreadWorld(World):
    """A World whose workers are threads of this process."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "meeting", meeting)

    def sum_(self, tensors: Any) -> None:
        meeting: Meeting = self.meeting  # type: ignore[attr-defined]
        meeting.brought[self.rank] = [t.clone() for t in tensors]
        meeting.barrier.wait()
        for i, tensor in enumerate(tensors):
            tensor.copy_(sum(brought[i] for brought in meeting.brought.values()))
        meeting.barrier.wait()

    def barrier(self) -> None:
        self.meeting.barrier.wait()  # type: ignore[attr-defined]


def workers(size: int, act: Callable[[World], Any]) -> list[Any]:
    """What `act` returned, or the error that it raised, on each of `size` workers."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = act(ThreadWorld(rank, size, meeting))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


_MESHES: dict[tuple[int, tuple[int, ...]], DeviceMesh] = {}
_ONE_GROUP = threading.Lock()


def mesh_of(rank: int, shape: tuple[int, ...]) -> DeviceMesh:
    """The mesh as the worker of this rank sees it, which is enough to say where its parts lie: the group that made it is gone."""
    with _ONE_GROUP:
        if (rank, shape) not in _MESHES:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=rank, world_size=torch.Size(shape).numel(), store=FakeStore())
            _MESHES[rank, shape] = init_device_mesh("cpu", shape)
            dist.destroy_process_group()
        return _MESHES[rank, shape]


def sharded(state: dict[str, Tensor], mesh: DeviceMesh) -> dict[str, Tensor]:
    """What one worker holds of a state: its rows of each tensor (on a mesh of two dimensions the first are copies: HSDP); scalars whole."""
    placements = (Shard(0),) if mesh.ndim == 1 else (Replicate(), Shard(0))

    def part(whole: Tensor) -> Tensor:
        if not whole.dim():
            return whole.clone()
        shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
        local = whole[offset[0] : offset[0] + shape[0]].clone()
        meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
        return DTensor(local, DTensorSpec(mesh, placements, meta), requires_grad=False)

    return {key: part(value) for key, value in state.items()}


# -- workers as processes ----------------------------------------------------------------------------------------------------


def start(act: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Run a function of this module in a process of its own; they are cheap, since the server that forks them has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainers.checkpoints"])
    process = context.Process(target=act, args=arguments)
    process.start()
    return process


def save_for_ever(root: Path, first: int, num_rows: int) -> None:
    """Checkpoint after checkpoint, until killed."""
    mine = saver(root, attempt=first)
    shapes = {"a": (num_rows, 64)}
    step = mine.restore(blank(values(0, shapes)), print).step
    while True:
        step += 1
        save(mine, step, values(step, shapes))


def save_with_little_room(root: Path, max_bytes: int) -> None:
    """Save a small and a big state where no file may have more bytes than so many; exits with 3 where that is told as it must be."""
    from trainers import checkpoint
    from trainers.errors import Unavailable

    checkpoint.RETRIES_S = (0.01, 0.01)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    mine = saver(root)
    save(mine, 1)
    try:
        save(mine, 2, {"model.a": torch.zeros(max_bytes)})
    except Unavailable as error:
        os._exit(3 if "File too large" in str(error) else 4)
    os._exit(5)


def in_a_group(rank: int, size: int, meeting: str, root: Path) -> None:
    """A real process group: save on a 2-D mesh (HSDP) and on a 1-D one, read each on the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    world = World(rank, size)
    hybrid, flat = init_device_mesh("cpu", (2, size // 2)), init_device_mesh("cpu", (size,))
    for step, (source, target) in enumerate([(hybrid, flat), (flat, hybrid)], start=1):
        mine = saver(root, step, world)
        mine.restore(sharded(blank(values(0)), source), print)
        save(mine, step, sharded(values(step), source))
        got = sharded(blank(values(0)), target)
        assert saver(root, step, world).restore(got, print).step == step
        want = values(step)
        for key, value in got.items():
            assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, want[key]), key
    dist.destroy_process_group()
