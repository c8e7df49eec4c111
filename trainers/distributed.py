"""The training loop under Ray Train: places workers, starts them again when some are lost, and hands back the loop's record.

Call from a process that is connected to a Ray cluster (the job's driver). Ray knows nothing of our checkpoints: the loop resumes from
the run directory, with whatever number of workers. So each start of the workers is a `fit()` of its own, without Ray's retries, which
keep the number of workers that they began with and count losses for ever: this file chooses the number from what is free and counts
losses since the last new checkpoint (`losses.py`). The token store is a folder of memory-mapped files and outlives every worker.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from trainers import manifest, resolve, vault, warm
from trainers.control import preempted, should_stop, wanted
from trainers.errors import Fenced, OutOfMemory, WorkerLost
from trainers.losses import MAX_LOSSES, Losses, why
from trainers.placement import Node, Short, choose
from trainers.records import MachineRecord, RunDir, TrainRecord, rank_log, write_atomic
from trainers.spec import JobSpec, Placement
from trainers.store import TokenStore

WORKER_ENVIRONMENT = {
    warm.WORKER: "1",
    "GOMP_SPINCOUNT": "20000",  # see trainers.local
    # The loop runs in a thread of the worker, whose own malloc arena gives memory back after every step and faults it in again.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
RAY_TRAIN_ENVIRONMENT = {  # and no watcher for preemption on a cluster of one machine: it is a process more to start
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how late the end of training, or of a worker, is seen; 2 by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how late a notice is seen; of the 30 s that some clouds give, 5 by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # what a worker prints goes to its own log
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # as Ray Train sets it; named here so that `get_ready` knows all that is set
    warm.SETUP_HOOK: "trainers.warm.begin",
}
PREEMPTION_GRACE_S = 30.0
"""How long workers on other machines may still write a checkpoint after one machine is gone."""
LOOK_S = 1.0
"""Seconds between two looks at free resources while too little is free."""
SETTLE_S = 10.0
"""The longest time that lost workers are given to free what they held."""

Advise = Callable[[JobSpec, Placement], str]
"""The plan that would fit into memory, in a sentence; empty where none is known."""


def train_on_ray(
    spec: JobSpec,
    model_dir: Path,
    store: Path,
    run: RunDir,
    *,
    workers: int | None = None,
    since: Mapping[str, float] | None = None,
    advise: Advise = lambda *_: "",
) -> TrainRecord:
    """Train until the loop has ended, or has stopped because `control.json` asked it to (then the record says `stopped`).

    `spec` has gone through `resolve.defaults`; what depends on the place is resolved here, at each start, and kept as `resolved.json`.
    `workers` overrides `scale.workers`. `since`: see `trainers.train.train`. Raises OutOfMemory or WorkerLost when workers kept dying.
    """
    _set_environment()
    place_of_checkpoints = vault.at(run, spec.checkpoint)
    num_examples = len(TokenStore(store, "train"))
    base_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    losses = Losses()
    for start in itertools.count(1):
        if start > 1 or run.attempt > 1:
            _settle()
        place = _room(spec, workers, run)
        if place is None:
            return TrainRecord(status="stopped")
        resolved = resolve.schedule(spec, num_examples, place, base_bytes)
        run.check_lease()
        write_atomic(run.path("resolved.json"), resolved.to_json())
        try:
            record = _fit(resolved, model_dir, store, run, place, start, dict(since or {}))
        except TrainingFailedError as error:
            run.check_lease()
            since = {"the loss": time.time()}
            loss = why(error)
            if loss.kind == "user":
                assert loss.error is not None
                record = TrainRecord(status="failed", error=loss.error.to_dict())
            elif loss.kind == "no room":
                run.event("Training workers found no room in time; looking again at what is free.", "warn")
                continue
            elif loss.kind == "preempted":
                run.event("A machine was taken away; training goes on with what is left.", "warn")
                continue
            else:
                step = max((s.step for s in run.steps()), default=0) + 1
                newest = max((r.step for r in manifest.readable(place_of_checkpoints).values()), default=0)
                losses = losses.after(loss, step, newest)
                likely = f" Most likely it needs more memory than there is. {advise(resolved, place)}".rstrip() if losses.memory else ""
                if losses.too_many:
                    raise _given_up(losses, step, loss.words, likely) from None
                run.event(
                    f"A training worker was lost in step {step} ({loss.words}); loss {losses.count} of {MAX_LOSSES} since the last new "
                    f"checkpoint. Training goes on from step {newest}.{likely}",
                    "warn",
                )
                continue
        if record.status == "stopped" and wanted(run).wanted == "run":
            run.event("A machine will be taken away; training goes on with what is left.", "warn")
            since = {"the notice": time.time()}
            continue
        if record.error is not None and record.error["code"] == OutOfMemory.code and (advice := advise(resolved, place)):
            record = record.model_copy(update={"error": {**record.error, "message": f"{record.error['message']} {advice}"}})
        return record
    raise AssertionError("unreachable")


def get_ready(spec: JobSpec, workers: int | None = None) -> None:
    """Have Ray start the processes that `train_on_ray` will need, beside whatever is done before it."""
    _set_environment()
    place = choose(spec.scale.workers if workers is None else workers, nodes())  # refuses now what could never be placed
    if not isinstance(place, Placement):
        return  # there is no room yet
    environment = constants.get_env_vars_to_propagate()
    machines = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: -node["Resources"].get("CPU", 0))
    left = place.workers
    for node in machines:  # the workers first: Ray starts few processes of a machine at a time, and these load the longest
        has = node["Resources"]
        room = int(has.get("GPU", 0)) if place.device == "cuda" else int(has.get("CPU", 0)) // place.threads_per_worker
        if count := min(left, room):
            warm.ahead(node, count, environment, WORKER_ENVIRONMENT)
            left -= count
    here = ray.get_runtime_context().get_node_id()
    warm.ahead(next(node for node in machines if node["NodeID"] == here), 1, environment)  # Ray Train's controller


def _set_environment() -> None:
    """What Ray Train passes on from this process to its controller, and from there to its workers."""
    os.environ.update(RAY_TRAIN_ENVIRONMENT, RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=str(int(len(nodes()) > 1)))
    constants.ENV_VARS_TO_PROPAGATE.add(warm.SETUP_HOOK)


def nodes() -> list[Node]:
    """The cluster's machines, but for those that are about to be taken away."""
    free, leaving = available_resources_per_node(), ray_state.get_draining_nodes()
    found = []
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in leaving:
            has, left = node["Resources"], free.get(node["NodeID"], {})
            found.append(Node(has.get("CPU", 0), left.get("CPU", 0), has.get("GPU", 0), left.get("GPU", 0)))
    return found


