"""Checkpoints on storage that fills up, goes away and comes back: disks and s3://."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from tests.numerics import runs
from tests.trainers import checkpoints as parts
from tests.trainers.checkpoints import blank, events, restored, save, saver, sharded, values, workers
from trainers import checkpoint, vault
from trainers.checkpoint import Progress, State
from trainers.errors import SpecError, Unavailable
from trainers.parallel import World
from trainers.records import RunDir
from trainers.spec import CheckpointPart


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RETRIES_S", (0.01, 0.02, 0.03))


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
