"""A machine that is about to be taken away: training saves, and goes on with what is left. Two machines of a real Ray, logical GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

from tests.numerics import runs
from tests.trainers.test_distributed import told, when
from trainers.distributed import nodes, train_on_ray
from trainers.records import RunDir

DEADLINE_S = 600


@pytest.fixture
def two_machines() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    cluster.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_machine_that_leaves_costs_no_step_and_no_loss(two_machines: Cluster, tiny: Path, tmp_path: Path) -> None:
    spec = runs.make_spec(optim={"epochs": 30}, scale={"compile": False, "workers": {"min": 1, "max": 4}})
    store = runs.make_store(tmp_path / "store", train_examples=40)
    run = RunDir(tmp_path / "run", 1, "driver")
    second = next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != ray.get_runtime_context().get_node_id())

    def take_away() -> None:
        gcs = GcsClient(address=two_machines.address)
        gcs.drain_node(second, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", int((time.time() + DEADLINE_S) * 1000))

    taking = when(run.steps, take_away)
    record = train_on_ray(spec, tiny, store, run)
    taking.join()
    assert record.status == "finished"
    assert len(nodes()) == 1
    lines = told(run)
    first, *_, last = [line for line in lines if line.startswith(("Training starts", "Training resumes"))]
    assert first.startswith("Training starts") and "on 2 worker(s)" in first
    assert last.startswith("Training resumes") and "on 1 worker(s)" in last
    assert "A machine will be taken away; training goes on with what is left." in lines
    assert not [line for line in lines if "lost" in line]
    made = [step.step for _, records in run.step_segments() for step in records]
    assert sorted(made) == list(range(1, record.num_steps + 1))
