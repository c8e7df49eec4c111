"""Checkpoints: whole or not there, wherever they lie, whoever reads them, whatever is damaged, full, gone or killed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.numerics import runs
from tests.trainers import checkpoints as parts
from tests.trainers.checkpoints import blank, events, save, saver, sharded, values, workers
from trainers import checkpoint, shards, vault
from trainers.checkpoint import Progress, State
from trainers.errors import CheckpointError, Fenced, SpecError, Unavailable
from trainers.parallel import World
from trainers.records import Lease, RunDir
from trainers.spec import CheckpointPart


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RETRIES_S", (0.01, 0.02, 0.03))


def restored(root: Path, say: Callable[[str], None] = lambda _: None, **part: Any) -> tuple[int, dict[str, Tensor]]:
    """(step, state) that a new attempt begins with."""
    got = blank(values(0))
    return saver(root, 9, **part).restore(got, say).step, got


def names(root: Path) -> list[str]:
    return [folder.name for folder in checkpoint.folders(RunDir(root))]


# -- the loop's calls ----------------------------------------------------------------------------------------------------------


def test_a_run_saves_and_goes_on(tmp_path: Path, said: list[str]) -> None:
    mine = saver(tmp_path)
    assert mine.restore(values(0), said.append) == Progress()
    progress = Progress(step=4, trained_tokens=7, history=[[4, 1.0, 2.0]], losses=[0.5], norms=[1.0, 2.0], skipped=1)
    mine.begin(values(4), progress, parts.record(4, 2.0), None)
    mine.wait_copied()
    mine.finish()
    got = blank(values(0))
    assert saver(tmp_path, 2).restore(got, said.append) == progress
    assert parts.same(got, values(4))
    assert said == [] and events(tmp_path) == ["Checkpoint at step 4: training loss 1.0000, validation loss 2.0000 (perplexity 7.389)."]
    (folder,) = checkpoint.folders(RunDir(tmp_path))
    assert sorted(p.name for p in folder.iterdir()) == [
        "MANIFEST.json",
        "progress.json",
        "shard-00001-model-00001-of-00001.safetensors",
    ]


def test_what_is_saved_is_the_state_at_begin(tmp_path: Path) -> None:
    mine, state, progress = saver(tmp_path), {"model.a": torch.ones(1000, 1000)}, Progress(step=1, losses=[1.0])
    mine.begin(state, progress, parts.record(1), None)
    progress.losses.append(2.0)
    mine.wait_copied()
    state["model.a"].zero_()
    mine.finish()
    got = {"model.a": torch.zeros(1000, 1000)}
    assert saver(tmp_path).restore(got, print).losses == [1.0]
    assert bool((got["model.a"] == 1).all())


def test_it_is_published_only_by_a_vote_on_it(tmp_path: Path) -> None:
    mine = saver(tmp_path)
    assert mine.written()
    mine.begin(values(1), Progress(step=1), parts.record(1), None)
    mine.settle(True)  # that vote was on nothing
    mine.wait_copied()
    while not mine.written():
        time.sleep(0.001)
    mine.settle(False)  # another worker is not done
    assert names(tmp_path) == []
    mine.settle(True)
    mine.finish()
    assert names(tmp_path) == ["step-000001-a1"]


def test_one_begun_while_another_is_written_waits_for_it(tmp_path: Path) -> None:
    mine = saver(tmp_path, keep_last=9)
    for step in range(1, 6):
        mine.begin(values(step), Progress(step=step), parts.record(step), None)
        mine.wait_copied()
    mine.finish()
    assert len(names(tmp_path)) == 5


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    mine = saver(tmp_path)
    save(mine, 3)
    before = (tmp_path / "checkpoints/step-000003-a1/MANIFEST.json").read_bytes()
    save(mine, 3)
    assert (tmp_path / "checkpoints/step-000003-a1/MANIFEST.json").read_bytes() == before


def test_adapters_are_there_before_the_manifest(tmp_path: Path) -> None:
    mine = saver(tmp_path)

    def adapter(folder: Path) -> None:
        assert names(tmp_path) == []
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"x")

    mine.begin(values(5), Progress(step=5), parts.record(5), adapter)
    mine.finish()
    assert (tmp_path / "adapters/step-000005/adapter_model.safetensors").read_bytes() == b"x"
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["step-000005"]


def test_a_state_that_does_not_fit_is_refused_and_nothing_of_it_is_taken(tmp_path: Path) -> None:
    save(saver(tmp_path), 1)
    for wrong in (
        {**blank(values(0)), "model.new": torch.zeros(2)},
        {**blank(values(0)), "model.a.weight": torch.zeros(7, 4)},
        {**blank(values(0)), "model.a.weight": torch.zeros(7, 3, dtype=torch.bfloat16)},
    ):
        before = {key: value.clone() for key, value in wrong.items()}
        with pytest.raises(CheckpointError, match=r"does not hold this run's model\.(new|a\.weight)"):
            saver(tmp_path).restore(wrong, print)
        assert parts.same(wrong, before)


# -- shards ------------------------------------------------------------------------------------------------------------------

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


# -- damage ------------------------------------------------------------------------------------------------------------------


def test_a_thousand_damages_fall_back_to_the_one_before(tmp_path: Path) -> None:
    mine = saver(tmp_path)
    save(mine, 1)
    save(mine, 2)
    newest = checkpoint.folders(RunDir(tmp_path))[-1]
    whole = {path: path.read_bytes() for path in newest.iterdir()}
    draw = random.Random(0)
    for case in range(1000):
        path = draw.choice(sorted(whole))
        content = bytearray(whole[path])
        kind = draw.choice(["truncate", "flip", "missing", "garbled", "longer"])
        if kind == "truncate":
            del content[draw.randrange(len(content)) :]
        elif kind == "flip":
            content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        elif kind == "garbled":
            start = draw.randrange(len(content))
            content[start : start + 64] = draw.randbytes(len(content[start : start + 64]))
        elif kind == "longer":
            content += b" " * draw.randrange(1, 9)
        path.unlink() if kind == "missing" else path.write_bytes(content)
        said: list[str] = []
        step, got = restored(tmp_path, said.append)
        assert step == 1 and parts.same(got, values(1)), (case, kind, path.name)
        assert len(said) == 1 and newest.name in said[0], said
        newest.mkdir(exist_ok=True)  # without its manifest it was removed
        for file, good in whole.items():
            file.write_bytes(good)
    assert restored(tmp_path)[0] == 2


def test_one_worker_that_finds_damage_is_enough(tmp_path: Path) -> None:
    for step in (1, 2):
        workers(3, lambda w, step=step: save(saver(tmp_path, step, w), step, sharded(values(step), parts.mesh_of(w.rank, (3,)))))
    shard = sorted(checkpoint.folders(RunDir(tmp_path))[-1].glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    said: list[str] = []

    def read(world: World) -> int:
        return saver(tmp_path, 3, world).restore(sharded(blank(values(0)), parts.mesh_of(world.rank, (3,))), said.append).step

    assert workers(3, read) == [1, 1, 1]
    assert len(said) == 1 and "step-000002-a2 is damaged" in said[0]


def test_where_all_are_damaged_a_run_begins_anew(tmp_path: Path, said: list[str]) -> None:
    mine = saver(tmp_path)
    for step in (1, 2):
        save(mine, step)
    for folder in checkpoint.folders(RunDir(tmp_path)):
        (folder / "progress.json").write_text("{}")
    assert restored(tmp_path, said.append)[0] == 0
    assert len(said) == 2


def test_the_other_attempts_checkpoint_of_a_step_is_used(tmp_path: Path) -> None:
    for attempt in (1, 2):
        save(saver(tmp_path, attempt), 5)
    newest = checkpoint.folders(RunDir(tmp_path))[-1]
    (newest / "progress.json").unlink()
    assert restored(tmp_path)[0] == 5
    assert checkpoint.fetch(RunDir(tmp_path), CheckpointPart(), 5).name == "step-000005-a1"
    with pytest.raises(CheckpointError, match="step 6 cannot be used: there is none"):
        checkpoint.fetch(RunDir(tmp_path), CheckpointPart(), 6)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]", b"\x10" + b"\0" * 7 + b'{"a":{"dtype":1}'])
def test_a_state_of_garbage_is_named(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(garbage)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no safetensors file"):
        State(tmp_path)


def test_a_missing_shard_is_found_out(tmp_path: Path) -> None:
    workers(3, lambda world: save(saver(tmp_path, world=world), 2, sharded(values(2), parts.mesh_of(world.rank, (3,)))))
    (folder,) = checkpoint.folders(RunDir(tmp_path))
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="values are there"):
        State(folder).read("model.a.weight")


# -- which stay --------------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    mine = saver(tmp_path, keep_last=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.0, 1.5, 1.0], start=1):
        save(mine, step, valid_loss=loss)
    assert names(tmp_path) == ["step-000005-a1", "step-000006-a1"]  # of equals the later one is the best
    save(mine, 7, valid_loss=4.0)
    save(mine, 8, valid_loss=4.0)
    assert names(tmp_path) == ["step-000006-a1", "step-000007-a1", "step-000008-a1"]
    best = checkpoint.best(RunDir(tmp_path), CheckpointPart())
    assert best is not None and best.step == 6
    mine = saver(tmp_path, 2, keep_last=1, keep_best=False)
    save(mine, 9)
    assert names(tmp_path) == ["step-000009-a2"]


@pytest.mark.parametrize("damage", ["truncate", "missing", "flip", "garbled manifest"])
def test_the_only_good_one_is_never_deleted(tmp_path: Path, damage: str) -> None:
    mine = saver(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(mine, step)
    for name in names(tmp_path)[1:]:
        shard = next((tmp_path / "checkpoints" / name).glob("*.safetensors"))
        if damage == "missing":
            shard.unlink()
        elif damage == "garbled manifest":
            (shard.parent / "MANIFEST.json").write_text("{")
        else:
            content = bytearray(shard.read_bytes())
            content[-1] ^= 1
            shard.write_bytes(content[: -1 if damage == "truncate" else None])
    checkpoint.prune(vault.Folder(tmp_path / "checkpoints"), 1, False)
    assert restored(tmp_path)[0] == 1


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    mine = saver(tmp_path, keep_last=2)
    for step in (1, 2):
        save(mine, step)
    progress = tmp_path / "checkpoints/step-000002-a1/progress.json"
    progress.write_bytes(progress.read_bytes().replace(b"2", b"3"))
    again = saver(tmp_path, 2, keep_last=2)
    assert again.restore(blank(values(0)), print).step == 1
    save(again, 2)
    assert names(tmp_path) == ["step-000001-a1", "step-000002-a2"]


# -- other writers -----------------------------------------------------------------------------------------------------------


def test_a_fenced_writer_publishes_nothing(tmp_path: Path) -> None:
    old = saver(tmp_path)
    save(old, 1)
    old.begin(values(2), Progress(step=2), parts.record(2), None)
    while not old.written():
        time.sleep(0.001)
    RunDir(tmp_path, 2).grant()  # when its part was already written
    old.settle(True)
    with pytest.raises(Fenced, match="replaced by attempt 2"):
        old.finish()
    fresh = saver(tmp_path)
    fresh.begin(values(3), Progress(step=3), parts.record(3), None)  # and one that finds it out before it writes
    fresh.wait_copied()
    with pytest.raises(Fenced):
        while True:
            fresh.settle(fresh.written())
            time.sleep(0.001)
    lease = RunDir(tmp_path).read("lease.json", Lease)
    assert lease is not None and lease.attempt == 2 and names(tmp_path) == ["step-000001-a1"]
    assert restored(tmp_path)[0] == 1 and names(tmp_path) == ["step-000001-a1"]


def test_killed_while_writing(tmp_path: Path) -> None:
    draw = random.Random(1)
    step = 0
    for attempt in range(1, 9):
        process = parts.start(parts.save_for_ever, tmp_path, attempt, 4000)
        deadline = time.monotonic() + 120
        pattern = "*-a1/MANIFEST.json" if attempt == 1 else f"*-a{attempt}"
        while not list((tmp_path / "checkpoints").glob(pattern)) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.join()
        shapes = {"a": (4000, 64)}
        got = blank(values(0, shapes))
        found = saver(tmp_path, 99).restore(got, print).step
        assert found >= step and (found == 0 or parts.same(got, values(found, shapes)))
        step = found
    assert step > 0
    assert all((folder / "MANIFEST.json").exists() for folder in (tmp_path / "checkpoints").iterdir())  # the rest was swept


# -- storage that fails ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, impatient: None) -> None:
    root = tmp_path / "run"
    mine = saver(root, to=str(small_disk))
    save(mine, 1)
    mine.begin({"model.a": torch.zeros(2**20)}, Progress(step=2), parts.record(2), None)
    mine.wait_copied()
    with pytest.raises(Unavailable, match=r"step 2 could not be written to .*small/run: No space left on device\. Free or mend"):
        while True:
            mine.settle(mine.written())
            time.sleep(0.001)
    assert sum("failed (No space left on device); trying again" in line for line in events(root)) == 3
    assert shutil.disk_usage(small_disk).free > 400_000  # what was taken is given back
    assert restored(root, to=str(small_disk))[0] == 1


def test_room_that_ends_and_comes_back(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RETRIES_S", (0.1,) * 1000)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(500_000))
    mine = saver(tmp_path / "run", to=str(small_disk))
    mine.begin({"model.a": torch.zeros(50_000)}, Progress(step=1), parts.record(1), None)
    mine.wait_copied()
    while not any("trying again" in line for line in events(tmp_path / "run")):
        time.sleep(0.01)
    filler.unlink()
    mine.finish()
    assert (small_disk / "run/step-000001-a1/MANIFEST.json").exists()


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    process = parts.start(parts.save_with_little_room, tmp_path, 100_000)
    process.join()
    assert process.exitcode == 3
    assert restored(tmp_path)[0] == 1


class S3:
    """A real S3 server (moto) that can be stopped and started again with what it held."""

    def __init__(self) -> None:
        self.port = runs.free_port()
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port)
        self.server.start()
        self.running = True

    def stop(self) -> None:
        if self.running:
            self.server.stop()
            self.running = False


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An S3 server with an empty bucket, and s3fs as the environment sets it up (but for its own many tries)."""
    import s3fs

    server = S3()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{server.port}/moto-api/reset", method="POST")).close()
    fsspec.filesystem("s3").mkdir("bucket")
    yield server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


