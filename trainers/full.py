"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from torch import nn

from trainers.spec import Full


def apply(model: nn.Module, method: Full) -> None:
    """Nothing to add: all parameters are trained, as they are."""
    model.requires_grad_(True)


def initialise(model: nn.Module, method: Full, seed: int, rank: int) -> None:
    """Nothing to draw: the base's files hold every value."""


def line(model: nn.Module, method: Full) -> str:
    return "all weights are trained"
