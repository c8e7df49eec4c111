"""LoRA (Hu et al., 2021, arXiv:2106.09685): y = x W^T + s (x A^T) B^T with W frozen; s = alpha / r, or alpha / sqrt(r).

DoRA (Liu et al., 2024, arXiv:2402.09353) scales each output by m / ||W + s B A||, with m learned, beginning as the norm of W's row, and the
norm taken as a constant in the backward pass. `modules_to_save` are trained whole beside the adapters.

Adapters are fp32 (they are their own master weights) and are cast to the activations' dtype where they are used. Names and files follow
PEFT's, so PEFT, transformers and vLLM load them as they are. Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import shards
from trainers.errors import SpecError
from trainers.noise import Noise
from trainers.spec import Lora, QLora


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    lora_magnitude_vector: nn.Parameter | None

    def __init__(self, base: nn.Linear, name: str, method: Lora, noise: Noise) -> None:
        super().__init__()
        self.base, self.name, self.noise = base, name, noise
        self.scaling, self.dropout = scaling(method.r, method.alpha, method.rslora), method.dropout
        where = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}  # at least fp32
        self.lora_A = nn.Parameter(torch.empty(method.r, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, method.r, **where))
        self.lora_magnitude_vector = nn.Parameter(torch.empty(base.out_features, **where)) if method.dora else None

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = self.noise.dropout(x_TI, self) if self.dropout else None
        a_RI, b_OR = self.lora_A.to(x.dtype), (self.lora_B * self.scaling).to(x.dtype)
        bias_O = self.base.bias if self.lora_magnitude_vector is None else None
        out_TO: Any = _LoraMatmul.apply(x_TI, dropped_TI, self.base.weight, bias_O, a_RI, b_OR)
        if self.lora_magnitude_vector is not None:
            out_TO = out_TO * (self.lora_magnitude_vector / self._row_norms()).to(x.dtype)
            out_TO = out_TO if self.base.bias is None else out_TO + self.base.bias
        return out_TO.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """||W + s B A|| of each row, without making that matrix: |w|^2 + 2 s w A^T b + s^2 b A A^T b."""
        w_OI, a_RI, b_OR = self.base.weight.to(self.lora_A.dtype), self.lora_A, self.lora_B * self.scaling
        cross_OR = 2 * (w_OI @ a_RI.T) + b_OR @ (a_RI @ a_RI.T)
        return (w_OI.square().sum(1) + (cross_OR * b_OR).sum(1)).sqrt()


class _LoraMatmul(torch.autograd.Function):
    """x W^T + bias + (d A^T) B^T, accumulated in place: plain autograd would make two more passes over (T, O) each way.

    d is x after dropout, or None for x itself (torch.compile takes no tensor twice).
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, d_TI: Tensor | None, w_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        ctx.one_input = d_TI is None
        d_TI = x_TI if d_TI is None else d_TI
        low_TR = d_TI @ a_RI.T
        out_TO = nn.functional.linear(x_TI, w_OI, bias_O).addmm_(low_TR, b_OR.T)
        ctx.save_for_backward(d_TI, w_OI, a_RI, b_OR, low_TR)
        return out_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_TI, w_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        grad_low_TR = grad_TO @ b_OR
        grad_x = grad_d = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TO @ w_OI
            if ctx.one_input:
                grad_x.addmm_(grad_low_TR, a_RI)
            else:
                grad_d = grad_low_TR @ a_RI
        return grad_x, grad_d, None, None, grad_low_TR.T @ d_TI, grad_TO.T @ low_TR


def scaling(r: int, alpha: float, rslora: bool) -> float:
    """What the adapter's output is multiplied by."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def apply(model: PreTrainedModel, method: Lora) -> None:
    """Freeze `model` and put an adapter on every target layer, in place."""
    model.requires_grad_(False)
    noise = Noise()
    for name, linear in targets(model, method):
        _put(model, name, LoraLinear(linear, name, method, noise))
    for name in saved_modules(model, method.modules_to_save):
        model.get_submodule(name).requires_grad_(True)


def initialise(model: nn.Module, method: Lora, seed: int, rank: int) -> None:
    """A drawn, B zero: the model begins as its base. Magnitudes are the base's own."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            initialise_adapter(module, seed, rank)
            if module.lora_magnitude_vector is not None:
                weight_OI = module.base.weight.detach().to(module.lora_A.dtype)
                shards.fill(module.lora_magnitude_vector, shards.whole(weight_OI.square().sum(1).sqrt()), rank)


