"""The choice over all rows: which of them are trained on, how often, and which are held out.

Works on a few numbers of each row, in file order, and gives row numbers back, so that a million rows fit easily on one
machine. Every decision hangs on the rows' content and order alone: not on chunks, workers, paths or the job's seed.

    duplicates -> near-duplicates -> conflicts -> split -> leakage -> mixture and balance

The first four and leakage may leave a row out, for one reason only: the first that applies. Mixture and balance decide how
often the training rows that are left stand in an epoch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainers.errors import SpecError
from trainers.spec import Balance, Curate

SPLIT_SEED = 0  # of the hash that holds rows out; a job's own seed must not change what it is measured on
_MIXTURE_SEED = 1
_CASES = 20  # rows of a finding whose twins are named
_LOOK_BACK = 32  # kept rows of a bucket that a row is compared with: bounds the time where thousands of rows share a template

Indices = NDArray[np.int64]


@dataclass
class Rows:
    """A few numbers of each row that came through the row checks, training sources first, in file order. N rows."""

    source: NDArray[np.int32]
    """[N] index among the job's sources."""
    held_out: NDArray[np.bool_]
    """[N] whether the row's source is one of validation."""
    digest: NDArray[np.uint64]
    """[N] of everything said (curate.fingerprints)."""
    prompt: NDArray[np.uint64]
    """[N] of what stands before the last answer."""
    cls: NDArray[np.int32]
    """[N] index into the class names; -1: the row has no class."""
    sketches: NDArray[np.uint16] | None = None
    """[N, P] MinHash sketches (curate.sketch), where near-duplicates are looked for."""


class Found(NamedTuple):
    """One thing that was looked for or done."""

    step: str
    action: str
    """`report`, `drop`, `refuse`, `repeat` or `thin`; with `refuse` the caller must stop the job."""
    detail: dict[str, float]
    """Counts by kind, where there are kinds."""
    rows: Indices
    twins: list[int | str]
    """Of the first few rows: the row that each resembles, or the evaluation task that holds its prompt."""


@dataclass
class Selection:
    """What is trained on. Every row is in exactly one of train, validation, one reason of `dropped`, or thinned."""

    train: Indices
    """Rows in training order: all in file order, then the second copies, and so on."""
    validation: Indices
    dropped: dict[str, Indices] = field(default_factory=dict)
    """Step -> rows left out by it."""
    findings: list[Found] = field(default_factory=list)

    @property
    def thinned(self) -> Indices:
        """Rows that mixture or balance leave out of every epoch."""
        return np.concatenate([np.empty(0, np.int64), *(found.rows for found in self.findings if found.action == "thin")])


def select(
    rows: Rows,
    curate: Curate,
    weights: list[float],
    validation_fraction: float,
    class_names: list[str],
    test_prompts: dict[str, NDArray[np.uint64]],
    test_sketches: dict[str, NDArray[np.uint16]] | None = None,
) -> Selection:
    """Choose the rows of a job.

    `weights` are the training sources' shares in the mixture; `validation_fraction` of the training rows' prompts is held out (0
    where validation has sources of its own); `test_prompts` are evaluation tasks' prompts by task name, `test_sketches` their sketches.
    Raises SpecError where balance names a class that no row has.
    """
    choice = _Choice(np.ones(len(rows.digest), bool))
    if curate.duplicates != "off":
        choice.act("duplicates", curate.duplicates, *_on_each_side(rows, choice.alive, lambda i: _duplicates(rows.digest[i])))
    near, sketches = curate.near_duplicates, rows.sketches
    if near is not None and sketches is not None and near.action != "off":
        look = _on_each_side(rows, choice.alive, lambda i: near_twins(sketches, near.threshold, i))
        choice.act("near_duplicates", near.action, *look)
    if curate.conflicts != "off":
        at, twins = _on_each_side(rows, choice.alive, lambda i: _conflicts(rows.prompt[i], rows.digest[i]))
        choice.act("conflicts", curate.conflicts, at, twins, {"prompts": float(len(np.unique(rows.prompt[at])))})

    validation = rows.held_out | _split(rows, choice.alive, validation_fraction)
    if curate.leakage != "off":
        _leakage(choice, rows, validation, curate, test_prompts, test_sketches or {})

    train = np.flatnonzero(choice.alive & ~validation)
    copies = np.zeros(len(rows.digest), np.int64)
    copies[train] = _copies(rows, train, weights, curate.balance, class_names)
    _tell_copies(choice, rows, train, copies, "mixture" if curate.balance is None else "balance", class_names)
    passes = [np.flatnonzero(copies > number) for number in range(int(copies.max(initial=0)))]
    return Selection(
        np.concatenate([np.empty(0, np.int64), *passes]), np.flatnonzero(choice.alive & validation), choice.dropped, choice.findings
    )


