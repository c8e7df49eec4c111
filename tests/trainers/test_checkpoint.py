"""Checkpoints as the loop makes them: whole or not there, the newest and the best kept, and one writer only."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.trainers import checkpoints as parts
from tests.trainers.checkpoints import blank, events, names, restored, save, saver, sharded, values, workers
from trainers import checkpoint, vault
from trainers.checkpoint import Progress
from trainers.errors import CheckpointError, Fenced, Unavailable
from trainers.parallel import World
from trainers.records import Lease, RunDir
from trainers.spec import CheckpointPart


@pytest.fixture
def said() -> list[str]:
    return []


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
