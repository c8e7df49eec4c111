"""The store gives back what was written, and does not exist unless it is whole."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers import store
from trainers.errors import StoreError
from trainers.store import StoreWriter, TokenStore, is_store, to_table


def example(i: int, num_tokens: int = 5) -> tuple[np.ndarray, np.ndarray, str, str | None]:
    """(ids, weights, id, slice) of example i; all but every third token are supervised."""
    weights = np.array([0.0] + [float(t % 3 > 0) for t in range(1, num_tokens)], np.float32)
    return np.arange(i, i + num_tokens, dtype=np.int32), weights, f"a.jsonl:{i}", None if i % 2 else f"s{i % 4}"


def table(*examples: tuple[np.ndarray, np.ndarray, str, str | None]) -> pa.Table:
    ids, weights, names, slices = zip(*examples, strict=True)
    spans = [[(int(t), int(t) + 1) for t in np.flatnonzero(w)] for w in weights]
    return to_table(ids, spans, names, slices)


def write(folder: Path, num_train: int = 10, num_validation: int = 3, at_once: int = 1) -> Path:
    writer = StoreWriter(folder)
    for i in range(0, num_train, at_once):
        writer.append("train", table(*(example(n, 2 + n % 7) for n in range(i, min(i + at_once, num_train)))))
    for i in range(num_validation):
        writer.append("validation", table(example(100 + i)))
    writer.commit('{"sources": []}')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("shard_rows", [1, 4, 10, 4096])
def test_rows_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_rows: int) -> None:
    monkeypatch.setattr(store, "SHARD_ROWS", shard_rows)
    folder = write(tmp_path / "stores" / "abc")
    train, validation = TokenStore(folder, "train"), TokenStore(folder, "validation")
    assert (len(train), len(validation), train.key) == (10, 3, "abc")
    for i in range(10):
        wanted_ids, wanted_weights, name, slice = example(i, 2 + i % 7)
        ids, weights = train.get(i)
        assert ids.dtype == np.int32 and weights.dtype == np.float32
        assert ids.tolist() == wanted_ids.tolist() and weights.tolist() == wanted_weights.tolist()
        assert (train.example_id(i), train.slice(i)) == (name, slice)
        assert (train.lengths[i], train.supervised[i]) == (len(wanted_ids), np.count_nonzero(wanted_weights))
    assert train.lengths.dtype == train.supervised.dtype == np.int32
    assert validation.get(2)[0][0] == 102
    train.verify()
    with pytest.raises(IndexError):
        train.get(10)


def test_ids_are_views_of_the_file(tmp_path: Path) -> None:
    ids, _ = TokenStore(write(tmp_path / "k"), "train").get(3)
    assert not ids.flags.owndata and not ids.flags.writeable


def test_an_empty_split_has_no_rows(tmp_path: Path) -> None:
    validation = TokenStore(write(tmp_path / "k", num_validation=0), "validation")
    assert len(validation) == 0 and validation.lengths.shape == (0,)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30), st.booleans())
def test_runs_are_exact(weights: list[float], joined: bool) -> None:
    spans = [(t, t + 1) for t, w in enumerate(weights) if w]
    if joined:
        runs = [(key, list(group)) for key, group in itertools.groupby(enumerate(weights), key=lambda pair: pair[1])]
        spans = [(group[0][0], group[-1][0] + 1) for key, group in runs if key]
    (row,) = to_table([np.arange(len(weights), dtype=np.int32)], [spans], ["a"], [None]).to_pylist()
    assert np.repeat(row["run_weights"], row["run_lengths"]).tolist() == weights
    assert all(a != b for a, b in itertools.pairwise(row["run_weights"])) and all(row["run_lengths"])
    assert (row["length"], row["supervised"]) == (len(weights), sum(weights))


def test_a_store_exists_only_once_committed(tmp_path: Path) -> None:
    folder = tmp_path / "k"
    writer = StoreWriter(folder)
    writer.append("train", table(example(0)))
    assert not folder.exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StoreError, match=r"manifest.json is missing"):
        TokenStore(folder, "train")


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.arrow", "data_report.json"])
def test_a_store_without_one_of_its_files_is_none(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "k")
    (folder / name).unlink()
    assert not is_store(folder)


def test_a_truncated_file_is_found_on_opening_a_flipped_byte_by_verify(tmp_path: Path) -> None:
    folder = write(tmp_path / "k")
    path = folder / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        TokenStore(folder, "train").verify()
    path.write_bytes(data[:-8])
    with pytest.raises(StoreError, match="size"):
        TokenStore(folder, "train")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        TokenStore(folder, "train")


def test_a_store_of_another_version_is_none(tmp_path: Path) -> None:
    folder = write(tmp_path / "k")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    assert not is_store(folder)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one = content(write(tmp_path / "a" / "k", 10_000))
    assert one == content(write(tmp_path / "b" / "k", 10_000, at_once=3_000)) == content(write(tmp_path / "c" / "k", 10_000, at_once=9_999))
    assert len(one) == 3 + 1 + 2


def test_writers_of_one_key_do_not_harm_each_other(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write, args=(tmp_path / "k",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    TokenStore(tmp_path / "k", "train").verify()


def test_the_first_store_stays_and_half_a_store_is_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path / "k")
    inode = folder.stat().st_ino
    assert write(folder).stat().st_ino == inode
    (folder / "manifest.json").unlink()
    assert is_store(write(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_what_dead_writers_left_goes_after_a_day(tmp_path: Path) -> None:
    StoreWriter(tmp_path / "dead").append("train", table(example(0)))
    (left,) = tmp_path.iterdir()
    write(tmp_path / "k")
    assert left.exists()  # it may still be alive
    os.utime(left, (0, 0))
    write(tmp_path / "l")
    assert not left.exists()
