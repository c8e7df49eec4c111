"""Training on a device that is not the CPU (simulated, and a GPU where there is one): every tensor is where it belongs, the numbers are the
CPU's. Attention on GPUs has a kernel of its own, which the simulated device has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics import runs
from tests.simulated import DEVICE, movable
from trainers import adam_bf16, loss, resolve, train
from trainers.checkpoint import Progress
from trainers.learner import Learner
from trainers.parallel import World
from trainers.spec import Placement
from trainers.store import TokenStore

BF16 = {"tokens_per_microbatch": 64, "precision": "bf16"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"method": {"dora": True, "dropout": 0.1}},
    "whole modules": {"method": {"modules_to_save": ["norm"]}},
    "qlora": {"method": {"type": "qlora"}},
    "full": {"method": {"type": "full"}},
    "full in bf16": {"method": {"type": "full"}, "scale": BF16},
    "masters in bf16": {"method": {"type": "full"}, "scale": {**BF16, "master": "bf16"}},
    "adam in eight bits": {"method": {"type": "full"}, "optim": {"type": "adamw8bit"}},
    "noise": {"optim": {"neftune_alpha": 5.0}},
    "smoothed": {"optim": {"label_smoothing": 0.1, "z_loss": 1e-4}},
    "recomputed": {"scale": {"activation_checkpointing": "full", "tokens_per_microbatch": 64}},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore(runs.make_store(tmp_path_factory.mktemp("stores") / "device"), "train")


@pytest.mark.parametrize("device", [DEVICE.type, *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("method", METHODS)
def test_steps_on_a_device(tiny: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch, method: str, device: str) -> None:
    monkeypatch.setitem(loss.LOGIT_BYTES, DEVICE.type, loss.LOGIT_BYTES["cpu"])
    monkeypatch.setitem(adam_bf16.CHUNK, DEVICE.type, adam_bf16.CHUNK["cpu"])
    told, trained = [], []
    for place in ("cpu", device):
        with movable():
            spec = resolve.schedule(runs.make_spec(**METHODS[method]), 24, Placement())
            learner = Learner.build(spec, tiny, World(device=place))
        assert {p.device.type for p in learner.trainee.parameters()} == {place}
        made = [train.train_step(learner, store, np.arange(5 * i, 5 * i + 5), Progress(), 1e-3) for i in range(2)]
        told.append([(step.measured.loss, step.measured.weight, step.norm) for step in made])
        trained.append({name: master.detach().to("cpu").float() for name, master in learner.masters.items()})
    # In bf16, and on a real device, kernels round in other orders; Adam makes whole steps of the smallest gradients' signs.
    exact = device == DEVICE.type and spec.scale.precision == "fp32"
    assert told[1] == [pytest.approx(step, rel=1e-6 if exact else 2e-2) for step in told[0]]
    for name, values in trained[0].items():
        if exact:
            torch.testing.assert_close(trained[1][name], values, rtol=1e-6, atol=1e-6)
