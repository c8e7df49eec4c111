"""Ten steps of TRL's SFTTrainer, on the same examples in the same order, have the same losses: an independent loop as the reference."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics import runs
from trainers import model, resolve
from trainers.batching import Order
from trainers.checkpoint import Progress
from trainers.learner import Learner
from trainers.parallel import World
from trainers.spec import Placement
from trainers.store import TokenStore
from trainers.train import train_step

RATE = 0.003
STEPS = 10
METHODS = {"full": {"type": "full"}, "lora": {"type": "lora", "r": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return TokenStore(runs.make_store(tmp_path_factory.mktemp("stores") / "trl", train_examples=25), "train")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_losses_are_those_of_trl(tiny: Path, store: TokenStore, tmp_path: Path, method: dict[str, Any]) -> None:
    spec = runs.make_spec(method=method, optim={"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": RATE})
    spec = resolve.schedule(spec, len(store), Placement())
    order = Order(store.key, len(store), 2, 5, 0)
    learner = Learner.build(spec, tiny, World())
    start = learner.learned()  # TRL begins with the same adapters
    ours = [train_step(learner, store, order.step(s), Progress(step=s), RATE).measured.loss for s in range(STEPS)]
    theirs = trl(tiny, store, order, spec, start, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(ours) - min(ours) > 0.1  # they say something


def trl(tiny: Path, store: TokenStore, order: Order, spec: Any, start: dict[str, torch.Tensor], out: Path) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    network: Any = model.load(tiny, torch.float32, attn="sdpa")
    if spec.method.type == "lora":
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        network = get_peft_model(network, config)
        set_peft_model_state_dict(network, {f"base_model.model.{n}.weight": t for n, t in start.items()})
    rows = [store.get(int(i)) for s in range(STEPS) for i in order.step(s)]
    data = Dataset.from_list([{"input_ids": ids.tolist(), "labels": np.where(w > 0, ids, -100).tolist()} for ids, w in rows])
    losses: list[float] = []

    class Trainer(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(data)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        config = SFTConfig(
            output_dir=str(out), per_device_train_batch_size=5, learning_rate=RATE, lr_scheduler_type="constant", max_steps=STEPS,
            bf16=False, max_length=None, gradient_checkpointing=False, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True}, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=network, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(tiny)).train()
    return losses
