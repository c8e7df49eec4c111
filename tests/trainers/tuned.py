"""Bases and adapters for the tests of merging and export: adapters are made and saved by PEFT itself."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trainers.records import RunDir
from trainers.spec import JobSpec

PROMPTS = [[5, 6, 7, 8], [9, 10], [200, 11, 12, 13, 14, 15, 16, 17]]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def resaved(base: Path, folder: Path, tied: bool = True, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A copy of a base with other files: in shards, in another dtype, or with a head of its own."""
    model = load(base)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, folder / name)
    return folder


def adapter(base: Path, folder: Path, scale: float = 0.1, **config: Any) -> Path:
    """A PEFT adapter of a base with every trained number moved at random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on a base whose head is tied
        torch.manual_seed(0)
        told = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})
        model = get_peft_model(load(base), told)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
        model.save_pretrained(str(folder))
    return folder


def reference(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of base + adapter as PEFT computes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(load(base), str(adapter)).eval())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in PROMPTS])


def job(**sections: Any) -> JobSpec:
    return JobSpec.parse({"data": {"train": [{"path": "unused.jsonl"}]}, "scale": {"precision": "fp32"}, **sections})


def a_run(folder: Path, base: Path, **config: Any) -> RunDir:
    """A run directory whose training has just ended with an adapter of step 10."""
    adapter(base, folder / "adapters" / "step-000010", **config)
    return RunDir(folder, 1, "driver")
