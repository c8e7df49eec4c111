"""LoRA (Hu et al., 2021, arXiv:2106.09685): y = x W^T + s (x A^T) B^T with W frozen; s = alpha / r, or alpha / sqrt(r).

A method is three functions over a model: `apply` makes it trainable, `trainable` names what the optimizer owns, `export` writes
what was learned. Adapters are fp32 (they are their own master weights) and are cast to the activations' dtype where they are used.
Names and files follow PEFT's, so PEFT, transformers and vLLM load them as they are.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.errors import SpecError
from trainers.spec import Lora


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Linear, r: int, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        exact = torch.promote_types(base.weight.dtype, torch.float32)  # at least fp32
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=exact, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=exact, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        flat_TI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = self.lora_A.to(x.dtype), (self.lora_B * self.scaling).to(x.dtype)
        out_TO = _LoraMatmul.apply(flat_TI, self.base.weight, self.base.bias, a_RI, b_OR)
        return out_TO.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


class _LoraMatmul(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T, accumulated in place: plain autograd would make two more passes over (T, O) each way."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        low_TR = x_TI @ a_RI.T
        out_TO = nn.functional.linear(x_TI, w_OI, bias_O).addmm_(low_TR, b_OR.T)
        ctx.save_for_backward(x_TI, w_OI, a_RI, b_OR, low_TR)
        return out_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TI, w_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        grad_low_TR = grad_TO @ b_OR
        grad_x = (grad_TO @ w_OI).addmm_(grad_low_TR, a_RI) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_low_TR.T @ x_TI, grad_TO.T @ low_TR


def scaling(r: int, alpha: float, rslora: bool) -> float:
    """What the adapter's output is multiplied by."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def apply(model: PreTrainedModel, method: Lora, seed: int) -> PreTrainedModel:
    """Freeze `model` and put an adapter on every target layer; returns the model, changed in place."""
    model.requires_grad_(False)
    for name, linear in _targets(model, method):
        adapter = LoraLinear(linear, method.r, scaling(method.r, method.alpha, method.rslora))
        with torch.no_grad():
            adapter.lora_A.copy_(_initial_a(name, adapter.lora_A.shape, seed))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer owns, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def export(model: nn.Module, method: Lora, base: str, folder: Path) -> None:
    """Write a PEFT adapter folder (adapter_config.json, adapter_model.safetensors, fp32)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            tensors[f"base_model.model.{name}.lora_A.weight"] = module.lora_A.detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = module.lora_B.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": method.r,
        "lora_alpha": method.alpha,
        "use_rslora": method.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _targets(model: PreTrainedModel, method: Lora) -> list[tuple[str, nn.Linear]]:
    head = model.get_output_embeddings()
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if method.targets == "all-linear":
        return linears
    known = sorted({n.rpartition(".")[2] for n, _ in linears})
    if unknown := [t for t in method.targets if t not in known]:
        raise SpecError(
            f"`method.targets` names `{unknown[0]}`, which this model does not have.", f"It has: {', '.join(known)}.", "method.targets"
        )
    return [(n, m) for n, m in linears if n.rpartition(".")[2] in method.targets]


def _initial_a(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Kaiming-uniform as PEFT draws it, from a generator keyed by layer and seed: the same whatever the rank or layer order."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
    bound = math.sqrt(1 / shape[1])  # kaiming_uniform_(a=sqrt(5)) over `shape[1]` inputs
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=torch.Generator().manual_seed(key))
