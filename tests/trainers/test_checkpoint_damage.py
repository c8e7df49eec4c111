"""Damaged checkpoints: whatever was done to the newest, a run goes on from the one before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.trainers import checkpoints as parts
from tests.trainers.checkpoints import blank, restored, save, saver, sharded, values, workers
from trainers import checkpoint
from trainers.checkpoint import State
from trainers.errors import CheckpointError
from trainers.parallel import World
from trainers.records import RunDir
from trainers.spec import CheckpointPart


@pytest.fixture
def said() -> list[str]:
    return []


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
