"""What a run's losses say so far: whether to stop, whether it overfits or underfits. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from trainers.spec import EarlyStopping

History = Sequence[Sequence[float]]
"""(step, mean training loss since the validation before, validation loss) of every validation, in order."""

RISES = 3
"""So many validations in a row must rise while training falls before that is called overfitting."""
_CLEARLY = 0.03
"""By so much of itself at least: a few validation examples wander by less."""
_STILL_FALLING = 0.03  # a last validation that is lower by this share says that the run ended too early


def should_stop(history: History, rule: EarlyStopping | None) -> bool:
    """Whether the last `patience` validations were all no better than the best before them."""
    if rule is None or len(history) <= rule.patience:
        return False
    losses = [valid for _, _, valid in history]
    best = min(losses[: -rule.patience])
    return all(loss >= best - rule.min_delta for loss in losses[-rule.patience :])


def overfits(history: History) -> bool:
    """Whether validation has just risen RISES times in a row, clearly, while training fell over the same time. True once for each such
    stretch."""

    def does(end: int) -> bool:
        tail = history[max(0, end - RISES - 1) : end]
        rises = len(tail) == RISES + 1 and all(after[2] > before[2] for before, after in pairwise(tail))
        return rises and tail[-1][2] > tail[0][2] * (1 + _CLEARLY) and tail[-1][1] < tail[0][1]

    return does(len(history)) and not does(len(history) - 1)


def underfits(history: History) -> bool:
    """Whether, at the end of a run, both losses were still falling clearly: more steps would have helped."""
    if len(history) < 3:
        return False
    (_, train_before, before), (_, train_last, last) = history[-2], history[-1]
    return last < before * (1 - _STILL_FALLING) and train_last < train_before * (1 - _STILL_FALLING)
