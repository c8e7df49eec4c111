"""LoRA adapters at run time: read from PEFT folders, shared by requests, and mixed in one batch.

All adapters of a batch are stacked along the rank: with A = [A1; A2; ...] and B = [B1 B2 ...], one pair of matmuls computes
every adapter for every token, and a 0/1 mask between the two keeps to each token its own adapter's ranks. So the cost grows
with the summed rank, not with the number of adapters, and a batch of bare-base tokens pays nothing. A stacked adapter's weights are
views of the stack: nothing is in memory twice.

Shape legend: T tokens, I in features, O out features, R summed rank of the batch's adapters, r rank of one adapter.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from serve.packed import packed
from serve.plain import beyond_plain
from trainers.errors import ModelError, Unavailable

CPU = torch.device("cpu")
PREFIX = "base_model.model."  # PEFT's name for the model that it wraps


@dataclass(eq=False)
class Adapter:
    """One adapter in memory: module name -> (A of shape r x I, scaled and transposed B of shape r x O)."""

    path: str
    rank: int
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    num_users: int = 0
    """Running requests; while it is above zero the adapter stays."""
    is_gone: bool = False
    """Evicted: only running requests may still use it."""
    num_bytes: int = field(init=False)
    serial: int = field(init=False, default_factory=count(1).__next__)
    """Tells this load from any other, also of the same path."""

    def __post_init__(self) -> None:
        self.num_bytes = sum(t.nbytes for pair in self.weights.values() for t in pair)


def load_adapter(path: str, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, device: torch.device = CPU) -> Adapter:
    """Read a PEFT LoRA folder, onto `device`, for a base whose linear layers have these (O, I) shapes.

    Raises ModelError if files are missing, the adapter uses more than plain LoRA, or it was made for another base.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = int(config["r"])
        scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder.name}: not a readable PEFT LoRA adapter ({type(error).__name__}: {error}).",
            "It needs adapter_config.json with `r` and `lora_alpha`, and adapter_model.safetensors.",
        ) from None
    if more := beyond_plain(config):
        raise ModelError(
            f"{folder.name}: `{more}` is more than the plain LoRA that a shared base can answer with.", "Serve the merged model instead."
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(name, {})[part] = tensor
    weights = {}
    for name, pair in pairs.items():
        if name not in shapes or set(pair) != {"lora_A", "lora_B"}:
            raise ModelError(
                f"{folder.name}: adapts `{name}` ({', '.join(sorted(pair))}), which this base cannot take.",
                "Serve it on its own base model.",
            )
        num_out, num_in = shapes[name]
        a, b = pair["lora_A"], pair["lora_B"]
        if a.shape != (rank, num_in) or b.shape != (num_out, rank):
            raise ModelError(
                f"{folder.name}: `{name}` has shapes {tuple(a.shape)} and {tuple(b.shape)}, "
                f"the base needs {(rank, num_in)} and {(num_out, rank)}.",
                "Serve it on the base model that it was trained on.",
            )
        weights[name] = (a.to(device, dtype), (b.float() * scaling).T.contiguous().to(device, dtype))
    return Adapter(path, rank, weights)


class AdapterRegistry:
    """The adapters in memory, least recently used first; safe to use from any thread."""

    def __init__(self, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, max_bytes: int, device: torch.device = CPU) -> None:
        self.shapes, self.dtype, self.max_bytes, self.device = shapes, dtype, max_bytes, device
        self._loaded: OrderedDict[str, Adapter] = OrderedDict()
        self._leaving: set[Adapter] = set()  # evicted, but still in use
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # apart, so that a slow read never keeps the scheduler from releasing

    def acquire(self, path: str) -> Adapter:
        """The adapter of this folder, loaded if need be, held until `release`.

        Raises ModelError if it cannot be used, Unavailable if running requests hold all of the memory.
        """
        if adapter := self.hold(path):
            return adapter
        with self._loading:
            if adapter := self.hold(path):  # another request has just loaded it
                return adapter
            adapter = load_adapter(path, self.shapes, self.dtype, self.device)
            with self._lock:
                self._make_room(adapter.num_bytes)
                self._loaded[path] = adapter
                adapter.num_users = 1
            return adapter

    def release(self, adapter: Adapter) -> None:
        with self._lock:
            adapter.num_users -= 1
            if adapter.num_users == 0:
                self._leaving.discard(adapter)

    def evict(self, path: str) -> None:
        """Forget an adapter; requests that run with it go on, and hold its memory until they end."""
        with self._loading, self._lock:  # what is being loaded is evicted, too
            if adapter := self._loaded.pop(path, None):
                self._part_with(adapter)

    def loaded(self) -> list[str]:
        """Paths that new requests find in memory, least recently used first."""
        with self._lock:
            return list(self._loaded)

    @property
    def num_bytes(self) -> int:
        """Of all adapters in memory."""
        with self._lock:
            return self._num_bytes()

    def hold(self, path: str) -> Adapter | None:
        """The adapter of this folder, held until `release`, if it is in memory."""
        with self._lock:
            if adapter := self._loaded.get(path):
                self._loaded.move_to_end(path)
                adapter.num_users += 1
            return adapter

    def _make_room(self, num_bytes: int) -> None:
        idle = [a for a in self._loaded.values() if a.num_users == 0]
        free = self.max_bytes - self._num_bytes()
        if num_bytes > free + sum(a.num_bytes for a in idle):
            raise Unavailable(
                f"The adapter needs {num_bytes:,} bytes; running requests hold the rest of the {self.max_bytes:,} for adapters.",
                "Ask again shortly, or raise max_adapter_bytes.",
            )
        for adapter in idle:
            if num_bytes <= free:
                break
            self._part_with(self._loaded.pop(adapter.path))
            free += adapter.num_bytes

    def _num_bytes(self) -> int:
        return sum(a.num_bytes for a in (*self._loaded.values(), *self._leaving))

    def _part_with(self, adapter: Adapter) -> None:
        adapter.is_gone = True
        if adapter.num_users:
            self._leaving.add(adapter)


PATIENCE_STEPS = 32
"""That a mix stays larger than twice of what is used."""


@dataclass
class Mix:
    """Which adapters the current batch uses, shared by all adapted layers of one model."""

    adapters: tuple[Adapter, ...] = ()
    mask_TR: torch.Tensor | None = None
    """1 where the token's own adapter has its ranks; None for a batch of the bare base."""
    stacked: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Module name -> (A of shape R x I, B of shape R x O); modules that no adapter touches are left out."""
    _wasteful_steps: int = 0

    def choose(self, adapters_T: Sequence[Adapter | None]) -> None:
        """Set the batch: one adapter (or none) for each token."""
        present = dict.fromkeys(a for a in adapters_T if a is not None)
        if not present:
            self.mask_TR = None
            return
        # Stacking takes longer than a few idle ranks do: who was here stays a while, as far as it does not double the work.
        room = sum(a.rank for a in present)
        is_wasteful = sum(a.rank for a in self.adapters) > 2 * room
        self._wasteful_steps = self._wasteful_steps + 1 if is_wasteful else 0
        is_missing = not present.keys() <= set(self.adapters)
        if is_missing or self._wasteful_steps > PATIENCE_STEPS or any(a.is_gone and a not in present for a in self.adapters):
            idle = list[Adapter]()
            for adapter in self.adapters:
                if adapter not in present and not adapter.is_gone and adapter.rank <= room:
                    idle.append(adapter)
                    room -= adapter.rank
            self._stack((*present, *idle))
            self._wasteful_steps = 0
        like = next(iter(self.stacked.values()))[0]
        place = {a: i for i, a in enumerate(self.adapters)}
        owner_R = torch.tensor([i for a, i in place.items() for _ in range(a.rank)])
        owner_T = torch.tensor([place[a] if a is not None else -1 for a in adapters_T])
        self.mask_TR = (owner_T[:, None] == owner_R[None, :]).to(like)

    def let_go(self) -> None:
        """Nothing runs: free the memory of evicted adapters."""
        self.mask_TR = None
        if any(a.is_gone for a in self.adapters):
            self._stack(tuple(a for a in self.adapters if not a.is_gone))

    def _stack(self, adapters: tuple[Adapter, ...]) -> None:
        """Concatenate the adapters' weights along the rank, with zeros where an adapter leaves a module alone."""
        left, self.adapters = [a for a in self.adapters if a not in adapters and (a.num_users or not a.is_gone)], adapters
        names = dict.fromkeys(name for a in adapters for name in a.weights)
        for name in {**names, **self.stacked}:
            for adapter in left:  # it takes its weights along, so that the old stack is free
                if pair := adapter.weights.get(name):
                    adapter.weights[name] = (pair[0].clone(), pair[1].clone())
            self.stacked.pop(name, None)
            if name not in names:
                continue
            like_a, like_b = next(a.weights[name] for a in adapters if name in a.weights)
            parts_a, parts_b = [], []
            for adapter in adapters:
                a, b = adapter.weights.get(name) or (None, None)
                parts_a.append(like_a.new_zeros(adapter.rank, like_a.shape[1]) if a is None else a)
                parts_b.append(like_b.new_zeros(adapter.rank, like_b.shape[1]) if b is None else b)
            stacked_a, stacked_b = torch.cat(parts_a), torch.cat(parts_b)
            self.stacked[name] = (stacked_a, stacked_b)
            first = 0
            for adapter in adapters:
                if name in adapter.weights:
                    here = slice(first, first + adapter.rank)
                    adapter.weights[name] = (stacked_a[here], stacked_b[here])
                first += adapter.rank


class MixedLinear(nn.Module):
    """A linear layer plus what the batch's adapters add to it."""

    def __init__(self, linear: nn.Module, name: str, mix: Mix) -> None:
        super().__init__()
        self.linear, self.name, self.mix = linear, name, mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: 1 x T x I -> 1 x T x O."""
        y = self.linear(x)
        if self.mix.mask_TR is not None and (pair := self.mix.stacked.get(self.name)):
            a_RI, b_RO = pair
            y[0].addmm_((x[0] @ a_RI.T).mul_(self.mix.mask_TR), b_RO)
        return y


def make_adaptable(model: nn.Module) -> tuple[Mix, dict[str, tuple[int, int]]]:
    """Put a MixedLinear in place of every linear layer inside the decoder layers; returns the mix and the (O, I) shapes by name."""
    mix, shapes = Mix(), {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            shapes[name] = (module.out_features, module.in_features)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, MixedLinear(packed(module), name, mix))
    return mix, shapes