def export(tensors: Mapping[str, Tensor], method: Lora | QLora, base: str, folder: Path) -> None:
    """Write a PEFT adapter folder (adapter_config.json, adapter_model.safetensors, fp32) from whole tensors by parameter name."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("lora_A", "lora_B")
    renamed = {
        f"base_model.model.{name}" + (".weight" if name.endswith(kinds) else ""): tensor.float().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": method.r,
        "lora_alpha": method.alpha,
        "use_rslora": method.rslora,
        "use_dora": isinstance(method, Lora) and method.dora,
        "lora_dropout": method.dropout,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in tensors if name.endswith("lora_A")}),
        # Whole names: PEFT would take `norm` for every name that ends so.
        "modules_to_save": sorted({n.rpartition(".")[0] for n in tensors if ".lora_" not in n}) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def line(model: nn.Module, method: Lora | QLora) -> str:
    """What is trained, in words."""
    names = [n.rpartition(".")[0] for n, _ in model.named_parameters() if n.endswith("lora_A")]
    kind = "DoRA" if isinstance(method, Lora) and method.dora else "LoRA"
    also = f", and {', '.join(method.modules_to_save)} whole" if isinstance(method, Lora) and method.modules_to_save else ""
    return f"{kind} adapters of rank {method.r} on {len(names)} layers ({', '.join(sorted({n.split('.')[-1] for n in names}))}){also}"


def targets(model: PreTrainedModel, method: Lora | QLora) -> list[tuple[str, nn.Linear]]:
    """The layers that get an adapter, by name. Raises SpecError for a name that the model does not have."""
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


def saved_modules(model: PreTrainedModel, wanted: list[str]) -> list[str]:
    """Modules that are trained whole, by full name; `wanted` are the ends of names. Raises SpecError."""
    found: list[str] = []
    names = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters())]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[union-attr]
    for ending in wanted:
        matching = [n for n in names if n == ending or n.endswith(f".{ending}")]
        if not matching:
            ends = sorted({n.rpartition(".")[2] for n in names if not n.rpartition(".")[2].isdigit()})
            raise SpecError(
                f"`method.modules_to_save` names `{ending}`, which this model does not have.",
                f"It has: {', '.join(ends)}.",
                "method.modules_to_save",
            )
        if any("lora_A" in n for m in matching for n, _ in model.get_submodule(m).named_parameters()):
            raise SpecError(
                f"`method.modules_to_save` names `{ending}`, which has an adapter.",
                "Leave it out of `method.targets`.",
                "method.modules_to_save",
            )
        shared = (model.get_input_embeddings(), model.get_output_embeddings())
        if tied and any(model.get_submodule(m) in shared for m in matching):
            raise SpecError(
                f"`method.modules_to_save` names `{ending}`, but this model's embedding and head are one matrix.",
                "Leave it out, or use `method: {type: full}`.",
                "method.modules_to_save",
            )
        found += matching
    return found


def initialise_adapter(module: Any, seed: int, rank: int) -> None:
    """First values of `lora_A` and `lora_B` of a layer that has a `name`."""
    shards.fill(module.lora_A, _initial_a(module.name, module.lora_A.shape, seed).to(module.lora_A.device), rank)
    with torch.no_grad():
        module.lora_B.zero_()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _initial_a(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Kaiming-uniform as PEFT draws it, from a generator keyed by layer and seed: the same whatever the rank or layer order."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
    bound = math.sqrt(1 / shape[1])  # kaiming_uniform_(a=sqrt(5)) over `shape[1]` inputs
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=torch.Generator().manual_seed(key))
