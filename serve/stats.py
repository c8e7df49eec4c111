"""What numbers from a sample of cases allow one to say: intervals, and tests of base against tuned on the same cases. Pure.

All intervals are at 95%. Random numbers come from a fixed seed, so that a report made twice says the same.
Shape letters: N cases, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import binomtest

Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES = 2_000
_AT_ONCE = 2**22  # numbers of a block of resamples: 32 MB


def wilson(successes: float, n: int) -> Interval:
    """Interval of a rate (Wilson, 1927); holds for small n and for rates of 0 and 1, too. `successes` may be fractional (a tie = 0.5)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (rate * (1 - rate) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """Percentile interval of the mean over cases (with weights: sum of values / sum of weights), by resampling cases (Efron, 1979)."""
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(values_N) == 0:
        return 0.0, 0.0
    means_R = np.concatenate([values_N[at].sum(1) / weights_N[at].sum(1) for at in _resamples(len(values_N), seed)])
    return _percentiles(means_R)


def paired_bootstrap(base: Sequence[float], tuned: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """Interval of the mean of tuned - base: each resample takes a case's two values together, so what makes a case hard cancels out."""
    return bootstrap_mean(np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64), weights, seed)  # type: ignore[arg-type]


def mcnemar(worse: int, better: int) -> float:
    """Two-sided p-value that two models are equally often right: only cases where exactly one is right tell them apart (McNemar, 1947).

    Exact (binomial) at any size.
    """
    return float(binomtest(better, worse + better, 0.5).pvalue) if worse + better else 1.0


def permutation_p(base: Sequence[float], tuned: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the mean of tuned - base for scores of any kind: under chance, each case's two scores could be swapped."""
    differences_N = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    if not differences_N.any():
        return 1.0
    rng, found, least = np.random.default_rng(seed), 0, abs(differences_N.sum()) - 1e-12
    for size in _blocks(len(differences_N)):
        signs = rng.integers(0, 2, (size, len(differences_N)), dtype=np.int8) * 2 - 1
        found += int((np.abs(signs @ differences_N) >= least).sum())
    return (found + 1) / (RESAMPLES + 1)


def groups_differ(groups: Mapping[str, Sequence[float]], seed: int = 0) -> float:
    """P-value that all groups have the same mean: between-group variance against that of shuffled groups (permutation test)."""
    parts = [np.asarray(values, dtype=np.float64) for values in groups.values() if len(values)]
    if len(parts) < 2:
        return 1.0
    all_N, sizes = np.concatenate(parts), [len(part) for part in parts]
    if np.ptp(all_N) == 0:
        return 1.0
    starts, grand = np.cumsum([0, *sizes[:-1]]), all_N.mean()

    def between(rows: np.ndarray) -> np.ndarray:
        means = np.add.reduceat(rows, starts, axis=-1) / sizes
        return ((means - grand) ** 2 * sizes).sum(-1)

    rng, seen, found = np.random.default_rng(seed), between(all_N) - 1e-12, 0
    for size in _blocks(len(all_N)):
        found += int((between(rng.permuted(np.tile(all_N, (size, 1)), axis=1)) >= seen).sum())
    return (found + 1) / (RESAMPLES + 1)


@dataclass(frozen=True)
class Compared:
    """Tuned against base on the same cases."""

    difference: float
    """Mean of tuned - base."""
    low: float
    high: float
    p: float
    """Two-sided: how often chance alone gives such a difference."""
    better: int
    """Cases on which tuned scored higher."""
    worse: int


def compare(base: Sequence[float], tuned: Sequence[float]) -> Compared:
    """Paired comparison; exact McNemar where scores are all 0 or 1, else a permutation test."""
    better, worse = (sum(sign * (b - a) > 1e-9 for a, b in zip(base, tuned, strict=True)) for sign in (1, -1))
    rates = set(base) | set(tuned) <= {0.0, 1.0}
    p = mcnemar(worse, better) if rates else permutation_p(base, tuned)
    difference = float(np.mean(tuned) - np.mean(base)) if len(base) else 0.0
    return Compared(difference, *paired_bootstrap(base, tuned), p, better, worse)


def interval(scores: Sequence[float]) -> Interval:
    """Of the mean: Wilson's where scores are all 0 or 1, else by bootstrap."""
    return wilson(sum(scores), len(scores)) if set(scores) <= {0.0, 1.0} else bootstrap_mean(scores)


def _blocks(n: int) -> list[int]:
    """Sizes of blocks of resamples that fit in memory."""
    most = max(1, _AT_ONCE // max(n, 1))
    return [min(most, RESAMPLES - done) for done in range(0, RESAMPLES, most)]


def _resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for size in _blocks(n):
        yield rng.integers(0, n, (size, n))


def _percentiles(values_R: np.ndarray) -> Interval:
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