TO = "s3://bucket/some/prefix"


def test_s3(s3: S3, tmp_path: Path, said: list[str]) -> None:
    root = tmp_path / "ftjob-1"
    for step in (1, 2, 3):
        workers(2, lambda w, step=step: save(saver(root, 1, w, to=TO), step, sharded(values(step), parts.mesh_of(w.rank, (2,)))))
    system = fsspec.filesystem("s3", use_listings_cache=False)
    assert sorted(system.ls("bucket/some/prefix/ftjob-1")) == [f"bucket/some/prefix/ftjob-1/step-00000{i}-a1" for i in (2, 3)]
    assert sorted(p.rpartition("/")[2] for p in system.ls("bucket/some/prefix/ftjob-1/step-000003-a1")) == [
        "MANIFEST.json",
        "progress.json",
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    ]
    assert sorted(p.parent.name for p in root.glob("checkpoints/*/MANIFEST.json")) == ["step-000002-a1", "step-000003-a1"]
    assert (
        system.cat("bucket/some/prefix/ftjob-1/step-000003-a1/MANIFEST.json")
        == (root / "checkpoints/step-000003-a1/MANIFEST.json").read_bytes()
    )
    best = checkpoint.best(RunDir(root), CheckpointPart(to=TO))
    assert best is not None and best.step == 3

    def read(world: World) -> int:
        got = sharded(blank(values(0)), parts.mesh_of(world.rank, (3,)))
        return saver(root, 2, world, to=TO).restore(got, said.append).step

    assert workers(3, read) == [3, 3, 3]
    assert restored(root, to=TO)[0] == 3 and parts.same(restored(root, to=TO)[1], values(3))
    folder = checkpoint.fetch(RunDir(root), CheckpointPart(to=TO), 3)
    state = State(folder)
    assert parts.same({name: state.read(name) for name in state.names()}, values(3))
    assert checkpoint.fetch(RunDir(root), CheckpointPart(to=TO), 3) == folder

    path = "bucket/some/prefix/ftjob-1/step-000003-a1/shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(system.cat(path))
    content[-1] ^= 1
    system.pipe(path, bytes(content))
    assert workers(3, read) == [2, 2, 2]
    assert any("is damaged" in line for line in said)


