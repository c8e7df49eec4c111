"""Weights laid out once as oneDNN wants them: it would else do so for every matmul, which for the few tokens of a decoding step takes
about as long as the multiplication itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

USUAL_TOKENS = 32
"""Of a decoding step; the layout suits other numbers, too."""
_ops: Any = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer for inference on the CPU in bfloat16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = _ops._reorder_linear_weight(linear.weight.detach(), USUAL_TOKENS)  # no buffer: it has no storage to move or save

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: ... x in -> ... x out."""
        return _ops._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def packed(linear: nn.Linear) -> nn.Module:
    """The layer with its weight laid out, or as it is where that is of no use: other devices and types, a build without oneDNN."""
    weight = linear.weight
    usable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    return PackedLinear(linear) if usable and torch.ops.mkldnn._is_mkldnn_bf16_supported() else linear
