"""QLoRA (Dettmers et al., 2023, arXiv:2305.14314): LoRA on a base that is kept in four bits.

Each target layer's weight arrives whole, is packed (see trainers.nf4) and let go; a forward or backward pass unpacks it into the dtype of
its arithmetic, uses it, and lets it go again. Adapters are LoRA's in all: first values, files, names. What is merged in the end is what was
trained on: the packed weight, unpacked (`nf4.round_trip`), plus the adapter.

Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers import lora, nf4
from trainers.errors import ModelError
from trainers.lora import export
from trainers.noise import Noise
from trainers.spec import QLora

__all__ = ["QLoraLinear", "apply", "export", "initialise", "line"]


class QLoraLinear(nn.Module):
    """A frozen linear layer in four bits, and its adapter."""

    codes: Tensor | None
    scales_B: Tensor | None
    scales_S: Tensor | None
    mean: Tensor | None

    def __init__(self, linear: nn.Linear, name: str, method: QLora, noise: Noise) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)
        self.name, self.noise, self.double_quant = name, noise, method.double_quant
        self.scaling, self.dropout = lora.scaling(method.r, method.alpha, method.rslora), method.dropout
        self.bias = linear.bias
        where = {"dtype": torch.promote_types(linear.weight.dtype, torch.float32), "device": linear.weight.device}  # at least fp32
        self.lora_A = nn.Parameter(torch.empty(method.r, linear.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, method.r, **where))
        for part in nf4.Packed._fields:
            self.register_buffer(part, None, persistent=False)

    def take_weight(self, w_OI: Tensor) -> None:
        """Pack the base's weight, on the device of the adapter. Raises ModelError for one of another shape."""
        if tuple(w_OI.shape) != self.shape:
            raise ModelError(
                f"`{self.name}.weight` is {tuple(w_OI.shape)}, but config.json makes it {self.shape}.",
                "Fetch the model again.",
                "model.base",
            )
        for part, tensor in nf4.quantize(w_OI.to(self.lora_A.device), self.double_quant)._asdict().items():
            setattr(self, part, tensor)

    @property
    def packed(self) -> nf4.Packed:
        assert self.codes is not None and self.scales_B is not None, f"{self.name} has no weight yet"
        return nf4.Packed(self.codes, self.scales_B, self.scales_S, self.mean)

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = self.noise.dropout(x_TI, self) if self.dropout else None
        a_RI, b_OR = self.lora_A.to(x.dtype), (self.lora_B * self.scaling).to(x.dtype)
        out_TO: Any = _QLoraMatmul.apply(x_TI, dropped_TI, self.bias, a_RI, b_OR, self.shape, *self.packed)
        return out_TO.view(*x.shape[:-1], -1)


class _QLoraMatmul(torch.autograd.Function):
    """x W^T + bias + (d A^T) B^T; d is x after dropout, or None for x itself (torch.compile takes no tensor twice). W stays packed between
    the passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        d_TI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        shape: tuple[int, int],
        *packed: Tensor | None,
    ) -> Tensor:
        ctx.one_input, ctx.shape = d_TI is None, shape
        d_TI = x_TI if d_TI is None else d_TI
        low_TR = d_TI @ a_RI.T
        w_OI = nf4.dequantize(nf4.Packed(*packed), shape, x_TI.dtype)  # type: ignore[arg-type]
        out_TO = nn.functional.linear(x_TI, w_OI, bias_O).addmm_(low_TR, b_OR.T)
        ctx.save_for_backward(d_TI, a_RI, b_OR, low_TR, *packed)
        return out_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_TI, a_RI, b_OR, low_TR, *packed = ctx.saved_tensors
        grad_low_TR = grad_TO @ b_OR
        grad_x = grad_d = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_TO @ nf4.dequantize(nf4.Packed(*packed), ctx.shape, grad_TO.dtype)
            if ctx.one_input:
                grad_x.addmm_(grad_low_TR, a_RI)
            else:
                grad_d = grad_low_TR @ a_RI
        return grad_x, grad_d, None, grad_low_TR.T @ d_TI, grad_TO.T @ low_TR, None, *(None for _ in packed)


def apply(model: PreTrainedModel, method: QLora) -> None:
    """Freeze `model` and put a four-bit layer with an adapter in every target layer's place, in place."""
    model.requires_grad_(False)
    noise = Noise()
    for name, linear in lora.targets(model, method):
        layer = QLoraLinear(linear, name, method, noise)
        if not linear.weight.is_meta:
            layer.take_weight(linear.weight)
        model.set_submodule(name, layer)


def initialise(model: nn.Module, method: QLora, seed: int, rank: int) -> None:
    """A drawn, B zero: the model begins as its base, as far as four bits hold it."""
    for module in model.modules():
        if isinstance(module, QLoraLinear):
            lora.initialise_adapter(module, seed, rank)


def line(model: nn.Module, method: QLora) -> str:
    """What is trained, in words."""
    layers = [m for m in model.modules() if isinstance(m, QLoraLinear)]
    bits = "4.13" if method.double_quant else "4.5"
    return f"{lora.line(model, method)}; {sum(m.shape[0] * m.shape[1] for m in layers):,} weights of the base in {bits} bits each"
