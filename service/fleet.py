"""Which whole tuned models are loaded: a pure function of who asked for what, as policy.py is for jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOLD_S = 60.0
"""A model stays loaded at least so long, so that models that do not fit together take turns instead of throwing each other out."""


@dataclass(frozen=True)
class Whole:
    """A tuned model that no adapter on the shared base says exactly."""

    app: str
    num_bytes: int
    """Of its weights."""
    asked_at: float
    """When a request last named it."""
    needed: bool = False
    """Its job waits for it."""
    loaded_at: float = 0.0
    """Since when its application runs; 0 where none does."""


def kept(models: Sequence[Whole], max_bytes: int, now: float) -> set[str]:
    """The applications that should run: the least recently asked models give way where all together are beyond `max_bytes`.

    What a job waits for goes first, then what was loaded less than `HOLD_S` ago. The first of them runs even if it alone is beyond the
    bound: a model that is too large for the setting answers by itself rather than never.
    """

    def rank(model: Whole) -> tuple[bool, bool, float]:
        return model.needed, now - model.loaded_at < HOLD_S, model.asked_at

    chosen: set[str] = set()
    left = max_bytes
    for model in sorted(models, key=rank, reverse=True):
        if model.needed or not chosen or model.num_bytes <= left:
            chosen.add(model.app)
            left -= model.num_bytes
    return chosen
