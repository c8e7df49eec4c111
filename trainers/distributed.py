"""The training loop under Ray Train: places workers, restarts the group when one is lost, and hands back the loop's record.

Call from a process that is connected to a Ray cluster (the job's driver). The loop itself resumes from the run directory, so a
restarted group goes on from the newest whole checkpoint without Ray knowing anything about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.errors import Fenced, Unavailable
from trainers.records import RunDir, TrainRecord
from trainers.spec import JobSpec, Placement

ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",  # see trainers.local
    # The loop runs in a thread of the worker, whose own malloc arena gives memory back after every step and faults it in again.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
MAX_WORKER_LOSSES = 3
"""Times that one attempt restarts its worker group after losing a worker."""


def train_on_ray(spec: JobSpec, model_dir: Path, store: Path, run: RunDir, place: Placement) -> TrainRecord:
    """Run the loop on `place.workers` Ray Train workers. Raises Unavailable when workers kept dying."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = {
        "spec": spec.model_dump_json(),
        "model_dir": str(model_dir),
        "store": str(store),
        "run": str(run.root),
        "attempt": run.attempt,
        "threads": place.threads_per_worker,
    }
    gpu = place.device == "cuda"
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=place.workers, use_gpu=gpu, resources_per_worker={"GPU": 1} if gpu else {"CPU": place.threads_per_worker}
        ),
        run_config=RunConfig(
            name=f"{run.root.name}-{run.attempt}",
            storage_path=str(run.path("ray_train")),
            worker_runtime_env={"env_vars": ENVIRONMENT},
            failure_config=FailureConfig(max_failures=MAX_WORKER_LOSSES),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise Unavailable(f"Training workers failed {MAX_WORKER_LOSSES + 1} times ({_cause(error)}).", "See the job's logs.") from None
    run.check_lease()
    record = run.read("train.json", TrainRecord)
    if record is None:
        raise Unavailable("Training ended without a record.", "See the job's logs.")
    return record


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: run the loop; rank 0 writes its record, last."""
    import torch

    from trainers.parallel import World
    from trainers.train import train

    torch.set_num_threads(config["threads"])
    world = World.current()
    run = RunDir(config["run"], config["attempt"], writer="train")
    spec = JobSpec.model_validate_json(config["spec"])
    try:
        record = train(spec, Path(config["model_dir"]), Path(config["store"]), run, world)
        if world.rank == 0:
            run.write("train.json", record)
    except Fenced:
        return  # a later attempt goes on; raising would only make Ray restart this one


def _cause(error: Exception) -> str:
    """The innermost message of Ray's nested training errors, in one line."""
    failures = getattr(error, "worker_failures", None)
    text = str(next(iter(failures.values()))) if failures else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
