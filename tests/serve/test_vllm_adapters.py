"""The book-keeping of adapters for vLLM; in place of vLLM, something that writes down what it is told."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from serve.vllm_adapters import HeldAdapters
from tests.serve.conftest import make_adapter
from trainers import model as base_model
from trainers.errors import ModelError, Unavailable


class Told:
    """What vLLM would hold."""

    def __init__(self) -> None:
        self.holds: dict[int, str] = {}

    async def load(self, number: int, path: str) -> None:
        assert number not in self.holds
        await asyncio.sleep(0)  # others get their turn, as beside the real one
        self.holds[number] = path

    async def remove(self, number: int) -> None:
        del self.holds[number]


@pytest.fixture(scope="module")
def shapes(tiny: Path) -> dict[str, tuple[int, int]]:
    modules = base_model.skeleton(tiny, torch.float32).named_modules()
    return {name: (m.out_features, m.in_features) for name, m in modules if isinstance(m, torch.nn.Linear) and ".layers." in name}


def book(shapes: dict[str, tuple[int, int]], most: int) -> tuple[HeldAdapters, Told]:
    told = Told()
    return HeldAdapters(told, shapes, torch.float32, most, most_rank=8), told


def test_one_load_serves_everybody_and_idle_ones_make_room(shapes: dict[str, tuple[int, int]], adapters: list[str]) -> None:
    async def run() -> None:
        held, told = book(shapes, most=2)

        async def use(path: str) -> int:
            async with held.using(path) as adapter:
                assert told.holds[adapter.number] == path
                await asyncio.sleep(0.01)
                return adapter.number

        assert len(set(await asyncio.gather(*(use(adapters[0]) for _ in range(5))))) == 1
        await use(adapters[1])
        await use(adapters[0])
        await use(adapters[2])
        assert sorted(told.holds.values()) == sorted([adapters[0], adapters[2]])  # the least recently used one went
        assert len(held) == 2 and held.num_bytes > 0

    asyncio.run(run())


def test_what_is_in_use_stays(shapes: dict[str, tuple[int, int]], adapters: list[str]) -> None:
    async def run() -> None:
        held, told = book(shapes, most=2)
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(held.using(adapters[0]))
            await stack.enter_async_context(held.using(adapters[1]))
            with pytest.raises(Unavailable, match="2 adapters"):
                await stack.enter_async_context(held.using(adapters[2]))
            await held.evict(adapters[0])
            assert first.number in told.holds
            with pytest.raises(Unavailable):  # what is on its way out still takes room
                await stack.enter_async_context(held.using(adapters[0]))
        assert first.number not in told.holds
        async with held.using(adapters[0]) as anew:
            assert anew.number != first.number

    asyncio.run(run())


def test_what_does_not_fit_is_refused_and_takes_no_room(
    shapes: dict[str, tuple[int, int]], adapters: list[str], tiny: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        held, told = book(shapes, most=1)
        high = make_adapter(tiny, tmp_path / "high", seed=4, r=16)
        for path in (high, str(tmp_path / "nowhere")):
            with pytest.raises(ModelError):
                async with held.using(path):
                    pass
        async with held.using(adapters[0]):
            assert list(told.holds.values()) == [adapters[0]]

    asyncio.run(run())
