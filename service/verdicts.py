"""What a study's ratings say: wins with intervals, grades, agreement, slices; and preference pairs for further training. Pure.

Raters of one item are no independent evidence about the models, so shares and intervals count items: an item is won by the model that
most of its raters prefer, and nobody wins where no choice is ahead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from service import agreement
from service.studies import SCALES, Rater, Rating, Study, StudyItem, is_cut

Json = dict[str, Any]


def results(study: Study, items: Sequence[StudyItem], raters: Sequence[Rater], ratings: Sequence[Rating]) -> Json:
    """All that a study says so far, as the wire has it."""
    names = {rater.id: rater.name for rater in raters}
    groups = {name: {item.seq for item in items if item.slice == name} for name in sorted({item.slice for item in items if item.slice})}
    tell = _comparison if study.kind == "pairwise" else _grades
    told = {
        "object": "tuneyard.study.results",
        "study": study.id,
        "kind": study.kind,
        "models": study.models,
        "ratings": len(ratings),
        "raters": dict(Counter(names[rating.rater_id] for rating in ratings)),
        **tell(study, ratings),
        "agreement": _agreement(study, ratings),
        "slices": {name: tell(study, [rating for rating in ratings if rating.item in members]) for name, members in groups.items()},
    }
    if study.kind == "pairwise":
        decided = [rating for rating in ratings if rating.value["choice"] in ("0", "1")]
        left = sum(int(rating.value["choice"]) == rating.left for rating in decided)
        told["left_chosen"] = _share(left, len(decided))  # far from a half: raters go by the side
    return told


def _comparison(study: Study, ratings: Sequence[Rating]) -> Json:
    won = Counter(_winner(choices) for choices in _choices(ratings).values())
    wins = {model: won[str(place)] for place, model in enumerate(study.models)}
    return {
        "items": won.total(),
        "wins": wins,
        "ties": won["tie"],
        "both_bad": won["both_bad"],
        "win_rate": {
            model: _share(count, sum(wins.values())) for model, count in wins.items()
        },  # among items that somebody won
    }  # fmt: skip


def _choices(ratings: Iterable[Rating]) -> dict[int, list[str]]:
    """Item -> what its raters chose."""
    found: dict[int, list[str]] = defaultdict(list)
    for rating in ratings:
        found[rating.item].append(rating.value["choice"])
    return found


def _winner(choices: Sequence[str]) -> str:
    """What an item's raters say together: the model that more of them chose than chose the other one, or chose neither."""
    counts = Counter(choices)
    neither = counts["tie"] + counts["both_bad"]
    for mine, other in (("0", "1"), ("1", "0")):
        if counts[mine] > max(counts[other], neither):
            return mine
    return "both_bad" if counts["both_bad"] > counts["tie"] else "tie"


def _grades(study: Study, ratings: Sequence[Rating]) -> Json:
    """Per model and scale: mean of the items' mean grades, and how often each grade was given; and the difference of two models."""
    models: Json = {}
    means: dict[tuple[int, str], dict[int, float]] = {}
    for place, model in enumerate(study.models):
        mine = [rating for rating in ratings if rating.model == place]
        models[model] = {}
        for scale in SCALES:
            values = means[place, scale] = _item_means(mine, lambda value, scale=scale: value[scale])
            given = Counter(rating.value[scale] for rating in mine)
            models[model][scale] = {**_mean(list(values.values())), "grades": {str(grade): given[grade] for grade in range(1, 6)}}
    told: Json = {"items": len({rating.item for rating in ratings}), "grades": models}
    if len(study.models) == 2:
        told["difference"] = {
            scale: _mean([value - means[1, scale][item] for item, value in means[0, scale].items() if item in means[1, scale]])
            for scale in SCALES
        }  # first model minus second, over items of which both were graded
    return told


def _item_means(ratings: Iterable[Rating], grade: Callable[[Json], float]) -> dict[int, float]:
    given: dict[int, list[float]] = defaultdict(list)
    for rating in ratings:
        given[rating.item].append(grade(rating.value))
    return {item: sum(grades) / len(grades) for item, grades in given.items()}


def _agreement(study: Study, ratings: Sequence[Rating]) -> Json | None:
    """None where fewer than two people rated."""
    if len({rating.rater_id for rating in ratings}) < 2:
        return None
    if study.kind == "pairwise":
        return agreement.of_choices(_by_rater(ratings, lambda value: value["choice"]))
    return {scale: agreement.of_grades(_by_rater(ratings, lambda value, scale=scale: value[scale])) for scale in SCALES}


def _by_rater(ratings: Iterable[Rating], category: Callable[[Json], Any]) -> Mapping[str, Mapping[tuple[int, int], Any]]:
    found: dict[str, dict[tuple[int, int], Any]] = defaultdict(dict)
    for rating in ratings:
        found[rating.rater_id][rating.item, rating.model] = category(rating.value)
    return found


def _share(count: int, total: int) -> Json:
    from serve.stats import wilson  # here: scipy, which it needs, takes a second to load

    low, high = wilson(count, total) if total else (None, None)
    return {"value": count / total if total else None, "low": low, "high": high, "of": total}


def _mean(values: list[float]) -> Json:
    from serve.stats import bootstrap_mean

    low, high = bootstrap_mean(values) if len(values) > 1 else (None, None)
    return {"mean": sum(values) / len(values) if values else None, "low": low, "high": high, "items": len(values)}


# -- export --------------------------------------------------------------------------------------------------------------


def preferences(study: Study, items: Sequence[StudyItem], ratings: Sequence[Rating]) -> Iterator[Json]:
    """One line per item with a winner, in the format of OpenAI's DPO data: what the raters prefer, and the other answer. In a Likert study
    the answer with the higher mean over all grades wins. An answer that was cut off is no example to follow, whoever preferred it."""
    if study.kind == "pairwise":
        winners = {item: _winner(choices) for item, choices in _choices(ratings).items()}
    else:
        means = [_item_means((r for r in ratings if r.model == place), lambda value: sum(value.values())) for place in range(2)]
        winners = {i: "0" if value > means[1][i] else "1" for i, value in means[0].items() if means[1].get(i, value) != value}
    for item in items:
        if (winner := winners.get(item.seq)) in ("0", "1") and not is_cut(item.answers[int(winner)]):
            best, worst = (_said(item.answers[place]) for place in (int(winner), 1 - int(winner)))
            tools = {"tools": item.tools, "parallel_tool_calls": True} if item.tools else {}
            yield {"input": {"messages": item.messages, **tools}, "preferred_output": [best], "non_preferred_output": [worst]}


def lines(study: Study, items: Sequence[StudyItem], raters: Sequence[Rater], ratings: Sequence[Rating]) -> Iterator[Json]:
    """One line per rating, as it was given: who, what, on which side it stood, and when; and whose answers to it were cut off."""
    names = {rater.id: rater.name for rater in raters}
    by_seq = {item.seq: item for item in items}
    for rating in ratings:
        item = by_seq[rating.item]
        cut = [model for model, answer in zip(study.models, item.answers, strict=True) if is_cut(answer)]
        line = {"rater": names[rating.rater_id], "item": item.source, "slice": item.slice, "rated_at": rating.rated_at, "cut": cut}
        if study.kind == "pairwise":
            choice = rating.value["choice"]
            line |= {"choice": study.models[int(choice)] if choice in ("0", "1") else choice, "left": study.models[rating.left]}
        else:
            line |= {"model": study.models[rating.model], **rating.value}
        yield line


def _said(answer: Json | None) -> Json:
    return {key: value for key, value in (answer or {}).items() if key != "finish_reason"}
