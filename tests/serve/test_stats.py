"""Intervals and tests against independent references: SciPy's own, exact enumeration, and coverage over many samples."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats as scipy_stats

from serve import stats


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 1), (3, 10), (50, 100), (999, 1000), (10, 10)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    want = scipy_stats.binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert stats.wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-9)


def test_wilson_of_nothing_says_nothing() -> None:
    assert stats.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (0, 1), (0, 6), (1, 7), (5, 5), (10, 30), (400, 500)])
def test_mcnemar_is_the_exact_binomial_sum(worse: int, better: int) -> None:
    n, k = worse + better, min(worse, better)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1))
    assert stats.mcnemar(worse, better) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_bootstrap_agrees_with_scipys() -> None:
    rng = np.random.default_rng(1)
    base, tuned = rng.random(60), rng.random(60) + 0.1
    mine = stats.paired_bootstrap(list(base), list(tuned))
    want = scipy_stats.bootstrap(
        (tuned - base,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert mine == pytest.approx((want.low, want.high), abs=0.02)
    assert stats.paired_bootstrap(list(base), list(tuned)) == mine  # made twice, it says the same


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        low, high = stats.bootstrap_mean(list(rng.exponential(1.0, 80)), seed=seed)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 300 <= 0.98


def test_weighted_bootstrap_is_of_the_ratio() -> None:
    values, weights = [2.0, 30.0, 4.0], [1.0, 10.0, 2.0]
    ratios = sorted(sum(values[i] for i in chosen) / sum(weights[i] for i in chosen) for chosen in itertools.product(range(3), repeat=3))
    low, high = stats.bootstrap_mean(values, weights)
    assert ratios[0] <= low <= high <= ratios[-1]
    assert (low, high) == pytest.approx((2.0, 3.0), abs=0.01)


def test_a_shift_that_all_cases_share_is_seen_though_cases_differ_much() -> None:
    base = [float(10 * i) for i in range(30)]
    tuned = [value + 1 + 0.1 * (i % 3) for i, value in enumerate(base)]
    low, high = stats.paired_bootstrap(base, tuned)
    assert 1.0 < low < high < 1.2


def test_permutation_p_is_the_enumerated_one() -> None:
    base, tuned = [0.1, 0.4, 0.3, 0.9, 0.2, 0.5, 0.3, 0.6], [0.3, 0.5, 0.8, 0.8, 0.6, 0.9, 0.2, 0.9]
    differences = np.array(tuned) - np.array(base)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean([value >= abs(differences.sum()) - 1e-12 for value in sums])
    assert stats.permutation_p(base, tuned) == pytest.approx(exact, abs=0.02)
    assert stats.permutation_p(base, base) == 1.0


def test_groups_differ_agrees_with_the_f_test() -> None:
    rng = np.random.default_rng(4)
    same = {name: list(rng.normal(0, 1, 25)) for name in "abc"}
    far = {**same, "c": list(rng.normal(0.8, 1, 25))}
    for groups in (same, far):
        want = scipy_stats.f_oneway(*groups.values()).pvalue
        assert stats.groups_differ(groups) == pytest.approx(want, abs=0.03)
    assert stats.groups_differ({"a": [1.0, 1.0], "b": [1.0]}) == 1.0
    assert stats.groups_differ({"a": [1.0, 0.0]}) == 1.0


def test_compare_counts_who_is_better_on_which_case() -> None:
    found = stats.compare([0.0] * 10 + [1.0], [1.0] * 9 + [0.0, 0.0])
    assert (found.better, found.worse, found.difference) == (9, 1, pytest.approx(8 / 11))
    assert found.p == pytest.approx(stats.mcnemar(1, 9))
    assert found.low < found.difference < found.high
    assert stats.compare([0.25, 0.5], [0.5, 0.75]).p > 0.2  # two cases prove nothing


def test_intervals_of_rates_are_wilsons_and_of_scores_bootstrapped() -> None:
    assert stats.interval([1.0, 1.0, 1.0]) == stats.wilson(3, 3)
    low, high = stats.interval([0.5, 0.25, 0.75, 0.5])
    assert 0.25 <= low < 0.5 < high <= 0.75
