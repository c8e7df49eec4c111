"""How far raters agree. Pure arithmetic.

Sources: Cohen 1960 (kappa of two raters), Cohen 1968 with quadratic weights (two raters on an ordered scale), Fleiss 1971 in the form for
unequal numbers of ratings (Fleiss, Levin and Paik 2003), Light 1971 (the mean over pairs of raters).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

Ratings = Mapping[str, Mapping[Any, Any]]
"""Rater -> what was rated -> the category given."""


def cohen(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Agreement of two raters beyond chance, over (first's, second's) category; None where it is not defined: nothing rated by both, or
    both always gave one and the same category."""
    if not pairs:
        return None
    num = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / num
    chance = sum(first[category] * second[category] for category in first) / num**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def cohen_quadratic(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The same for grades: a disagreement weighs as the square of its size."""
    observed = sum((a - b) ** 2 for a, b in pairs)
    chance = sum((a - b) ** 2 for a, _ in pairs for _, b in pairs) / max(1, len(pairs))
    return None if chance == 0 else 1 - observed / chance


def fleiss(counts: Sequence[Mapping[Any, int]]) -> float | None:
    """Agreement of any number of raters beyond chance, from each item's ratings per category. Items with fewer than two ratings tell
    nothing about it and are left out; where all have equally many, this is Fleiss' kappa as of 1971. None where it is not defined."""
    rated = [item for item in counts if sum(item.values()) > 1]
    if not rated:
        return None
    total: Counter[Hashable] = Counter()
    agreed = 0.0
    for item in rated:
        num = sum(item.values())
        agreed += sum(count * (count - 1) for count in item.values()) / (num * (num - 1))
        total.update(item)
    observed = agreed / len(rated)
    chance = sum((count / total.total()) ** 2 for count in total.values())
    return None if chance == 1 else (observed - chance) / (1 - chance)


def of_choices(ratings: Ratings) -> dict[str, Any]:
    """Cohen's kappa of two raters, Fleiss' of more, with how often two raters of an item chose alike."""
    shared = _pairs(ratings)
    alike = [a == b for pairs in shared for a, b in pairs]
    if len(ratings) == 2:
        method, kappa = "Cohen's kappa", cohen(shared[0])
    else:
        items = {item for given in ratings.values() for item in given}
        method, kappa = "Fleiss' kappa", fleiss([Counter(given[item] for given in ratings.values() if item in given) for item in items])
    return _told(method, kappa, ratings, alike)


def of_grades(ratings: Ratings) -> dict[str, Any]:
    """Quadratically weighted kappa of two raters, its mean over pairs of more, with how often two raters gave the same grade."""
    shared = _pairs(ratings)
    kappas = [kappa for pairs in shared if (kappa := cohen_quadratic(pairs)) is not None]
    method = "Cohen's kappa, quadratic weights" if len(ratings) == 2 else "Light's kappa, quadratic weights"
    return _told(method, sum(kappas) / len(kappas) if kappas else None, ratings, [a == b for pairs in shared for a, b in pairs])


def _pairs(ratings: Ratings) -> list[list[tuple[Any, Any]]]:
    """For every two raters: their categories of what both rated."""
    return [[(a[item], b[item]) for item in a if item in b] for a, b in combinations(ratings.values(), 2)]


def _told(method: str, kappa: float | None, ratings: Ratings, alike: list[bool]) -> dict[str, Any]:
    shared = Counter(item for given in ratings.values() for item in given)
    return {
        "method": method,
        "kappa": kappa,
        "raters": len(ratings),
        "shared_items": sum(count > 1 for count in shared.values()),
        "same_choice": sum(alike) / len(alike) if alike else None,
    }
