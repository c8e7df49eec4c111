"""Scaling: the same steps on one worker and on several, one core each, in turns of whole rounds.

    python -m tests.benchmarks.scaling [--methods lora full] [--workers 2] [--steps 6] [--rounds 3] [--output RESULT.json]

SmolLM2-135M in bf16. LoRA is data-parallel; full fine-tuning is sharded (FSDP2). The batch is the same, so each worker has its part of
it. Efficiency is how much faster the workers are, by their number; 1 is the most there can be. Workers on one machine share its memory
bandwidth, so a figure of two cores is not one of two machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RATE = 1e-4


def work(method: str, sharding: str, data: list[str], batch_size: int, steps: int, scratch: Path) -> None:
    """One worker; the leader prints real tokens a second after a step that pays for what is made once."""
    import torch

    torch.set_num_threads(1)
    from trainers import resolve
    from trainers.batching import Order
    from trainers.catalogue import find
    from trainers.checkpoint import Progress
    from trainers.fetch import default_models, ensure
    from trainers.learner import Learner
    from trainers.parallel import World
    from trainers.prepare import prepare
    from trainers.records import RunDir
    from trainers.spec import JobSpec, Placement
    from trainers.store import TokenStore
    from trainers.train import train_step

    world, base = World.current(), find("smollm2-135m-instruct")
    model_dir = ensure(base, default_models())
    value = {
        "data": {"train": [{"path": p} for p in data], "validation": 0.0},
        "method": {"type": method},
        "optim": {"batch_size": batch_size},
        "scale": {"sharding": sharding},
    }
    spec = resolve.defaults(JobSpec.parse(value), base)
    prepared = prepare(spec, model_dir, scratch / "stores", RunDir(scratch / f"{method}-{world.rank}", 1, "bench"), executor="local")
    store = TokenStore(Path(prepared.store), "train")
    spec = resolve.schedule(spec, len(store), Placement(workers=world.size))
    order = Order(store.key, len(store), 1, batch_size, 0)
    learner = Learner.build(spec, model_dir, world)
    train_step(learner, store, order.step(0), Progress(step=0), RATE)
    tokens, start = 0, time.perf_counter()
    for number in range(1, steps + 1):
        chosen = order.step(number)
        train_step(learner, store, chosen, Progress(step=number), RATE)
        tokens += int(store.lengths[chosen].sum())
    if world.rank == 0:
        print(json.dumps(tokens / (time.perf_counter() - start)), flush=True)


def rate(workers: int, method: str, args: argparse.Namespace, scratch: str) -> float:
    """Tokens a second of so many workers."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        "-m",
        "tests.benchmarks.scaling",
    ]
    command += ["--data", *args.data, "--batch-size", str(args.batch_size), "--steps", str(args.steps), "--worker", method, scratch]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "examples/task_api/train.jsonl")], help="training files in any format")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("METHOD", "SCRATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        method, scratch = args.worker
        return work(method, "full" if method == "full" else "none", args.data, args.batch_size, args.steps, Path(scratch))

    result: dict[str, Any] = {
        "what": f"SmolLM2-135M, bf16, CPU; one worker and {args.workers}, one thread each, the same batch",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "data": [Path(p).name for p in args.data],
        "batch_size": args.batch_size,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.methods:
            rates = [(rate(1, method, args, scratch), rate(args.workers, method, args, scratch)) for _ in range(args.rounds)]
            speeds = {"1": [one for one, _ in rates], str(args.workers): [many for _, many in rates]}
            result[method] = {
                "tokens_per_s": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
                "efficiency": round(statistics.median(many / one / args.workers for one, many in rates), 3),
            }
            print(json.dumps({method: result[method]}, indent=2), flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
