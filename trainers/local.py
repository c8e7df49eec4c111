"""Prepare and train in this process, or under torchrun: no Ray, no service. For debugging, and for GPU machines without Ray.

    python -m trainers.local JOB.yaml [--output FOLDER]
    torchrun --nproc-per-node=2 -m trainers.local JOB.yaml --output FOLDER

Run again, it goes on where it stopped. SIGTERM and Ctrl-C save a checkpoint at the next step.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

# Before torch is loaded: OpenMP threads that wait for each other spin briefly, then sleep. Measured on 2 cores: the default, which spins
# for milliseconds, is several times slower where something else uses a core too; not spinning at all costs 40% on idle cores; this 2%.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

from trainers import export, merge, resolve, weights
from trainers.catalogue import find_any
from trainers.chat import Chat
from trainers.errors import TuneyardError
from trainers.fetch import default_models, ensure
from trainers.parallel import World, leave
from trainers.prepare import prepare
from trainers.records import TEMPLATE_FILE, PrepareRecord, RunDir, StepRecord, TrainRecord, write_atomic
from trainers.spec import JobSpec, Placement
from trainers.store import TokenStore
from trainers.train import train


def run_local(spec: JobSpec, folder: Path, stores: Path) -> TrainRecord:
    """Prepare (on rank 0), train, merge. Returns the train record; raises TuneyardError."""
    world = World.current()
    base = find_any(spec.model.base)
    spec = resolve.defaults(spec, base)
    run = RunDir(folder, attempt=1, writer="local")
    if world.rank == 0:
        model_dir = ensure(base, default_models(), say=lambda line: print(line, flush=True))
        prepare(spec, model_dir, stores, run, executor="local")
    world.wait_for_leader()
    model_dir = ensure(base, default_models())
    prepared = run.read("prepare.json", PrepareRecord)
    assert prepared is not None
    store = Path(prepared.store)
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    place = Placement(workers=world.size, threads_per_worker=threads, device="cuda" if world.device == "cuda" else "cpu")
    spec = resolve.schedule(spec, len(TokenStore(store, "train")), place, weights.size(model_dir))
    if world.rank == 0:
        write_atomic(run.path("resolved.json"), spec.to_json())

    asked: list[int] = []  # signals that asked us to stop
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: asked.append(n))
    record = train(
        spec, model_dir, store, run, world, should_stop=lambda: bool(asked), on_step=_show if world.rank == 0 else lambda _: None
    )
    if world.rank == 0:
        run.write("train.json", record)
        if record.status == "finished" and record.best_step is not None:
            chat = Chat.load(model_dir, run.path(TEMPLATE_FILE).read_text(encoding="utf-8"))  # what the examples were rendered with
            made = merge.merge(run, spec, base.id, model_dir, record.best_step, merge.probes(chat, store))
            print(merge.told(spec, made), flush=True)
            export.export_all(run, spec, made)
    return record


def _show(record: StepRecord) -> None:
    valid = f"  valid {record.valid_loss:.4f}" if record.valid_loss is not None else ""
    rate = record.tokens / record.seconds
    print(f"step {record.step}/{record.num_steps}  loss {record.train_loss:.4f}{valid}  {rate:,.0f} tokens/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path, help="a job file (YAML or JSON)")
    # Not `--run`: torchrun takes that for the beginning of an option of its own.
    parser.add_argument("--output", type=Path, help="run directory; by default ./runs/{name of the job}")
    args = parser.parse_args()
    try:
        spec = JobSpec.load(args.job)
        folder = args.output or Path("runs") / spec.name
        record = run_local(spec, folder, folder.parent / "stores")
    except TuneyardError as error:
        print(f"error: {error.message}\n  fix: {error.remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step there is nothing to save; what is prepared stays
        return 130
    if record.status == "failed":
        print(f"error: {(record.error or {}).get('message')}", file=sys.stderr)
        return 1
    print(f"{record.status} at step {record.step} of {record.num_steps}; everything is in {folder}")
    return 0 if record.status == "finished" else 130


if __name__ == "__main__":
    ended = main()
    leave(ended)
    sys.exit(ended)
