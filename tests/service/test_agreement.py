"""Agreement of raters, against published figures."""

from __future__ import annotations

import pytest

from service.agreement import cohen, cohen_quadratic, fleiss, of_choices, of_grades

# Fourteen raters put ten subjects into five categories: the worked example of Fleiss' kappa that textbooks repeat, 0.210.
FOURTEEN = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip
# The data set `anxiety` of R's package irr, first two raters: kappa2 gives 0.119 unweighted and 0.297 with squared weights.
ANXIETY = list(
    zip(
        (3, 3, 3, 4, 5, 5, 2, 3, 5, 2, 2, 6, 1, 5, 2, 2, 1, 2, 4, 3),
        (3, 6, 4, 6, 2, 4, 2, 4, 3, 3, 2, 3, 3, 3, 2, 2, 1, 3, 3, 4),
        strict=True,
    )
)


def test_cohens_kappa() -> None:
    proposals = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohen(proposals) == pytest.approx(0.4)
    assert cohen(ANXIETY) == pytest.approx(0.119, abs=5e-4)
    assert cohen([("a", "a"), ("b", "b")]) == 1
    assert cohen([("a", "b"), ("b", "a")]) == -1
    assert cohen([]) is None and cohen([("a", "a")] * 5) is None  # no choice was ever other: nothing is known of agreement


def test_cohens_kappa_with_quadratic_weights() -> None:
    assert cohen_quadratic(ANXIETY) == pytest.approx(0.297, abs=5e-4)
    assert cohen_quadratic([(1, 1), (3, 3), (5, 5)]) == 1
    near, far = [(1, 2), (2, 1), (5, 5)], [(1, 5), (2, 1), (5, 2)]
    assert (cohen_quadratic(near) or 0) > (cohen_quadratic(far) or 0)
    assert cohen_quadratic([]) is None and cohen_quadratic([(3, 3)] * 4) is None


def test_fleiss_kappa() -> None:
    counts = [dict(enumerate(row)) for row in FOURTEEN]
    assert fleiss(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss([*counts, {0: 1}]) == fleiss(counts)  # rated by one alone
    assert fleiss([{"a": 3}, {"b": 3}]) == 1
    assert fleiss([{"a": 1}]) is None and fleiss([{"a": 4}] * 3) is None


def test_raters_choose_the_measure() -> None:
    ann, bob = {1: "0", 2: "1", 3: "tie", 9: "0"}, {1: "0", 2: "1", 3: "both_bad"}
    two = of_choices({"ann": ann, "bob": bob})
    assert (two["method"], two["raters"], two["shared_items"]) == ("Cohen's kappa", 2, 3)
    assert two["same_choice"] == pytest.approx(2 / 3) and two["kappa"] == pytest.approx((2 / 3 - 2 / 9) / (1 - 2 / 9))
    three = of_choices({"ann": ann, "bob": bob, "eve": {1: "0", 2: "1"}})
    assert (three["method"], three["shared_items"]) == ("Fleiss' kappa", 3)
    assert three["kappa"] == fleiss([{"0": 3}, {"1": 3}, {"tie": 1, "both_bad": 1}])
    assert of_choices({"ann": {1: "0"}, "bob": {2: "0"}})["kappa"] is None
    grades = of_grades({"ann": {1: 1, 2: 5}, "bob": {1: 1, 2: 5}, "eve": {1: 2, 2: 5}})
    assert grades["method"] == "Light's kappa, quadratic weights" and 0.9 < grades["kappa"] < 1