@dataclass
class _Choice:
    """The rows that are left, and what happened so far."""

    alive: NDArray[np.bool_]
    dropped: dict[str, Indices] = field(default_factory=dict)
    findings: list[Found] = field(default_factory=list)

    def act(self, step: str, action: str, rows: Indices, twins: list[int | str], detail: dict[str, float] | None = None) -> None:
        if not len(rows):
            return
        self.findings.append(Found(step, action, detail or {}, rows, twins))
        if action == "drop":
            self.alive[rows] = False
            self.dropped[step] = rows


def _on_each_side(rows: Rows, alive: NDArray[np.bool_], find: Callable[[Indices], Indices]) -> tuple[Indices, list[int | str]]:
    """(rows, twins of the first few) where `find` gives rows a twin (-1: none), training and validation sources each by themselves."""
    twin_of = np.full(len(alive), -1, np.int64)
    for side in (~rows.held_out, rows.held_out):
        mine = np.flatnonzero(alive & side)
        if len(mine):
            twin = find(mine)
            twin_of[mine] = np.where(twin >= 0, mine[twin], -1)
    found = np.flatnonzero(twin_of >= 0)
    return found, twin_of[found[:_CASES]].tolist()


def _first_equal(keys: NDArray[np.uint64]) -> Indices:
    """For each key the place where it stands first."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _duplicates(digest: NDArray[np.uint64]) -> Indices:
    first = _first_equal(digest)
    return np.where(first != np.arange(len(digest)), first, -1)


def _conflicts(prompt: NDArray[np.uint64], digest: NDArray[np.uint64]) -> Indices:
    """Every row of a prompt that has different answers gets a twin with another answer."""
    first = _first_equal(prompt)
    differs = np.flatnonzero(digest != digest[first])
    prompts, at = np.unique(first[differs], return_index=True)  # each such prompt's first row, and the first that differs from it
    twin = np.full(len(prompt), -1, np.int64)
    same = np.flatnonzero(np.isin(first, prompts))
    twin[same] = differs[at][np.searchsorted(prompts, first[same])]
    twin[differs] = first[differs]
    return twin


def _hash(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 of keys (Steele et al., 2014): a second, independent hash of what is already hashed."""
    z = keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _split(rows: Rows, alive: NDArray[np.bool_], fraction: float) -> NDArray[np.bool_]:
    """[N] the rows that are held out: those of a prompt with a small hash, so that no prompt is on both sides.

    At least one prompt is on each side where there are two.
    """
    hashes = _hash(rows.prompt, SPLIT_SEED)
    among = hashes[alive & ~rows.held_out]
    if not fraction or not len(among):
        return np.zeros(len(alive), bool)
    lowest, highest = int(among.min()), int(among.max())
    limit = min(max(int(fraction * 2**64), lowest + 1), highest)  # one prompt alone is trained on
    return hashes < np.uint64(limit)