def _room(spec: JobSpec, workers: int | None, run: RunDir) -> Placement | None:
    """Where the workers go, once enough is free; None when the job is asked to stop while it waits."""
    demand: PlacementGroup | None = None
    told = ""
    try:
        while True:
            machines = nodes()
            asked = spec.scale.workers if workers is None else workers
            if workers is not None and not any(node.gpus for node in machines):
                asked = max(1, min(workers, int(sum(node.cpus for node in machines))))
                if asked < workers and not told:
                    told = f"{workers} workers were asked for, but there are {asked} CPUs"
                    run.event(f"{told}: training goes on with {asked}.", "warn")
            found = choose(asked, machines)
            if isinstance(found, Placement):
                if told:
                    run.progress("train", done=0)
                return found
            if wanted(run).wanted != "run":
                return None
            if found.reason != told:
                told = found.reason
                run.event(f"Training waits for room: {told}.")
                run.progress("train", doing=f"waiting for room: {told}", waits_for=found.unit)
            demand = _await(found, demand)
    finally:
        if demand is not None:
            remove_placement_group(demand)


def _settle() -> None:
    """Return once free resources have stood still for a second: Ray frees what workers held a moment after they ended, and training
    would go on with fewer than there are, or say that it waits for room."""
    seen, since = nodes(), time.monotonic()
    deadline = since + SETTLE_S
    while time.monotonic() < min(since + 1, deadline):
        time.sleep(0.1)
        if (now := nodes()) != seen:
            seen, since = now, time.monotonic()


def _await(short: Short, demand: PlacementGroup | None) -> PlacementGroup | None:
    """Wait a little with a standing request for what is missing, which is what an autoscaler answers; the request, if it still stands."""
    demand = demand or placement_group([{short.unit: 1.0}] * short.workers)
    if not demand.wait(LOOK_S):
        return demand
    remove_placement_group(demand)  # it holds now what the workers need
    time.sleep(LOOK_S / 4)
    return None


