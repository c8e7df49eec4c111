"""Small whole runs for the numerics tests: a random token store, a spec, and a training run over them."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trainers import resolve
from trainers.parallel import World, leave
from trainers.records import RunDir, TrainRecord
from trainers.spec import JobSpec, Placement
from trainers.store import StoreWriter, TokenStore, to_table
from trainers.train import train


def random_examples(rng: np.random.Generator, count: int, vocab: int = 300, longest: int = 40) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32[T], weights float32[T]) pairs with at least one supervised token and none on the first."""
    out = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        weights = (rng.random(length) < 0.4).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        out.append((rng.integers(4, vocab, length).astype(np.int32), weights))
    return out


def make_store(
    folder: Path, train_examples: int = 24, validation_examples: int = 4, seed: int = 0, slices: tuple[str | None, ...] = (None,)
) -> Path:
    rng = np.random.default_rng(seed)
    writer = StoreWriter(folder)
    for split, count in (("train", train_examples), ("validation", validation_examples)):
        ids, weights = zip(*random_examples(rng, count), strict=True)
        spans = [[(int(t), int(t) + 1) for t in np.flatnonzero(w)] for w in weights]
        writer.append(
            split, to_table(ids, spans, [f"{split}:{i + 1}" for i in range(count)], [slices[i % len(slices)] for i in range(count)])
        )
    writer.commit("{}")
    return folder


def make_spec(**sections: dict[str, Any]) -> JobSpec:
    """A resolved fp32 spec; sections override single keys."""
    value: dict[str, Any] = {
        "data": {"train": [{"path": "unused.jsonl"}]},
        "method": {"r": 4, "alpha": 8},
        "optim": {"epochs": 2, "batch_size": 5, "learning_rate": 0.01},
        "validate": {"every_steps": 4},
        "checkpoint": {"every_steps": 4},
        "scale": {"tokens_per_microbatch": 64, "precision": "fp32"},
    }
    for name, section in sections.items():
        value[name] = {**({} if section.get("type") == "full" else value.get(name, {})), **section}
    return JobSpec.parse(value)


def run_training(
    model_dir: Path, store: Path, folder: Path, spec: JobSpec, attempt: int = 1, should_stop: Callable[[], bool] = lambda: False
) -> TrainRecord:
    world = World.current()
    spec = resolve.schedule(spec, len(TokenStore(store, "train")), Placement())
    return train(spec, model_dir, store, RunDir(folder, attempt, "train"), world, should_stop=should_stop)


def free_port() -> int:
    """A port that nothing listens on, and that the system gives to nobody who asks for any: it stays free until it is taken."""
    while True:
        with socket.socket() as s, suppress(OSError):
            port = secrets.choice(range(20_000, 32_000))
            s.bind(("127.0.0.1", port))
            return port


def spawn(
    model_dir: Path, store: Path, folder: Path, specs: dict[str, JobSpec], attempt: int = 1, workers: int = 1, **env: str
) -> list[subprocess.Popen[str]]:
    """Processes that make each of these runs, one after the other, in `folder / name`; several workers form one world."""
    plan = folder / f"plan-{attempt}.json"
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps({name: spec.model_dump(mode="json", by_alias=True) for name, spec in specs.items()}))
    command = [sys.executable, "-m", "tests.numerics.runs", str(model_dir), str(store), str(folder), str(plan), str(attempt)]
    port = str(free_port())
    world = [{"RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(workers)]
    return [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **(place if workers > 1 else {}), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in world
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: float = 600) -> str:
    """Wait for all of them; what they printed. None may fail."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return "\n".join(outputs)


if __name__ == "__main__":
    import torch

    model_dir, store, folder, plan, attempt = sys.argv[1:]
    torch.set_num_threads(1)
    for name, value in json.loads(Path(plan).read_text()).items():
        record = run_training(Path(model_dir), Path(store), Path(folder) / name, JobSpec.parse(value), int(attempt))
        print(name, record.status, record.error or "", flush=True)
    leave(0)
