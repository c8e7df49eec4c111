from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.batching import Order, plan


@given(n=st.integers(1, 50), epochs=st.integers(1, 4), batch=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_epoch_visits_every_example_once_in_its_own_order(n: int, epochs: int, batch: int, seed: int) -> None:
    order = Order("store", n, epochs, batch, seed)
    visited = np.concatenate([order.step(s) for s in range(order.num_steps)])
    assert len(visited) == n * epochs
    for epoch in range(epochs):
        part = visited[epoch * n : (epoch + 1) * n]
        assert sorted(part) == list(range(n))
        assert list(part) == list(order.permutation(epoch))


def test_order_depends_on_data_seed_and_epoch_only() -> None:
    order = Order("store", 100, 2, 8, 0)
    assert list(order.permutation(0)) == list(Order("store", 100, 5, 3, 0).permutation(0))
    for other in (Order("store", 100, 2, 8, 1), Order("other", 100, 2, 8, 0)):
        assert list(order.permutation(0)) != list(other.permutation(0))
    assert list(order.permutation(0)) != list(order.permutation(1))


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(1, 300), max_size=60), ranks=st.integers(1, 5), budget=st.integers(16, 512))
def test_plan_places_every_example_once_within_budget(lengths: list[int], ranks: int, budget: int) -> None:
    placed = plan(lengths, ranks, budget)
    assert sorted(chain.from_iterable(chain.from_iterable(placed))) == list(range(len(lengths)))
    assert len(placed) == ranks
    assert len({len(rank) for rank in placed}) == 1  # collectives need the same number of micro-batches everywhere
    for pack in chain.from_iterable(placed):
        assert len(pack) <= 1 or sum(lengths[i] for i in pack) <= budget
    # No more micro-batches than best fit needs: of its packs no two fit into one, so they are at least half full on average.
    per_rank = len(placed[0])
    assert per_rank == 1 or sum(lengths) > ((per_rank - 1) * ranks + 1) // 2 * budget


def test_plan_fills_its_budget_and_balances_ranks() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, 256).tolist()
    placed = plan(lengths, 4, 2048)
    loads = [sum(lengths[i] for pack in rank for i in pack) for rank in placed]
    assert max(loads) - min(loads) <= 0.05 * max(loads)
    assert sum(lengths) / (2048 * sum(len([p for p in rank if p]) for rank in placed)) >= 0.9
