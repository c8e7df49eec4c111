"""A stand-in for the training driver, real in all that the runner sees: process, lease, run directory, outcome.

The training file's first row says how to behave:
{"steps": 5, "seconds": 0.1, "hold": 3, "end": "ok" | "refuse" | "crash", "stubborn": bool, "prepare_s": seconds}.
With `hold`, the first attempt waits after that step until it is told to stop, killed, or finds a file `go` in the run directory.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from trainers.control import should_stop
from trainers.errors import DataError, Fenced
from trainers.records import CheckpointRecord, ModelRecord, OutcomeRecord, RunDir, StepRecord, checkpoint_name
from trainers.spec import JobSpec


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--attempt", type=int, required=True)
    args = parser.parse_args()
    run = RunDir(args.run, args.attempt, "driver")
    spec = JobSpec.parse(json.loads(run.path("spec.json").read_text()))
    with Path(spec.data.train[0].path).open() as file:
        orders = json.loads(file.readline())
    if orders.get("stubborn") and args.attempt == 1:
        if child := os.fork():
            os.waitpid(child, 0)
            return
        os.setsid()  # the one that works outlives its supervisor
    run.path(f"pid-{args.attempt}").write_text(str(os.getpid()))
    try:
        work(run, orders)
    except Fenced as fenced:
        run.path(f"fenced-{args.attempt}").write_text(str(fenced))


def work(run: RunDir, orders: dict) -> None:
    steps, seconds = orders.get("steps", 3), orders.get("seconds", 0.02)
    print("at work", flush=True)
    run.event(f"Attempt {run.attempt} is at work.")
    if orders.get("end") == "crash":
        sys.exit("out of luck")
    if orders.get("end") == "refuse":
        error = DataError("train.jsonl:2 is not JSON.", "Mend line 2.", "training_file")
        run.write("outcome.json", OutcomeRecord(status="failed", error=error.to_dict()))
        return
    run.progress("prepare", done=0)
    time.sleep(orders.get("prepare_s", 0.0))
    run.progress("train", done=0)
    stop = should_stop(run, leader=True)
    done = max((s.step for s in run.steps()), default=0)
    for step in range(done + 1, steps + 1):
        if orders.get("stubborn") and run.attempt > 1:
            seconds = 0.01
        time.sleep(seconds)
        last = step == steps
        record = StepRecord(
            step=step, num_steps=steps, epoch=step / steps, train_loss=2.0 / step, train_accuracy=0.5, learning_rate=1e-3,
            grad_norm=1.0, tokens=10, supervised_tokens=5, seconds=seconds,
            valid_loss=1.0 if last else None, valid_accuracy=0.5 if last else None,
        )  # fmt: skip
        run.append("metrics", [record])
        run.progress("train", done=step, total=steps, train_loss=record.train_loss, left_s=1.0)
        while step == orders.get("hold") and run.attempt == 1 and not (stop() or run.path("go").exists()):
            run.check_lease()
            time.sleep(0.02)
        if stop() and not last:
            save(run, step, None)
            run.write("outcome.json", OutcomeRecord(status="stopped"))
            return
    adapter = run.path("adapters", f"step-{steps:06d}")
    adapter.mkdir(parents=True, exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    save(run, steps, 1.0)
    run.write("model.json", ModelRecord(base="smollm2-135m-instruct", adapter=f"adapters/step-{steps:06d}", merged=None, step=steps))
    run.path("digest").write_text(hashlib.sha256(repr(run.steps()).encode()).hexdigest())
    run.write("outcome.json", OutcomeRecord(status="succeeded"))


def save(run: RunDir, step: int, valid_loss: float | None) -> None:
    accuracy = None if valid_loss is None else 0.5
    manifest = CheckpointRecord(
        step=step, files={}, train_loss=2.0 / step, train_accuracy=0.5, valid_loss=valid_loss, valid_accuracy=accuracy
    )
    run.write(f"checkpoints/{checkpoint_name(step, run.attempt)}/MANIFEST.json", manifest)


if __name__ == "__main__":
    main()
