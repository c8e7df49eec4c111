"""What one worker of a sharded step allocates, without the machine: fake tensors, a fake process group, and a count of every storage.

Every tensor that is made is seen (a TorchDispatchMode below autograd and above the fake mode), every storage is followed until it is freed
or resized, and says at the end which component it belonged to; so the components of the peak add up to the peak exactly. What torch's
own tracker counts by hooks, and over-counts where DTensor works out shapes with whole fake tensors, is counted here by storage.

Stands for a GPU, with the limits of a simulation on a CPU: the kernels' own scratch memory and the allocator's gaps are not in it, and what
lives on another CUDA stream is freed when Python lets go of it.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trainers import attention, loss, methods, model, nf4, parallel
from trainers import optim as optimizers
from trainers.learner import Learner
from trainers.qlora import QLoraLinear
from trainers.spec import DataPart, Full, JobSpec, Lora, Optim, QLora, Scale, Source

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072}
OPTIM = Optim(learning_rate=1e-4)
OTHER = "activations"
"""What nothing else claims."""


class Ledger(TorchDispatchMode):
    """Use as a context, around the step and inside the fake mode."""

    def __init__(self) -> None:
        super().__init__()
        self.label: str | None = None
        self._numbers = itertools.count()
        self._alive: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self._component: dict[int, str] = {}
        self._changes: list[tuple[int, int]] = []
        self._moments: dict[str, int] = {}
        self._blind = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back with its local tensors
        out = func(*args, **(kwargs or {}))
        if not self._blind:
            for value in tree_iter(out):
                if isinstance(value, Tensor):
                    self._see(value.untyped_storage())
        return out

    def mark(self, tensors: Iterable[Tensor], component: str) -> None:
        """These tensors' storages are, and have been all the time, of this component."""
        for tensor in tensors:
            local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            self._component[self._see(local.untyped_storage())] = component

    def moment(self, name: str) -> None:
        """Remember what there is now."""
        self._moments[name] = len(self._changes)

    @contextmanager
    def labelled(self, component: str) -> Iterator[None]:
        """What is made inside is of this component, unless it is marked as another."""
        before, self.label = self.label, component
        try:
            yield
        finally:
            self.label = before

    def within(self, function: Callable[..., Any], component: str) -> Callable[..., Any]:
        """`function`, with what it makes labelled."""

        def labelled(*args: Any, **kwargs: Any) -> Any:
            with self.labelled(component):
                return function(*args, **kwargs)

        return labelled

    @contextmanager
    def fsdp(self) -> Iterator[None]:
        """Tell apart what FSDP2 allocates: gathered weights, gradients before and after they are reduced."""
        reduce = groups.foreach_reduce  # pyright: ignore[reportPrivateImportUsage]
        resize = torch.UntypedStorage.resize_
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def reducing(parameters: Any, gradients: list[Tensor], *args: Any, **kwargs: Any) -> Any:
            self.mark(gradients, "unreduced")
            with self.labelled("gradients"):
                out = reduce(parameters, gradients, *args, **kwargs)
            self.mark([out[0]], "unreduced")
            return out

        def resizing(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            out = resize(storage, size)
            with self.labelled("gathered"):
                self._see(storage)
            return out

        def propagating(*args: Any, **kwargs: Any) -> Any:
            self._blind = True  # fake tensors of the global shape, which no worker ever holds
            try:
                return propagate(*args, **kwargs)
            finally:
                self._blind = False

        group = groups.FSDPParamGroup
        with ExitStack() as stack:
            for owner, name, new in (
                (groups, "foreach_reduce", reducing),
                (torch.UntypedStorage, "resize_", resizing),
                (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagating),
                (group, "unshard", self.within(group.unshard, "gathered")),
                (group, "wait_for_unshard", self.within(group.wait_for_unshard, "gathered")),
            ):
                stack.enter_context(mock.patch.object(owner, name, new))
            yield

    def peaks(self) -> dict[str, int]:
        """Component -> the most it ever took, in bytes; not all at the same moment."""
        return self._play()[1]

    def peak(self) -> dict[str, int]:
        """Component -> bytes at the moment when all together were at their highest."""
        return self._play()[0]

    def at(self, moment: str) -> dict[str, int]:
        """Component -> bytes at a remembered moment."""
        now: dict[str, int] = defaultdict(int)
        for number, change in self._changes[: self._moments[moment]]:
            now[self._component.get(number, OTHER)] += change
        return dict(now)

    def _play(self) -> tuple[dict[str, int], dict[str, int]]:
        now: dict[str, int] = defaultdict(int)
        most: dict[str, int] = defaultdict(int)
        highest: dict[str, int] = {}
        total = best = 0
        for number, change in self._changes:
            component = self._component.get(number, OTHER)
            now[component] += change
            total += change
            most[component] = max(most[component], now[component])
            if total > best:
                best, highest = total, dict(now)
        return highest, dict(most)

    def _see(self, storage: torch.UntypedStorage) -> int:
        key = storage._cdata
        number = self._alive.get(key)
        if number is None:
            number = self._alive[key] = next(self._numbers)
            self._bytes[number] = 0
            if self.label:
                self._component[number] = self.label
            weakref.finalize(storage, self._gone, key, number)
        self._set(number, storage.nbytes())
        return number

    def _gone(self, key: int, number: int) -> None:
        if self._alive.get(key) == number:
            del self._alive[key]
        self._set(number, 0)

    def _set(self, number: int, size: int) -> None:
        if change := size - self._bytes[number]:
            self._changes.append((number, change))
            self._bytes[number] = size


def step(config: Mapping[str, Any], method: Lora | QLora | Full, scale: Scale, world: int, tokens: int, optim: Optim = OPTIM) -> Ledger:
    """Build a Learner and make one step of two micro-batches, each one example of so many tokens, all supervised, as worker 0 of `world`.

    `config` is what config.json would say. All is our own code but for values: no file is read, and nothing is drawn.
    """
    spec = JobSpec(data=DataPart(train=[Source(path="none")]), method=method, scale=scale, optim=optim)
    place = parallel.World(0, world, "cpu")
    ledger = Ledger()
    nf4.dynamic_code(torch.device("cpu"))  # it is cached: a fake one would be there for all who come later
    with _process_group(world), TemporaryDirectory() as scratch, ExitStack() as stack:
        (Path(scratch) / "config.json").write_text(json.dumps({**LLAMA, **config}), encoding="utf-8")
        (Path(scratch) / "model.safetensors").touch()
        stack.enter_context(mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(min(world, 8))}))
        over = parallel.mesh(place, scale.sharding)  # outside the fake mode: it looks at the workers' real numbers
        for owner, name, new in (
            (parallel, "mesh", lambda *_: over),
            (Learner, "_read", _read_nothing),
            (methods.of(method), "initialise", lambda *_: None),
            (model, "cross_entropy_sum", ledger.within(model.cross_entropy_sum, "head")),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        stack.enter_context(mock.patch.dict(loss.LOGIT_BYTES, {"cpu": loss.LOGIT_BYTES["cuda"]}))
        if over is None:  # a fake parameter cannot take the place of one on the meta device
            stack.enter_context(mock.patch.object(torch.nn.Module, "to_empty", _to_empty))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        learner = Learner.build(spec, Path(scratch), place)
        batch = _one_example(tokens)
        stack.enter_context(ledger.fsdp())
        stack.enter_context(ledger)
        _mark_state(ledger, learner)
        ledger.moment("start")
        learner.zero()
        for count in ("first", "second"):
            total: Any
            total, _ = learner.trainee(batch)
            ledger.moment(f"{count} forward")
            total.backward()
            ledger.moment(f"{count} backward")
        del total
        ledger.mark(learner.gradients(), "gradients")
        if scale.master == "fp32":  # that of bf16 masters asks for the step's number, which a fake tensor does not have
            learner.update(1e-4)
        ledger.moment("update")
    return ledger


def _read_nothing(learner: Learner, folder: Path) -> None:
    """In the place of reading: only four-bit layers need a weight to come into being."""
    for module in learner.trainee.modules():
        if isinstance(module, QLoraLinear):
            module.take_weight(torch.empty(module.shape, dtype=torch.bfloat16))


def _to_empty(module: torch.nn.Module, *, device: str) -> torch.nn.Module:
    for owner in module.modules():
        for name, old in owner.named_parameters(recurse=False):
            setattr(owner, name, torch.nn.Parameter(torch.empty_like(old, device=device), old.requires_grad))
        for name, old in owner.named_buffers(recurse=False):
            setattr(owner, name, torch.empty_like(old, device=device))
    return module


def _mark_state(ledger: Ledger, learner: Learner) -> None:
    trained = list(learner.parameters.values())
    ledger.mark((p for p in learner.trainee.parameters() if not p.requires_grad), "weights")
    ledger.mark(learner.trainee.buffers(), "weights")
    ledger.mark(trained, "weights" if learner.spec.method.type == "full" else "adapters")
    ledger.mark((m for m, p in zip(learner.masters.values(), trained, strict=True) if m is not p), "masters")
    ledger.mark(optimizers.state(learner.optimizer, learner.masters).values(), "optimizer")


def _one_example(tokens: int) -> model.MicroBatch:
    """As on a GPU: attention takes the bounds of the examples."""
    positions = torch.zeros(1, tokens, dtype=torch.int64)
    packing = attention.Packing(positions, bounds=torch.zeros(2, dtype=torch.int32), longest=tokens)
    places = torch.zeros(tokens - 1, dtype=torch.int64)
    return model.MicroBatch(torch.zeros_like(positions), packing, places, torch.zeros_like(places), torch.zeros(tokens - 1))


@contextmanager
def _process_group(size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
