"""Training whose workers are killed again and again, at any moment: it ends where it would have, bit for bit.

TUNEYARD_KILLS says how many times (10 by default, 500 in a soak).
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.numerics import runs
from trainers import checkpoint
from trainers.records import RunDir
from trainers.spec import JobSpec

KILLS = int(os.environ.get("TUNEYARD_KILLS", "10"))
COMMON = {
    "optim": {"epochs": 3, "batch_size": 4},
    "validate": {"every_steps": 9, "samples": 1, "sample_tokens": 4},
    "checkpoint": {"every_steps": 2},
}
JOBS = {
    "lora on one worker": (1, runs.make_spec(**COMMON)),
    "full, sharded over two": (2, runs.make_spec(method={"type": "full"}, scale={"sharding": "full"}, **COMMON)),
}


def work(tiny: Path, store: Path, folder: Path, spec: str, attempt: int, place: dict[str, str]) -> None:
    """One worker, in a process of its own."""
    import torch

    os.environ.update(place)
    torch.set_num_threads(1)
    record = runs.run_training(tiny, store, folder, JobSpec.model_validate_json(spec), attempt)
    os._exit(0 if record.status == "finished" else 1)


def start(tiny: Path, store: Path, folder: Path, spec: JobSpec, attempt: int, workers: int) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")  # its server has torch loaded: a worker is there in no time
    context.set_forkserver_preload(["tests.chaos.test_training", "trainers.train", "transformers.models.llama.modeling_llama"])
    port = str(runs.free_port())
    group = []
    for rank in range(workers):
        place = {"RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if workers > 1 else {}
        group.append(context.Process(target=work, args=(tiny, store, folder, spec.model_dump_json(by_alias=True), attempt, place)))
        group[-1].start()
    return group


def state_of(folder: Path) -> dict[str, str]:
    """The hashes of the last checkpoint's shards."""
    newest = checkpoint.folders(RunDir(folder))[-1]
    checkpoint.read_manifest(newest, verify=True)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in newest.glob("*.safetensors")}


def strike(group: list[BaseProcess], run: RunDir, draw: random.Random, usual_s: float) -> bool:
    """Kill one worker of a group at some moment of its life, or while a checkpoint is written; whether it was still alive.

    Its peers stop on their own, but for those that still wait for it to start with them: these a launcher would stop, too.
    """
    before = set(checkpoint.folders(run))
    skipped, moment, anywhere = draw.randrange(4), draw.random() * usual_s, draw.random() < 0.5
    victim, began = draw.choice(group), time.monotonic()
    while victim.is_alive() and (waited := time.monotonic() - began) < usual_s:
        fresh = sorted(set(run.path("checkpoints").glob("step-*")) - before)
        if waited > moment if anywhere else len(fresh) > skipped and not (fresh[-1] / "MANIFEST.json").exists():
            break
        time.sleep(0.0005)
    victim.kill()
    victim.join()
    for peer in group if victim.exitcode else ():
        peer.join(10)
        peer.kill()
    return victim.exitcode != 0


@pytest.mark.parametrize(("workers", "spec"), JOBS.values(), ids=JOBS.keys())
def test_kills_change_nothing(tiny: Path, tmp_path: Path, workers: int, spec: JobSpec) -> None:
    store = runs.make_store(tmp_path / "stores" / "chaos")
    start(tiny, store, tmp_path / "first", spec, 1, 1)[0].join(60)  # the server of processes is up
    whole, began = RunDir(tmp_path / "whole"), time.monotonic()
    assert ended(start(tiny, store, whole.root, spec, 1, workers))
    usual_s = time.monotonic() - began

    draw, kills = random.Random(KILLS), 0
    while kills < KILLS / len(JOBS):
        run = RunDir(tmp_path / f"killed-{kills}")
        for attempt in itertools.count(1):
            RunDir(run.root, attempt, "runner").grant()
            group = start(tiny, store, run.root, spec, attempt, workers)
            if kills < KILLS / len(JOBS):
                kills += strike(group, run, draw, usual_s)
            if ended(group):
                break
        assert state_of(run.root) == state_of(whole.root)
        assert [(s.step, s.train_loss) for s in run.steps()] == [(s.step, s.train_loss) for s in whole.steps()]


def ended(group: list[BaseProcess]) -> bool:
    """Whether all came to the end by themselves."""
    for process in group:
        process.join(120)
    return all(process.exitcode == 0 for process in group)
