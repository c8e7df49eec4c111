from __future__ import annotations

import numpy as np
import torch

from serve.prefixes import MOST_ENTRIES, SHORTEST, Prefix, PrefixStore, shared


def ids(*numbers: int, length: int = 40) -> np.ndarray:
    """`length` ids that begin with these."""
    return np.array([*numbers, *range(1000, 1000 + length - len(numbers))], np.int32)


def prefix(ids_T: np.ndarray, adapter: int | None = None) -> Prefix:
    keys = torch.zeros(1, 1, len(ids_T), 4)
    return Prefix(adapter, ids_T, keys, keys.clone())


def test_shared() -> None:
    a = np.array([1, 2, 3], np.int32)
    assert [shared(a, np.array(b, np.int32)) for b in ([1, 2, 3, 4], [1, 9], [9], [], [1, 2, 3])] == [3, 1, 0, 0, 3]


def test_the_longest_beginning_of_the_same_adapter() -> None:
    store = PrefixStore(10**6)
    long, short, other = prefix(ids(1, length=60)), prefix(ids(1, length=30)), prefix(ids(1, length=60), adapter=7)
    store.keep(short)
    store.keep(prefix(ids(2)))
    assert store.find(None, ids(1, length=50)) == (short, 30)
    store.keep(long)
    store.keep(other)
    assert store.find(None, ids(1, length=50)) == (long, 50)
    assert store.find(7, ids(1, length=50)) == (other, 50) and store.find(8, ids(1, length=50)) == (None, 0)
    assert store.find(None, ids(3)) == (None, 0)
    assert store.find(None, ids(1, length=SHORTEST - 1)) == (None, 0)


def test_what_is_continued_leaves() -> None:
    store = PrefixStore(10**6)
    for length in (20, 30, 40):
        store.keep(prefix(ids(1, length=length)))
    assert len(store._kept) == 1 and store.num_bytes == prefix(ids(1)).num_bytes
    assert not store.wants(None, ids(1, length=35), 32) and store.wants(None, ids(1, length=45), 32)
    assert not store.wants(None, ids(5, length=SHORTEST - 1), 32) and not store.wants(None, ids(5), 10**6)


def test_the_least_recently_used_leaves() -> None:
    one = prefix(ids(1)).num_bytes
    store = PrefixStore(3 * one)
    for first in (1, 2, 3):
        store.keep(prefix(ids(first)))
    store.find(None, ids(1))
    store.keep(prefix(ids(4)))
    assert store.num_bytes == 3 * one
    assert [store.find(None, ids(first))[1] for first in (1, 2, 3, 4)] == [40, 0, 40, 40]
    store = PrefixStore(10**9)
    for first in range(MOST_ENTRIES + 9):
        store.keep(prefix(ids(first)))
    assert len(store._kept) == MOST_ENTRIES
