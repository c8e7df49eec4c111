"""From training to the merged folder: it has the validation loss that training had measured at that step, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.numerics import runs
from trainers import merge
from trainers.records import RunDir
from trainers.store import TokenStore

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"rslora": True},
    "dora": {"dora": True, "modules_to_save": ["norm"]},
    "qlora": {"type": "qlora"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_store(tmp_path_factory.mktemp("stores") / "merged")


@torch.no_grad()
def validation_loss(folder: Path, store: Path) -> float:
    """Weighted mean negative log-likelihood, as transformers computes it from a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lost = weight = 0.0
    split = TokenStore(store, "validation")
    for ids, weights in (split.get(i) for i in range(len(split))):
        tokens = torch.from_numpy(np.array(ids, dtype=np.int64))
        logp = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        lost -= float((logp * torch.from_numpy(weights[1:].copy())).sum())
        weight += float(weights[1:].sum())
    return lost / weight


@pytest.mark.parametrize("kind", METHODS)
def test_the_merged_folder_has_the_loss_that_was_measured(tiny: Path, store: Path, tmp_path: Path, kind: str) -> None:
    spec = runs.make_spec(method=METHODS[kind], optim={"learning_rate": 0.003 if kind == "full" else 0.01})
    record = runs.run_training(tiny, store, tmp_path, spec)
    assert record.status == "finished" and record.best_step is not None
    run = RunDir(tmp_path, 1, "driver")
    made = merge.merge(run, spec, "tiny", tiny, record.best_step, merge.held_out(store))
    measured = {s.step: s.valid_loss for s in run.steps()}[record.best_step]
    assert measured is not None and made.kl is not None and made.effect is not None
    assert abs(validation_loss(run.path("model"), store) - measured) < 2e-5
    assert abs(validation_loss(tiny, store) - measured) > 1e-2 < made.effect and made.kl < 1e-6
    assert made.served == ("adapter" if kind == "lora" else "merged")
