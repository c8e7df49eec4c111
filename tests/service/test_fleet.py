from __future__ import annotations

import itertools
import random

from service.fleet import HOLD_S, Whole, kept

NOW = 10_000.0


def test_all_that_fit_are_kept() -> None:
    models = [Whole("a", 40, NOW - 300), Whole("b", 40, NOW - 200), Whole("c", 20, NOW - 100)]
    assert kept(models, 100, NOW) == {"a", "b", "c"}
    assert kept([], 100, NOW) == set()


def test_the_least_recently_asked_give_way() -> None:
    models = [Whole("a", 40, NOW - 300), Whole("b", 40, NOW - 200), Whole("c", 40, NOW - 100)]
    assert kept(models, 100, NOW) == {"b", "c"}
    assert kept([*models[1:], Whole("a", 40, NOW)], 100, NOW) == {"a", "c"}


def test_what_a_job_waits_for_goes_first_and_is_never_left_out() -> None:
    models = [Whole("job", 90, 0.0, needed=True), Whole("asked", 40, NOW), Whole("small", 10, NOW - 100)]
    assert kept(models, 100, NOW) == {"job", "small"}
    assert kept([Whole("job", 90, 0.0, needed=True), Whole("other", 90, 0.0, needed=True)], 100, NOW) == {"job", "other"}


def test_a_model_larger_than_the_bound_runs_alone() -> None:
    assert kept([Whole("large", 500, NOW), Whole("small", 10, NOW - 1)], 100, NOW) == {"large"}
    assert kept([Whole("large", 500, NOW - 1), Whole("small", 10, NOW)], 100, NOW) == {"small"}


def test_models_that_do_not_fit_together_take_turns() -> None:
    """Both are asked all the time; each load is kept long enough to be of use."""
    asked, loaded, changes = random.Random(0), {"a": 0.0, "b": 0.0}, []
    for second in range(300):
        now = NOW + second
        first = asked.choice("ab")
        models = [Whole(app, 80, now - (app != first), loaded_at=loaded[app]) for app in "ab"]
        running = kept(models, 100, now)
        assert len(running) == 1
        for app in "ab":
            if app in running and not loaded[app]:
                changes.append(now)
            loaded[app] = (loaded[app] or now) if app in running else 0.0
    assert 3 <= len(changes) <= 1 + 300 / HOLD_S
    assert all(b - a >= HOLD_S for a, b in itertools.pairwise(changes))