def _given_up(losses: Losses, step: int, words: str, likely: str) -> OutOfMemory | WorkerLost:
    told = f"Training workers were lost {losses.count} times without a new checkpoint in between, the last time in step {step} ({words})."
    if losses.memory:
        return OutOfMemory(f"{told}{likely}", "Lower `scale.tokens_per_microbatch`, or train where there is more memory.", "scale")
    return WorkerLost(told, "Read what the workers printed with `tuneyard logs`.")


# -- one start of the workers ----------------------------------------------------------------------------------------


class _Backend(Backend):
    share_cuda_visible_devices = True  # NCCL copies between GPUs of one machine only where each process sees them all


class _Torch(BackendConfig):
    """Ray Train's TorchConfig without torch in the driver and in Ray's controller, which costs seconds: the workers meet by themselves."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Trainer(DataParallelTrainer):
    """Ray Train's, without two actors for which the workers would have to wait, each a process of its own: one shares out data sets,
    of which there are none here, and one removes the placement group of a controller that died, which Ray itself does as well."""

    def _create_default_callbacks(self) -> list[Any]:
        without = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, without)]


def _fit(spec: JobSpec, model_dir: Path, store: Path, run: RunDir, place: Placement, start: int, since: dict[str, float]) -> TrainRecord:
    """Start the workers, wait for their end. Raises Ray's TrainingFailedError when one was lost, Fenced when another attempt took over."""
    config = {
        "spec": spec.model_dump_json(),
        "model_dir": str(model_dir),
        "store": str(store),
        "run": str(run.root),
        "attempt": run.attempt,
        "threads": place.threads_per_worker,
        "since": since,
    }
    gpu = place.device == "cuda"
    trainer = _Trainer(
        _worker,
        train_loop_config=config,
        backend_config=_Torch(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=place.workers, use_gpu=gpu, resources_per_worker={"GPU": 1} if gpu else {"CPU": place.threads_per_worker}
        ),
        run_config=ray.train.RunConfig(
            name=f"{run.root.name}-{run.attempt}-{start}",
            storage_path=str(run.path("ray_train")),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0, preemption_grace_s=PREEMPTION_GRACE_S
            ),
        ),
    )
    told = trainer.fit().return_value
    run.check_lease()
    if told is None:
        raise WorkerLost("Training ended without a record.", "Read what the workers printed with `tuneyard logs`.")
    return TrainRecord.model_validate(told)


def _worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """One Ray Train worker: run the loop; the leader writes its record, last. None where a later attempt goes on."""
    moments = {**config["since"], "workers up": time.time()}
    context = ray.train.get_context()
    rank = context.get_world_rank()
    run = RunDir(config["run"], config["attempt"], writer="train")
    with _printing_to(rank_log(run, rank)):
        import torch

        from trainers.parallel import World
        from trainers.train import train

        moments["modules loaded"] = time.time()
        torch.set_num_threads(config["threads"])
        _meet(context)
        world = World.current()
        if rank == 0:
            run.write("machine.json", _machine(context))
        spec = JobSpec.model_validate_json(config["spec"])
        stop = should_stop(run, rank == 0, preempted)
        try:
            record = train(spec, Path(config["model_dir"]), Path(config["store"]), run, world, should_stop=stop, since=moments)
            if rank == 0:
                run.write("train.json", record)
        except Fenced:
            return None  # raising would look like a lost worker
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return record.model_dump(mode="json")


def _machine(context: Any) -> MachineRecord:
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        return MachineRecord(device=gpu.name, memory_bytes=gpu.total_memory)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MachineRecord(device="CPU", memory_bytes=whole // context.get_local_world_size())


def _meet(context: Any) -> None:
    """Tell torch about this worker and where the workers meet, as torchrun does."""
    meeting: list[str] = []
    if context.get_world_rank() == 0:
        address = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
            free.bind((address, 0))
            meeting = [address, str(free.getsockname()[1])]
    address, port = broadcast_from_rank_zero(meeting)
    os.environ.update(
        RANK=str(context.get_world_rank()),
        LOCAL_RANK=str(context.get_local_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send what this process prints, native code included, to a file; Ray's own files go with its session, and mix the workers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = sys.stdout, sys.stderr
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a", buffering=1, encoding="utf-8", errors="replace") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout, sys.stderr = streams
            for number, old in zip((1, 2), kept, strict=True):
                with suppress(OSError):
                    os.dup2(old, number)
                os.close(old)