def _leakage(
    choice: _Choice,
    rows: Rows,
    validation: NDArray[np.bool_],
    curate: Curate,
    test_prompts: dict[str, NDArray[np.uint64]],
    test_sketches: dict[str, NDArray[np.uint16]],
) -> None:
    """Training rows whose prompt is also one of validation or of an evaluation task, or that are near-duplicates of a row there."""
    train, held_out = np.flatnonzero(choice.alive & ~validation), np.flatnonzero(choice.alive & validation)
    twins: dict[int, int | str] = {}
    detail: dict[str, float] = {}

    def add(kind: str, leaking: Indices, twins_of: list[int] | list[str]) -> None:
        new = {row: twin for row, twin in zip(leaking.tolist(), twins_of, strict=True) if row not in twins}
        twins.update(new)
        if new:
            detail[kind] = len(new)

    prompts, first = np.unique(rows.prompt[held_out], return_index=True)
    leaking = train[np.isin(rows.prompt[train], prompts)]
    add("validation", leaking, held_out[first][np.searchsorted(prompts, rows.prompt[leaking])].tolist())
    for task, asked in test_prompts.items():
        leaking = train[np.isin(rows.prompt[train], asked)]
        add(task, leaking, [task] * len(leaking))
    near = curate.near_duplicates
    if near is not None and rows.sketches is not None:
        if near.action == "drop":  # then the split has none left
            held_out = held_out[rows.held_out[held_out]]
        order = np.concatenate([held_out, train])
        twin = near_twins(rows.sketches, near.threshold, order, references=len(held_out))[len(held_out) :]
        add("nearly in validation", train[twin >= 0], order[twin[twin >= 0]].tolist())
        for task, theirs in test_sketches.items():
            both = np.concatenate([theirs, rows.sketches[train]])
            leaking = train[near_twins(both, near.threshold, np.arange(len(both)), references=len(theirs))[len(theirs) :] >= 0]
            add(f"nearly in {task}", leaking, [task] * len(leaking))
    at = np.array(sorted(twins), np.int64)
    choice.act("leakage", curate.leakage, at, [twins[row] for row in at[:_CASES].tolist()], detail)


# -- near-duplicates -----------------------------------------------------------------------------------------------------


def near_twins(sketches: NDArray[np.uint16], threshold: float, order: Indices, references: int | None = None) -> Indices:
    """For each row of `order` a place in it before its own, of a row that is kept and alike; -1: there is none, the row itself is kept.

    Alike are rows with an estimated Jaccard similarity of at least `threshold`. sketches: [N, P]. With `references`, only the first so
    many of the order are kept, and only the others are compared. Candidates come from locality-sensitive hashing (Leskovec et al., Mining
    of Massive Datasets, 3.4), and each is verified; of rows as alike as the threshold 99% are candidates.
    """
    table, num_buckets = _buckets(sketches, order, _band_width(threshold, sketches.shape[1]))
    latest = np.full(num_buckets, -1, np.int32)
    twins = np.full(len(order), -1, np.int64)
    wanted = int(np.ceil(threshold * sketches.shape[1] - 1e-9))

    def twin(place: int, bands: Indices) -> int:
        at = latest[table[place, bands]]
        for steps in (1, _LOOK_BACK - 1):  # most twins are the latest kept row of a bucket
            seen = []
            for _ in range(steps):
                bands, at = bands[at >= 0], at[at >= 0]
                if not len(at):
                    break
                seen.append(at)
                at = table[at, bands]
            if not seen:
                return -1
            kept = np.unique(np.concatenate(seen))
            alike = kept[np.count_nonzero(sketches[order[kept]] == sketches[order[place]], axis=1) >= wanted]
            if len(alike):
                return int(alike[0])
        return -1

    for place in np.flatnonzero((table >= 0).any(axis=1)).tolist():
        bands = np.flatnonzero(table[place] >= 0)
        if references is None or place >= references:
            twins[place] = twin(place, bands)
        if twins[place] < 0 and (references is None or place < references):
            buckets = table[place, bands]
            table[place, bands] = latest[buckets]  # from here on a link to the kept row before it in the same bucket
            latest[buckets] = place
    return twins


