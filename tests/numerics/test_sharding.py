"""However workers share the weights, a run is the run that one worker makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_tiny
from tests.numerics import runs
from trainers.checkpoint import folders
from trainers.records import RunDir
from trainers.spec import JobSpec
from trainers.state import State

FULL = {"method": {"type": "full"}, "optim": {"learning_rate": 0.003}}
LORA = {"method": {"type": "lora", "r": 4, "alpha": 8}}
NOISE = {"method": {"dropout": 0.2, "dora": True}, "optim": {"neftune_alpha": 5.0}}


def spec(base: dict, **scale: object) -> JobSpec:
    return runs.make_spec(**{**base, "scale": {"tokens_per_microbatch": 64, "precision": "fp32", **scale}, "validate": {"samples": 2}})


ONE = {"full": spec(FULL), "lora": spec(LORA), "noise": spec(NOISE)}
"""What each of the others must equal."""
SHARED = {
    "full, sharded": spec(FULL, sharding="full"),
    "full, each holds all": spec(FULL, sharding="none"),
    "full, kept gathered": spec(FULL, sharding="full", reshard=False),
    "full, recomputed": spec(FULL, sharding="full", activation_checkpointing="full"),
    "full, partly recomputed": spec(FULL, sharding="full", activation_checkpointing="selective"),
    "full, offloaded": spec(FULL, sharding="full", cpu_offload=True),
    "lora, sharded": spec(LORA, sharding="full"),
    "lora, each holds all": spec(LORA, sharding="none"),
    "noise, sharded, recomputed": spec(NOISE, sharding="full", activation_checkpointing="full"),
    "noise, each holds all": spec(NOISE, sharding="none"),
}
FEW = {n: SHARED[n] for n in ("full, sharded", "lora, sharded", "noise, sharded, recomputed")}
HYBRID = {n: spec(base, sharding="hybrid") for n, base in (("full, hybrid", FULL), ("lora, hybrid", LORA))}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("stores") / "sharding")


@pytest.fixture(scope="module")
def alone(tiny: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name, one in ONE.items():
        assert runs.run_training(tiny, store, folder / name, one).status == "finished"
    return folder


def same(got: Path, want: Path) -> None:
    one, several = RunDir(want).steps(), RunDir(got).steps()
    assert [s.supervised_tokens for s in several] == [s.supervised_tokens for s in one]  # the same examples in every step
    assert [s.train_loss for s in several] == pytest.approx([s.train_loss for s in one], rel=1e-5)
    assert [s.valid_loss or 0 for s in several] == pytest.approx([s.valid_loss or 0 for s in one], rel=1e-5)
    assert [s.grad_norm for s in several] == pytest.approx([s.grad_norm for s in one], rel=1e-4)
    first, second = State(folders(RunDir(want))[-1]), State(folders(RunDir(got))[-1])
    assert first.names() == second.names()
    for name in first.names():
        if name.startswith("model."):
            difference = (second.read(name) - first.read(name)).norm() / first.read(name).norm()
            assert difference < 1e-3, (name, difference)  # AdamW divides small gradients, with their rounding, by themselves


@pytest.mark.parametrize(
    ("workers", "specs", "local"), [(2, SHARED, 2), (4, FEW, 4), (4, HYBRID, 2)], ids=["2 workers", "4 workers", "2 nodes of 2"]
)
def test_several_workers_equal_one(tiny: Path, store: Path, alone: Path, tmp_path: Path, workers: int, specs: dict, local: int) -> None:
    output = runs.finish(runs.spawn(tiny, store, tmp_path, specs, workers=workers, LOCAL_WORLD_SIZE=str(local)))
    assert output.count("finished") == workers * len(specs), output
    for name in specs:
        same(tmp_path / name, alone / name.partition(",")[0])


def test_a_head_of_its_own_is_sharded_too(store: Path, tmp_path: Path) -> None:
    untied = make_tiny(tmp_path / "untied", tie_word_embeddings=False)
    specs = {"full": spec(FULL, sharding="full"), "saved": spec({"method": {"modules_to_save": ["lm_head", "norm"]}}, sharding="full")}
    for name, one in specs.items():
        alone = spec({"method": one.method.model_dump()} | ({"optim": FULL["optim"]} if name == "full" else {}))
        assert runs.run_training(untied, store, tmp_path / "alone" / name, alone).status == "finished"
    runs.finish(runs.spawn(untied, store, tmp_path / "two", specs, workers=2))
    for name in specs:
        same(tmp_path / "two" / name, tmp_path / "alone" / name)
