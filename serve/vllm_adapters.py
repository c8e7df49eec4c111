"""Which LoRA adapters a vLLM engine holds: a bounded number, loaded from PEFT folders, and none let go of while a request uses it.

vLLM reads an adapter that it does not hold while it decodes, and a failure there ends it. So adapters are read and checked here first,
loaded by a call of its own, and removed here: vLLM never has to choose one, or to read a folder that may be gone. Everything runs in
the engine's event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch

from serve.adapters import load_adapter
from trainers.errors import ModelError, Unavailable


class Loader(Protocol):
    """What vLLM does with adapters; each has a number."""

    async def load(self, number: int, path: str) -> None: ...

    async def remove(self, number: int) -> None: ...


@dataclass(eq=False)
class Held:
    """One adapter that vLLM holds."""

    path: str
    number: int
    """Never used twice: vLLM's cached keys and values belong to it, and another adapter may come to the same path."""
    num_bytes: int
    num_users: int = 0


class HeldAdapters:
    """The adapters of one engine, least recently used first."""

    def __init__(self, loader: Loader, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, most: int, most_rank: int) -> None:
        self._loader, self._shapes, self._dtype = loader, shapes, dtype
        self._most, self._most_rank = most, most_rank
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._leaving: set[Held] = set()
        self._numbers = count(1)
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def using(self, path: str) -> AsyncIterator[Held]:
        """The adapter of a PEFT folder, held meanwhile.

        Raises ModelError if it cannot be used, Unavailable if running requests use as many others as fit.
        """
        async with self._changing:
            adapter = self._held.get(path) or await self._load(path)
            self._held.move_to_end(path)
            adapter.num_users += 1
        try:
            yield adapter
        finally:
            adapter.num_users -= 1
            if adapter in self._leaving and not adapter.num_users:
                await self._remove(adapter)

    async def evict(self, path: str) -> None:
        """Forget an adapter, at the end of the last request that uses it."""
        async with self._changing:
            if adapter := self._held.pop(path, None):
                self._leaving.add(adapter)
                if not adapter.num_users:
                    await self._remove(adapter)

    def forget(self) -> None:
        """vLLM was started anew and holds none."""
        self._held.clear()
        self._leaving.clear()

    @property
    def num_bytes(self) -> int:
        """Of all weights, as they are read; vLLM keeps room for its highest rank besides."""
        return sum(a.num_bytes for a in (*self._held.values(), *self._leaving))

    def __len__(self) -> int:
        return len(self._held)

    async def _load(self, path: str) -> Held:
        read = await asyncio.to_thread(load_adapter, path, self._shapes, self._dtype)
        if read.rank > self._most_rank:
            raise ModelError(
                f"The adapter has rank {read.rank}; this engine takes adapters of rank {self._most_rank} at most.",
                "Raise max_adapter_rank of the engine, or serve the merged model.",
            )
        if len(self._held) + len(self._leaving) >= self._most:
            idle = next((a for a in self._held.values() if not a.num_users), None)
            if idle is None:
                raise Unavailable(
                    f"Running requests use {self._most} adapters, which is all that this engine holds.",
                    "Ask again shortly, or raise max_adapters.",
                )
            del self._held[idle.path]
            await self._remove(idle)
        adapter = Held(path, next(self._numbers), read.num_bytes)
        await self._loader.load(adapter.number, path)
        self._held[path] = adapter
        return adapter

    async def _remove(self, adapter: Held) -> None:
        self._leaving.discard(adapter)
        await self._loader.remove(adapter.number)
