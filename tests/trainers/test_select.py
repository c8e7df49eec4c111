"""The choice over all rows: every row has one fate, and no fate hangs on chunks, paths or chance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.errors import SpecError
from trainers.select import Rows, Selection, near_twins, select
from trainers.spec import Curate

QUIET: dict[str, Any] = {"duplicates": "off", "conflicts": "off", "leakage": "off"}


def rows(
    prompts: list[int],
    answers: list[int] | None = None,
    source: list[int] | None = None,
    held_out: list[bool] | None = None,
    cls: list[int] | None = None,
    sketches: np.ndarray | None = None,
) -> Rows:
    """Rows with these prompts and answers; equal numbers are equal texts."""
    count = len(prompts)
    answers = answers if answers is not None else [0] * count
    digest = [hash((p, a)) % 2**64 for p, a in zip(prompts, answers, strict=True)]
    return Rows(
        np.array(source or [0] * count, np.int32),
        np.array(held_out or [False] * count, bool),
        np.array(digest, np.uint64),
        np.array([hash((p,)) % 2**64 for p in prompts], np.uint64),
        np.array(cls if cls is not None else [-1] * count, np.int32),
        sketches,
    )


def choose(
    data: Rows,
    weights: list[float] | None = None,
    fraction: float = 0.0,
    names: list[str] | None = None,
    tests: dict[str, np.ndarray] | None = None,
    **curate: Any,
) -> Selection:
    return select(data, Curate.model_validate({**QUIET, **curate}), weights or [1.0], fraction, names or [], tests or {})


def told(selection: Selection) -> list[tuple[str, str, list[int], list[int | str]]]:
    return [(found.step, found.action, found.rows.tolist(), found.twins) for found in selection.findings]


# -- duplicates and conflicts --------------------------------------------------------------------------------------------


def test_the_first_of_each_duplicate_stays() -> None:
    data = rows([1, 2, 1, 3, 2, 1])
    dropped = choose(data, duplicates="drop")
    assert dropped.train.tolist() == [0, 1, 3]
    assert told(dropped) == [("duplicates", "drop", [2, 4, 5], [0, 1, 0])]
    assert {step: gone.tolist() for step, gone in dropped.dropped.items()} == {"duplicates": [2, 4, 5]}
    reported = choose(data, duplicates="report")
    assert reported.train.tolist() == [0, 1, 2, 3, 4, 5] and not reported.dropped
    assert told(reported) == [("duplicates", "report", [2, 4, 5], [0, 1, 0])]


def test_training_and_validation_sources_are_looked_at_apart() -> None:
    data = rows([1, 1, 1, 1], source=[0, 0, 1, 1], held_out=[False, False, True, True])
    chosen = choose(data, duplicates="drop")
    assert chosen.train.tolist() == [0] and chosen.validation.tolist() == [2]


def test_conflicts_are_all_rows_of_a_prompt_with_different_answers() -> None:
    data = rows([1, 2, 1, 3, 1, 3], [0, 0, 1, 5, 0, 5])  # prompt 3 has one answer twice: no conflict
    dropped = choose(data, conflicts="drop")
    assert dropped.train.tolist() == [1, 3, 5]
    assert told(dropped) == [("conflicts", "drop", [0, 2, 4], [2, 0, 2])]
    assert dropped.findings[0].detail == {"prompts": 1}
    refused = choose(data, conflicts="refuse")
    assert told(refused) == [("conflicts", "refuse", [0, 2, 4], [2, 0, 2])] and not refused.dropped


# -- near-duplicates -----------------------------------------------------------------------------------------------------


def altered(sketch: np.ndarray, changed: int, seed: int) -> np.ndarray:
    """The sketch with so many of its 128 values replaced."""
    draw = np.random.default_rng(seed)
    out = sketch.copy()
    out[draw.choice(128, changed, replace=False)] = draw.integers(0, 2**16, changed)
    return out


def test_the_first_of_each_near_duplicate_stays_and_chains_do_not_grow() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 2**16, (2, 128), dtype=np.uint16)
    near = altered(one, 20, 1)
    far = altered(near, 20, 2)  # like `near`, but not like `one`: `near` is gone, so this one stays
    data = rows([1, 2, 3, 4], sketches=np.stack([one, other, near, far]))
    chosen = choose(data, near_duplicates={"threshold": 0.8})
    assert chosen.train.tolist() == [0, 1, 3]
    assert told(chosen) == [("near_duplicates", "drop", [2], [0])]
    assert choose(data, near_duplicates={"threshold": 0.8, "action": "report"}).train.tolist() == [0, 1, 2, 3]
    assert choose(data, near_duplicates={"threshold": 0.9}).train.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_what_is_dropped_is_alike_and_what_is_kept_is_not(threshold: float) -> None:
    draw = np.random.default_rng(3)
    bases = draw.integers(0, 2**16, (100, 128), dtype=np.uint16)
    sketches = np.stack([altered(bases[i % 100], int(draw.integers(0, 90)), i) for i in range(1000)])
    twins = near_twins(sketches, threshold, np.arange(1000))
    alike = (sketches[:, None, :] == sketches[None, :, :]).mean(axis=2)
    kept = np.flatnonzero(twins < 0)
    for row in np.flatnonzero(twins >= 0):
        assert twins[row] < row and twins[twins[row]] < 0 and alike[row, twins[row]] >= threshold - 1e-9
    missed = sum((alike[row, kept[kept < row]] >= threshold).any() for row in kept)
    assert missed <= 0.01 * (1000 - len(kept))


def test_thousands_of_rows_of_one_template_take_bounded_work() -> None:
    draw = np.random.default_rng(5)
    base = draw.integers(0, 2**16, 128, dtype=np.uint16)
    sketches = draw.integers(0, 2**16, (5000, 128), dtype=np.uint16)
    shared = draw.random((5000, 128)) < 0.7
    sketches[shared] = np.broadcast_to(base, (5000, 128))[shared]  # any two are about half alike: candidates of each other, no twins
    assert (near_twins(sketches, 0.8, np.arange(5000)) < 0).mean() > 0.99


# -- split ---------------------------------------------------------------------------------------------------------------


def test_the_split_is_by_prompt_and_about_as_large_as_asked() -> None:
    prompts = [i // 2 for i in range(20_000)]
    chosen = choose(rows(prompts, list(range(20_000))), fraction=0.1)
    held = {prompts[i] for i in chosen.validation}
    assert held.isdisjoint(prompts[i] for i in chosen.train)
    assert 0.09 < len(chosen.validation) / 20_000 < 0.11


@pytest.mark.parametrize("fraction", [1e-9, 0.5])
@pytest.mark.parametrize("count", range(2, 8))
def test_two_prompts_are_enough_for_both_sides(count: int, fraction: float) -> None:
    chosen = choose(rows(list(range(count))), fraction=fraction)
    assert len(chosen.train) and len(chosen.validation)
    alone = choose(rows([7] * count), fraction=fraction)
    assert len(alone.train) == count


def test_the_split_of_a_row_stays_when_others_come() -> None:
    few = choose(rows(list(range(500))), fraction=0.2)
    many = choose(rows([*range(-300, 0), *range(500)]), fraction=0.2)
    assert {i - 300 for i in many.validation.tolist() if i >= 300} == set(few.validation.tolist())


# -- leakage -------------------------------------------------------------------------------------------------------------


def test_prompts_of_validation_and_of_tests_are_found_in_training() -> None:
    data = rows([1, 2, 3, 4, 2, 9], [0, 0, 0, 0, 7, 0], source=[0, 0, 0, 0, 1, 1], held_out=[False] * 4 + [True] * 2)
    tests = {"exam": rows([3, 2]).prompt, "quiz": rows([3, 8]).prompt}
    dropped = choose(data, leakage="drop", tests=tests)
    assert dropped.train.tolist() == [0, 3] and dropped.validation.tolist() == [4, 5]
    assert told(dropped) == [("leakage", "drop", [1, 2], [4, "exam"])]
    assert dropped.findings[0].detail == {"validation": 1, "exam": 1}
    refused = choose(data, leakage="refuse", tests=tests)
    assert told(refused) == [("leakage", "refuse", [1, 2], [4, "exam"])] and refused.train.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("action", ["drop", "report", "off"])
def test_near_duplicates_of_validation_leak_too(action: str) -> None:
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 2**16, (2, 128), dtype=np.uint16)
    data = rows([1, 2, 3], source=[0, 0, 1], held_out=[False, False, True], sketches=np.stack([one, other, altered(one, 10, 0)]))
    chosen = choose(data, leakage="drop", near_duplicates={"action": action})
    assert chosen.train.tolist() == [1] and chosen.validation.tolist() == [2]
    assert chosen.findings[-1].detail == {"nearly in validation": 1} and chosen.findings[-1].twins == [2]


def test_near_duplicates_that_only_are_reported_leak_across_the_split() -> None:
    draw = np.random.default_rng(0)
    base = draw.integers(0, 2**16, 128, dtype=np.uint16)
    data = rows(list(range(10)), sketches=np.stack([altered(base, 5, i) for i in range(10)]))
    chosen = choose(data, fraction=0.3, leakage="report", near_duplicates={"action": "report"})
    assert chosen.findings[-1].step == "leakage" and len(chosen.findings[-1].rows) == len(chosen.train)


# -- mixture and balance -------------------------------------------------------------------------------------------------


def test_weights_repeat_and_thin_sources_in_passes_of_file_order() -> None:
    data = rows(list(range(14)), source=[0] * 4 + [1] * 10)
    chosen = choose(data, [2.5, 0.5])
    times = Counter(chosen.train.tolist())
    assert sorted(times[i] for i in range(4)) == [2, 2, 3, 3]
    assert sorted(times[i] for i in range(4, 14)) == [0] * 5 + [1] * 5
    passes = np.split(chosen.train, np.flatnonzero(np.diff(chosen.train) <= 0) + 1)
    assert [len(p) for p in passes] == [9, 4, 2] and set(passes[2]) < set(passes[1]) < set(passes[0])
    assert [(f.step, f.action, len(f.rows)) for f in chosen.findings] == [("mixture", "repeat", 4), ("mixture", "thin", 5)]
    assert set(chosen.thinned.tolist()) == {i for i in range(4, 14) if not times[i]}


def test_the_same_half_is_taken_wherever_its_rows_stand() -> None:
    half = set(choose(rows(list(range(100))), [0.5]).train.tolist())
    after = choose(rows([*range(1000, 1050), *reversed(range(100))], source=[0] * 50 + [1] * 100), [3.0, 0.5])
    assert {149 - i for i in after.train.tolist() if i >= 50} == half


def classes(counts: list[int]) -> Rows:
    cls = [c for c, count in enumerate(counts) for _ in range(count)]
    return rows(list(range(len(cls))), cls=cls)


def shares(data: Rows, chosen: Selection) -> list[int]:
    return np.bincount(data.cls[chosen.train]).tolist()


@pytest.mark.parametrize(
    ("counts", "balance", "wanted"),
    [
        ([60, 40], {}, [50, 50]),
        ([90, 10], {}, [60, 40]),  # 10 rows four times each, the others fill up
        ([90, 10], {"max_repeat": 2}, [80, 20]),
        ([90, 10], {"max_repeat": 1}, [90, 10]),
        ([50, 30, 20], {"weights": {"a": 2}}, [50, 25, 25]),
        ([50, 30, 20], {"weights": {"a": 1, "b": 1, "c": 2}}, [25, 25, 50]),
        ([1000, 10, 1], {}, [967, 40, 4]),
        ([7], {}, [7]),
    ],
)
def test_balance(counts: list[int], balance: dict[str, Any], wanted: list[int]) -> None:
    data = classes(counts)
    chosen = choose(data, names=["a", "b", "c"], balance={"by": "kind", **balance})
    assert shares(data, chosen) == wanted
    times = np.bincount(chosen.train, minlength=len(data.cls))
    for c in range(len(counts)):
        assert np.ptp(times[data.cls == c]) <= 1  # fair: no row of a class twice more often than another
    assert times.max() <= balance.get("max_repeat", 4)


def test_balance_keeps_the_mixture_within_a_class() -> None:
    data = rows(list(range(400)), source=[0] * 200 + [1] * 200, cls=[0] * 100 + [1] * 100 + [0] * 150 + [1] * 50)
    chosen = choose(data, [2.0, 1.0], names=["a", "b"], balance={"by": "kind"})
    assert shares(data, chosen) == [300, 300]
    cells = Counter(zip(data.source[chosen.train].tolist(), data.cls[chosen.train].tolist(), strict=True))
    assert cells == {(0, 0): 171, (1, 0): 129, (0, 1): 240, (1, 1): 60}  # 200:150 and 200:50


def test_rows_without_a_class_are_left_as_they_are() -> None:
    data = rows(list(range(100)), cls=[0] * 60 + [1] * 20 + [-1] * 20)
    chosen = choose(data, names=["a", "b"], balance={"by": "kind"})
    assert np.bincount(data.cls[chosen.train] + 1).tolist() == [20, 40, 40]
    assert {(f.action, tuple(f.detail.items())) for f in chosen.findings} == {("repeat", (("b", 20.0),)), ("thin", (("a", 20.0),))}


def test_classes_that_are_not_there() -> None:
    with pytest.raises(SpecError, match=r"`positiv`.*Did you mean `positive`"):
        choose(classes([3, 3]), names=["positive", "negative"], balance={"by": "kind", "weights": {"positiv": 2}})
    with pytest.raises(SpecError, match=r"no example's `kind` is that.*The data has: a, b"):
        choose(classes([3, 3]), names=["a", "b"], balance={"by": "kind", "weights": {"wholly else": 2}})
    with pytest.raises(SpecError, match="No training example has a column `kind`"):
        choose(rows([1, 2, 3]), balance={"by": "kind"})


# -- whatever the rows ---------------------------------------------------------------------------------------------------

ACTIONS = st.sampled_from(["off", "report", "drop"])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    num_train = draw(st.integers(1, len(sizes)))
    count = sum(sizes)
    numbers = st.lists(st.integers(0, 6), min_size=count, max_size=count)
    sketched = draw(st.booleans())
    base = np.random.default_rng(0).integers(0, 2**16, (4, 128), dtype=np.uint16)
    data = rows(
        draw(numbers),
        draw(numbers),
        source=[s for s, size in enumerate(sizes) for _ in range(size)],
        held_out=[s >= num_train for s, size in enumerate(sizes) for _ in range(size)],
        cls=[number - 1 if number < 4 else 0 for number in draw(numbers)],
        sketches=np.stack([altered(base[n % 4], 10 * n, n) for n in draw(numbers)]) if sketched and count else None,
    )
    return {
        "data": data,
        "weights": draw(st.lists(st.floats(0.1, 5), min_size=num_train, max_size=num_train)),
        "fraction": draw(st.sampled_from([0.0, 0.1, 0.5])) if num_train == len(sizes) else 0.0,
        "names": ["a", "b", "c"],
        "tests": {"exam": rows(draw(st.lists(st.integers(0, 6), max_size=2))).prompt},
        "duplicates": draw(ACTIONS),
        "conflicts": draw(ACTIONS),
        "leakage": draw(ACTIONS),
        "near_duplicates": {"action": draw(ACTIONS)} if sketched else None,
        "balance": {"by": "kind", "max_repeat": draw(st.integers(1, 5))} if draw(st.booleans()) else None,
    }


@settings(max_examples=300)
@given(cases())
def test_every_row_has_exactly_one_fate(case: dict[str, Any]) -> None:
    try:
        chosen = choose(**case)
    except SpecError:  # all rows with a class were dropped
        assert case["balance"]
        return
    data = case["data"]
    fates = Counter(np.unique(chosen.train).tolist()) + Counter(chosen.validation.tolist()) + Counter(chosen.thinned.tolist())
    for gone in chosen.dropped.values():
        fates += Counter(gone.tolist())
    assert fates == Counter(range(len(data.digest)))
    assert not data.held_out[chosen.train].any()
    assert {f.step for f in chosen.findings if f.action == "drop"} == set(chosen.dropped)
    if case["leakage"] == "drop":
        assert not np.isin(data.prompt[chosen.train], [*data.prompt[chosen.validation], *case["tests"]["exam"]]).any()
    if case["duplicates"] == "drop":
        assert len(np.unique(data.digest[chosen.validation])) == len(chosen.validation)
    if case["balance"] is None:
        left = np.concatenate([np.unique(chosen.train), chosen.thinned])
        for source, weight in enumerate(case["weights"]):
            assert (data.source[chosen.train] == source).sum() == round(weight * int((data.source[left] == source).sum()))


def test_no_rows_at_all() -> None:
    chosen = choose(rows([]), fraction=0.1, duplicates="drop", conflicts="drop", leakage="drop")
    assert len(chosen.train) == len(chosen.validation) == 0 and not chosen.findings
