"""Checkpoints of several workers: any number of them, and torch too, reads what any other number wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.trainers import checkpoints as parts
from tests.trainers.checkpoints import blank, save, saver, sharded, values, workers
from trainers import checkpoint, shards, vault
from trainers.checkpoint import State
from trainers.parallel import World
from trainers.records import RunDir

MESHES = [(1,), (2,), (3,), (4,), (2, 1), (2, 2), (1, 3)]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    wrote=st.sampled_from(MESHES),
    reads=st.sampled_from(MESHES),
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_number_of_workers_reads_what_any_other_wrote(
    tmp_path: Path, wrote: tuple[int, ...], reads: tuple[int, ...], shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    whole = values(1, {str(i): shape for i, shape in enumerate(shapes)}, dtype)
    size = torch.Size(wrote).numel()
    results = workers(size, lambda world: save(saver(root, world=world), 1, sharded(whole, parts.mesh_of(world.rank, wrote))))
    assert results == [None] * size

    size = torch.Size(reads).numel()

    def read(world: World) -> dict[str, Tensor]:
        got = sharded(blank(whole), parts.mesh_of(world.rank, reads))
        assert saver(root, 2, world).restore(got, print).step == 1
        return got

    results = workers(size, read)
    for rank, got in enumerate(results):
        assert not isinstance(got, BaseException), got
        want = sharded(whole, parts.mesh_of(rank, reads))
        for key, value in want.items():
            mine, theirs = shards.part(got[key], rank), shards.part(value, rank)
            assert torch.equal(mine.local, theirs.local), (key, rank)
    state = State(checkpoint.folders(RunDir(root))[-1])
    for key, value in whole.items():
        assert (state.shape(key), state.dtype(key)) == (tuple(value.shape), value.dtype)
        assert torch.equal(state.read(key), value)
        if value.dim():
            assert torch.equal(state.read(key, len(value) // 2, len(value)), value[len(value) // 2 :])


def test_workers_read_only_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"model.a": torch.randn(4000, 100)}
    workers(2, lambda world: save(saver(tmp_path, world=world), 1, sharded(whole, parts.mesh_of(world.rank, (2,)))))
    counted = [0]
    plain = vault.LocalFile.read_into

    def counting(self: vault.LocalFile, at: int, view: memoryview) -> None:
        counted[0] += len(view)
        plain(self, at, view)

    monkeypatch.setattr(vault.LocalFile, "read_into", counting)
    workers(4, lambda world: saver(tmp_path, 2, world).restore(sharded(blank(whole), parts.mesh_of(world.rank, (4,))), print))
    assert counted[0] < 2.1 * whole["model.a"].nbytes  # all of it once for the hashes, shared, and once for the rows


def test_in_real_process_groups(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path}/meeting"
    group = [parts.start(parts.in_a_group, rank, 4, meeting, tmp_path / "run") for rank in range(4)]
    for process in group:
        process.join()
    assert [process.exitcode for process in group] == [0] * 4
    assert sorted(p.name for p in checkpoint.folders(RunDir(tmp_path / "run"))[0].glob("*.safetensors")) == [
        f"shard-0000{i}-model-00001-of-00001.safetensors"
        for i in (1, 2)  # the copies write nothing
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_it_too(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import hf_storage, state_dict_loader

    workers(3, lambda world: save(saver(tmp_path, world=world), 2, sharded(values(2), parts.mesh_of(world.rank, (3,)))))
    (folder,) = checkpoint.folders(RunDir(tmp_path))
    got = blank(values(2))
    state_dict_loader.load(got, storage_reader=hf_storage.HuggingFaceStorageReader(str(folder)))
    assert parts.same(got, values(2))
    assert len(load_file(sorted(folder.glob("*.safetensors"))[0])) > 1  # each shard is plain safetensors


def test_torch_writes_what_we_read(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import hf_storage, state_dict_saver

    state = {"model.a": torch.randn(7, 3), "model.b": torch.randn(4).bfloat16()}
    with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
        state_dict_saver.save(state, storage_writer=hf_storage.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    got = State(tmp_path)
    assert parts.same({name: got.read(name) for name in got.names()}, state)