def test_a_big_upload_comes_in_parts(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "BLOCK_BYTES", 5 * 2**20)
    state = {"model.a": torch.arange(3 * 2**20).float()}
    save(saver(tmp_path / "r", to=TO), 1, state)
    got = blank(state)
    assert saver(tmp_path / "r", 2, to=TO).restore(got, print).step == 1 and parts.same(got, state)


@pytest.mark.parametrize("when", ["before it is written", "in the middle of a file", "before the manifest"])
def test_s3_that_goes_away(s3: S3, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(vault, "BLOCK_BYTES", 5 * 2**20)
    root = tmp_path / "ftjob-1"
    mine = saver(root, to=TO)
    save(mine, 1)
    if when == "before it is written":
        s3.stop()
    state = values(2) if when != "in the middle of a file" else {"model.a": torch.zeros(20 * 2**20)}
    mine.begin(state, Progress(step=2), parts.record(2), None)
    mine.wait_copied()
    if when == "in the middle of a file":
        time.sleep(0.1)
        s3.stop()
    while when == "before the manifest" and not mine.written():
        time.sleep(0.001)
    s3.stop()
    with pytest.raises(Unavailable, match=r"step 2 could not be written to s3://bucket/some/prefix/ftjob-1: .* does not answer"):
        while True:
            mine.settle(mine.written())
            time.sleep(0.001)
    assert sum("trying again" in line for line in events(root)) == 3
    with pytest.raises(Unavailable, match="does not answer"):  # never a start from scratch because storage is away for a while
        restored(root, to=TO)
    s3.start()
    assert restored(root, to=TO)[0] == 1


def test_s3_that_comes_back(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RETRIES_S", (0.1,) * 1000)
    root = tmp_path / "ftjob-1"
    mine = saver(root, to=TO)
    save(mine, 1)
    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.rm("bucket", recursive=True)  # the bucket vanishes, and is made again
    mine.begin(values(2), Progress(step=2), parts.record(2), None)
    while not any("trying again" in line for line in events(root)):
        time.sleep(0.01)
    system.mkdir("bucket")
    mine.finish()
    assert restored(root, to=TO)[0] == 2


@pytest.mark.parametrize(
    ("to", "problem"),
    [("s3://no-such-bucket/x", "bucket does not exist"), ("nowhere://x", "Protocol not known"), ("/proc/x", "No such file")],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_training(s3: S3, tmp_path: Path, to: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as caught:
        saver(tmp_path, to=to).restore({}, print)
    assert caught.value.param == "checkpoint.to"


def test_one_workers_error_is_every_workers(tmp_path: Path) -> None:
    def act(world: World) -> None:
        mine = saver(tmp_path, world=world)
        mine.begin(sharded(values(1), parts.mesh_of(world.rank, (2,))), Progress(step=1), parts.record(1), None)
        mine.wait_copied()
        if world.rank == 1:
            while not mine.written():
                time.sleep(0.001)
            mine._writing.error = Unavailable("Full.")  # type: ignore[union-attr]
        mine.finish()

    leader, other = workers(2, act)
    assert isinstance(leader, Unavailable) and "Another worker" in str(leader)
    assert isinstance(other, Unavailable) and str(other) == "Full."
    assert names(tmp_path) == []
