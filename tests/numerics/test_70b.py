"""Llama 3 at 8, 16 and 64 workers without any of them: what our own step allocates, component by component, beside cluster/memory.py.

Blocks are alike, so a model of few layers shows every term; the whole 80 layers were simulated by `python -m tests.benchmarks.memory`,
whose results lie in tests/benchmarks/results/memory-70b.json and are held to the formula here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.memory import GIB, Memory, estimate
from cluster.shape import ModelShape
from tests.numerics import simulate
from trainers.catalogue import find
from trainers.spec import Full, Lora, Optim, QLora, Scale

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "memory-70b.json"
SHAPES = {"70B": find("llama-3.3-70b-instruct").shape, "8B": find("llama-3.1-8b-instruct").shape, "1B": find("llama-3.2-1b-instruct").shape}
METHODS: dict[str, Full | Lora | QLora] = {"full": Full(), "lora": Lora(), "qlora": QLora(), "dora": Lora(dora=True)}

TOLERANCE = {
    "weights": 0.01,
    "masters": 0.01,
    "adapters": 0.01,
    "gradients": 0.01,
    "optimizer": 0.01,
    "gathered": 0.01,
    "unreduced": 0.01,
    "activations": 0.025,
    "head": 0.01,
    "total": 0.01,
}
"""How far the formula may be from the simulation, of each component's own highest and of the whole's."""
SMALL = 8 * 2**20
"""Bytes that are below notice: the optimizer's step counters, padding, positions."""


def compare(simulated: dict[str, int], formula: dict[str, int]) -> str:
    """A table of both; fails where a component is further off than its tolerance."""
    rows = []
    for name, tolerance in TOLERANCE.items():
        there, here = simulated.get(name, 0), formula.get(name, 0)
        if max(there, here) > SMALL:
            rows.append(f"{name:<12}{there / GIB:9.3f}{here / GIB:9.3f}  {here / there - 1 if there else 1:+.2%} of {tolerance:.0%}")
        assert abs(there - here) <= tolerance * there + SMALL, "\n".join(rows)
    return "\n".join(["GiB         simulated formula", *rows])


def peaks(memory: Memory) -> dict[str, int]:
    """Each component's highest, and the whole's; what a simulation cannot know is left out."""
    return memory.peaks | {"total": memory.total - memory.components["fixed"]}


def run(size: str, method: str, workers: int, layers: int, tokens: int = 8192, **more: Any) -> str:
    scale = Scale(**{"sharding": "full", "activation_checkpointing": "full", "tokens_per_microbatch": tokens, **more})
    config = {**SHAPES[size], "num_hidden_layers": layers}
    ledger = simulate.step(config, METHODS[method], scale, workers, tokens)
    memory = estimate(ModelShape.of(config), METHODS[method], Optim(learning_rate=1e-4), scale, workers)
    return compare(ledger.peaks() | {"total": sum(ledger.peak().values())}, peaks(memory))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("size", "workers"), [("70B", 8), ("70B", 16), ("70B", 64), ("8B", 16)])
def test_a_step_allocates_what_is_computed(size: str, method: str, workers: int) -> None:
    """At few layers: each adds the same."""
    print(run(size, method, workers, layers=3))


@pytest.mark.parametrize(
    ("size", "method", "workers", "layers", "more"),
    [
        ("70B", "full", 8, 3, {"activation_checkpointing": "none"}),
        ("70B", "lora", 8, 3, {"activation_checkpointing": "none"}),
        ("8B", "full", 8, 4, {"activation_checkpointing": "selective"}),
        ("8B", "lora", 8, 5, {"activation_checkpointing": "selective"}),
        ("8B", "full", 8, 4, {"reshard": False}),
        ("8B", "full", 16, 4, {"sharding": "hybrid"}),
        ("8B", "full", 16, 8, {"sharding": "hybrid"}),
        ("8B", "dora", 8, 3, {}),
        ("70B", "full", 8, 3, {"tokens": 512}),
        ("1B", "full", 8, 4, {}),  # a tied head
        ("1B", "full", 1, 4, {"sharding": "none"}),
        ("8B", "full", 1, 3, {"sharding": "none", "tokens": 1024}),
        ("8B", "lora", 2, 3, {"sharding": "none", "activation_checkpointing": "none"}),
        ("8B", "qlora", 1, 3, {"sharding": "none"}),
    ],
    ids=str,
)
def test_so_it_does_otherwise(size: str, method: str, workers: int, layers: int, more: dict[str, Any]) -> None:
    print(run(size, method, workers, layers, **more))


def test_masters_in_bf16_halve_what_stays() -> None:
    """But for the update's own scratch memory: that optimizer is not simulated."""
    scale = Scale(sharding="full", activation_checkpointing="full", tokens_per_microbatch=8192, master="bf16")
    config = {**SHAPES["70B"], "num_hidden_layers": 3}
    ledger = simulate.step(config, Full(), scale, 8, 8192)
    memory = estimate(ModelShape.of(config), Full(), Optim(learning_rate=1e-4), scale, 8)
    stays = memory.moments["forward pass begins"]["optimizer"]
    print(compare(ledger.peaks() | {"total": sum(ledger.peak().values())}, peaks(memory) | {"optimizer": stays}))


def test_the_whole_models_as_simulated_are_what_is_computed() -> None:
    """Every row of the committed result: all layers of 8B and 70B."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert "simulated" in result["kind"] and result["command"] == "python -m tests.benchmarks.memory"
    rows = result["rows"]
    assert {(r["model"], r["method"], r["workers"]) for r in rows} == {
        (m, how, n) for m in ("8B", "70B") for how in ("full", "lora") for n in (8, 16, 64)
    }
    for row in rows:
        shape = ModelShape.of(SHAPES[row["model"]])
        assert row["layers"] == shape.layers
        scale = Scale(sharding="full", activation_checkpointing="full", tokens_per_microbatch=row["tokens"])
        memory = estimate(shape, METHODS[row["method"]], Optim(learning_rate=1e-4), scale, row["workers"])
        simulated = {name: int(gib * GIB) for name, gib in row["simulated_gib"].items()}
        print(f"{row['model']} {row['method']} {row['workers']}\n{compare(simulated, peaks(memory))}")
