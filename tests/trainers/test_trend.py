"""What losses say, and when it is said."""

from __future__ import annotations

import pytest

from trainers import trend
from trainers.spec import EarlyStopping


def history(valid: list[float], train: list[float] | None = None) -> list[list[float]]:
    train = train or [1.0 - 0.01 * i for i in range(len(valid))]
    return [[float(i), t, v] for i, (t, v) in enumerate(zip(train, valid, strict=True), 1)]


@pytest.mark.parametrize(
    ("valid", "patience", "min_delta", "stops"),
    [
        ([3, 2, 1], 1, 0.0, False),
        ([3, 2, 2], 1, 0.0, True),  # equal is no better
        ([3, 2, 2.5, 1.9], 2, 0.0, False),
        ([3, 2, 2.5, 2.4, 2.1], 3, 0.0, True),
        ([3, 2, 2.5, 2.4], 3, 0.0, False),  # only two are worse so far
        ([3, 2, 1.95, 1.92], 2, 0.1, True),  # better, but by less than counts
        ([3, 2, 1.95, 1.85], 2, 0.1, False),
        ([1], 1, 0.0, False),
        ([], 1, 0.0, False),
    ],
)
def test_patience(valid: list[float], patience: int, min_delta: float, stops: bool) -> None:
    assert trend.should_stop(history(valid), EarlyStopping(patience=patience, min_delta=min_delta)) is stops
    assert not trend.should_stop(history(valid), None)


def test_overfitting_is_told_once_for_each_stretch() -> None:
    valid = [2, 1, 1.1, 1.2, 1.3, 1.4, 1.0, 1.1, 1.2, 1.3]
    told = [n for n in range(len(valid) + 1) if trend.overfits(history(valid[:n]))]
    assert told == [5, 10]
    assert not any(trend.overfits(history(valid[:n], [1.0 + n for n in range(n)])) for n in range(len(valid) + 1))  # training rises too
    assert not any(trend.overfits(history([0.484, 0.485, 0.487, 0.494][:n])) for n in range(5))  # a few examples wander by as much


def test_underfitting_needs_both_losses_to_fall_to_the_end() -> None:
    assert trend.underfits(history([3, 2, 1], [3, 2, 1]))
    assert not trend.underfits(history([3, 2, 1.99], [3, 2, 1]))
    assert not trend.underfits(history([3, 2, 1], [3, 2, 1.99]))
    assert not trend.underfits(history([3, 2], [3, 2]))
