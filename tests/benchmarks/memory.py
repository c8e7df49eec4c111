"""Memory of one worker of a sharded step on whole Llama 3 models, simulated, beside what cluster/memory.py computes.

    python -m tests.benchmarks.memory [--output tests/benchmarks/results/memory-70b.json]

No GPU and no weights: tests/numerics/simulate.py runs our own step on fake tensors. Half a minute for a row of the 70B model, on one core.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

from cluster.memory import GIB, estimate
from cluster.shape import ModelShape
from tests.numerics import simulate
from trainers.catalogue import find
from trainers.spec import Full, Lora, Optim, Scale

TOKENS = 8192
MODELS = {"8B": "llama-3.1-8b-instruct", "70B": "llama-3.3-70b-instruct"}
METHODS = {"full": Full(), "lora": Lora()}
WORKERS = (8, 16, 64)


def row(model: str, method: str, workers: int) -> dict[str, object]:
    config = find(MODELS[model]).shape
    shape = ModelShape.of(config)
    scale = Scale(sharding="full", activation_checkpointing="full", tokens_per_microbatch=TOKENS)
    begun = time.perf_counter()
    ledger = simulate.step(config, METHODS[method], scale, workers, TOKENS)
    seconds = time.perf_counter() - begun
    memory = estimate(shape, METHODS[method], Optim(learning_rate=1e-4), scale, workers)
    total = sum(ledger.peak().values())
    computed = memory.total - memory.components["fixed"]
    return {
        "model": model,
        "method": method,
        "workers": workers,
        "layers": shape.layers,
        "tokens": TOKENS,
        "simulated_gib": {name: round(size / GIB, 4) for name, size in (ledger.peaks() | {"total": total}).items()},
        "computed_gib": {
            name: round(size / GIB, 4) for name, size in (memory.peaks | {"total": computed}).items() if name != "fixed" and size
        },
        "computed_of_simulated": round(computed / total, 4),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate the memory of a sharded step; no GPU is needed.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for model in MODELS:
        for method in METHODS:
            for workers in WORKERS:
                rows.append(row(model, method, workers))
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "kind": "simulated (fake tensors and process group, worker 0), not measured on a GPU. Highest of each component, and of their sum",
        "command": "python -m tests.benchmarks.memory",
        "what": "our own Learner: two micro-batches, an update; FSDP2, bf16 with fp32 masters, each block recomputed; LoRA r16 all-linear",
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