def _band_width(threshold: float, num_values: int) -> int:
    """The most values a band can have for two rows at the threshold to share a band with a probability of at least 99%."""
    widths = [w for w in range(1, num_values + 1) if 1 - (1 - threshold**w) ** (num_values // w) >= 0.99]
    return max(widths)


def _buckets(sketches: NDArray[np.uint16], order: Indices, width: int) -> tuple[NDArray[np.int32], int]:
    """[len(order), bands] the bucket that a row shares with others in each band (-1: it is alone), and how many buckets there are."""
    num_bands = sketches.shape[1] // width
    table = np.full((len(order), num_bands), -1, np.int32)
    num_buckets = 0
    for band in range(num_bands):
        key = np.zeros(len(order), np.uint64)
        for column in range(band * width, (band + 1) * width):
            key = _hash(key ^ sketches[order, column], 0)
        _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        shared = counts > 1
        number = np.where(shared, np.cumsum(shared) - 1 + num_buckets, -1)
        table[:, band] = number[inverse]
        num_buckets += int(shared.sum())
    return table, num_buckets


# -- mixture and balance -------------------------------------------------------------------------------------------------


def _copies(rows: Rows, train: Indices, weights: list[float], balance: Balance | None, class_names: list[str]) -> Indices:
    """How often each training row stands in an epoch.

    Rows of one source and class are a cell; once its number of examples is known, each row has it / rows copies, and the rest goes
    to the rows with the smallest hash.
    """
    copies = np.zeros(len(train), np.int64)
    if not len(train):
        return copies
    cls = rows.cls[train] if balance is not None else np.full(len(train), -1, np.int32)
    codes, cell_of, sizes = np.unique(
        rows.source[train].astype(np.int64) * (len(class_names) + 1) + cls + 1, return_inverse=True, return_counts=True
    )
    cell_source, cell_class = codes // (len(class_names) + 1), codes % (len(class_names) + 1) - 1
    cell_weights = np.array([weights[source] for source in cell_source], np.float64)
    totals: NDArray[np.float64] = cell_weights * sizes
    counts = np.array([round(total) for total in totals], np.int64)
    if balance is not None:
        _refuse_unknown(balance, class_names, cell_class)
        caps = sizes * np.maximum(balance.max_repeat, np.ceil(cell_weights).astype(np.int64))
        members = {class_names[c]: cell_class == c for c in np.unique(cell_class) if c >= 0}
        shares = np.array([balance.weights.get(name, 1.0) for name in members])
        targets = _share(round(totals[cell_class >= 0].sum()), shares, np.array([caps[m].sum() for m in members.values()]))
        for target, m in zip(targets.tolist(), members.values(), strict=True):
            counts[m] = _share(target, totals[m], caps[m])

    order = np.lexsort((_hash(rows.digest[train], _MIXTURE_SEED), cell_of))  # cell by cell, smallest hash first
    each, extra = counts // sizes, counts % sizes
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(train)) - starts[cell_of[order]]
    copies[order] = each[cell_of[order]] + (place < extra[cell_of[order]])
    return copies


def _share(whole: int, weights: NDArray[np.float64], caps: Indices) -> Indices:
    """`whole` shared out in proportion to weights; what is above a cap goes to the others. Sums to `whole` where the caps allow."""
    whole = min(whole, int(caps.sum()))
    wanted = np.zeros(len(weights))
    free = np.ones(len(weights), bool)
    while free.any():
        wanted[free] = (whole - wanted[~free].sum()) * weights[free] / weights[free].sum()
        over = free & (wanted > caps)
        if not over.any():
            break
        wanted[over] = caps[over]
        free &= ~over
    counts = np.floor(wanted).astype(np.int64)
    largest = np.argsort(counts - wanted, kind="stable")  # remainders, largest first
    counts[largest[: whole - int(counts.sum())]] += 1
    return counts


def _refuse_unknown(balance: Balance, class_names: list[str], present: Indices) -> None:
    if not (present >= 0).any():
        raise SpecError(
            f"No training example has a column `{balance.by}` to balance by.",
            "Name a column of the data, or leave balance out.",
            "data.curate.balance.by",
        )
    for name in balance.weights:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, n=1)
            known = ", ".join(class_names[:10])
            raise SpecError(
                f"`balance.weights` names `{name}`, but no example's `{balance.by}` is that.",
                f"Did you mean `{near[0]}`?" if near else f"The data has: {known}.",
                "data.curate.balance.weights",
            )


def _tell_copies(choice: _Choice, rows: Rows, train: Indices, copies: Indices, step: str, class_names: list[str]) -> None:
    """What mixture and balance did: rows that stand several times, and rows that stand in no epoch."""
    for action, mine in (("repeat", train[copies[train] > 1]), ("thin", train[copies[train] == 0])):
        detail: dict[str, float] = {}
        if step == "balance":
            for c in np.unique(rows.cls[mine]).tolist():
                name = class_names[c] if c >= 0 else "no class"
                detail[name] = float((rows.cls[mine] == c).sum())
        choice.act(step, action, mine, [], detail)
