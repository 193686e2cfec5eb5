# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Figures over seeds: means, intervals, differences between arms over the same images and questions, and what they say.

A difference has two kinds of doubt. Its 95 % interval is over seeds (each seed a cluster; over images where there is one
seed), its p-value over the images of these seeds (McNemar's exact test, or signs of images at random), by Holm corrected
for all measures of a grade.
"""

import json
from collections.abc import Sequence
from typing import Any

from recipes.evaluation.scoring.intervals import Interval, mean_interval
from recipes.evaluation.scoring.paired import compare_scores, holm
from recipes.study.probes import CAPTIONED, OMITTED
from recipes.study.settings import EvidenceArguments

Results = dict[str, dict[int, dict[str, Any]]]  # by arm and seed
NEVER_LABELLED = ("background", "texture")  # those of the higher grades: they have no right answer there
OPEN_OMITTED = ("color", "orientation", "size", "position", "background")
# Measures that join others, item by item.
GROUPS = {
    "probes of what captions omit": tuple(f"probe {one}" for one in OMITTED),
    "probes labelled at every grade": tuple(f"probe {one}" for one in OMITTED if one not in NEVER_LABELLED),
    "probes of what captions say": tuple(f"probe {one}" for one in CAPTIONED),
    "open questions on what captions omit": tuple(f"open {one}" for one in OPEN_OMITTED),
    "open questions on what captions say": ("open kind", "open count"),
    "pope, all three sets": ("pope random", "pope popular", "pope adversarial"),
}
SINGLE = ("robustvqa yes/no", "robustvqa choice", "mmvp pairs")
PAIRS = (
    ("consistency", "text"),
    ("consistency", "exchanged"),
    ("exchanged", "text"),
    ("pixels", "text"),
    ("align", "text"),
    ("contrastive", "text"),
    ("anchor", "text"),
    ("consistency", "pixels"),
    ("consistency", "anchor"),
    ("leak", "consistency"),
    ("confounded_b", "confounded_a"),
    ("confounded_b", "consistency"),
)
TESTED_GRADES = ("0", "2")  # where differences are tested
# What was hoped for: measure, grade, least gain over text alone.
HOPES = (
    ("probes of what captions omit", "0", 0.25),
    ("probes of what captions omit", "2", 0.05),
    ("open questions on what captions omit", "0", 0.25),
    ("open questions on what captions omit", "2", 0.05),
    ("pope, all three sets", "0", 0.05),
    ("robustvqa choice", "2", 0.05),
    ("mmvp pairs", "0", 0.05),
)


def read_results(arguments: EvidenceArguments) -> Results:
    """Return the results that are there."""
    found: Results = {}
    for arm in arguments.arms:
        for seed in arguments.seeds:
            file = arguments.folder(seed, arm) / "result.json"
            if file.is_file():
                found.setdefault(arm, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    return found


def measures_of(results: Results) -> dict[str, tuple[str, ...]]:
    """Return the measures of a table in their order, each with those that it joins (itself for a single one)."""
    known = {name for seeds in results.values() for one in seeds.values() for name in one["scores"]}
    ordered: dict[str, tuple[str, ...]] = {}
    for group, members in GROUPS.items():
        if there := tuple(one for one in members if one in known):
            ordered[group] = there
            ordered |= {one: (one,) for one in there}
    return ordered | {one: (one,) for one in SINGLE if one in known}


def items_of(result: dict[str, Any], members: Sequence[str], grade: str) -> tuple[list[float], list[str]]:
    """Return the scores of measures at a grade, one behind the other, and the unit of each (an image, an item, a pair)."""
    found = [result["scores"][one].get(grade) for one in members if one in result["scores"]]
    kept = [one for one in found if one]
    return [score for one in kept for score in one["scores"]], [unit for one in kept for unit in one["units"]]


def joined(results: Results, arm: str, seeds: Sequence[int], members: Sequence[str], grade: str) -> tuple[list, list]:
    """Return the scores of an arm over seeds, and the (seed, unit) of each."""
    scores: list[float] = []
    units: list[tuple[int, str]] = []
    for seed in seeds:
        own, names = items_of(results[arm][seed], members, grade)
        scores += own
        units += [(seed, name) for name in names]
    return scores, units


def clusters(units: Sequence[tuple[int, str]]) -> list[Any]:
    """Return what an interval is clustered by: seeds, or units where there is one seed."""
    seeds = [seed for seed, _ in units]
    return seeds if len(set(seeds)) > 1 else list(units)


def _as_row(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "count": interval.count}


def difference(
    results: Results, first: str, second: str, members: Sequence[str], grade: str, tested: bool
) -> dict[str, Any] | None:
    """Return how much `first` is above `second` over the same items of the seeds that both have; None without any."""
    both = set(results.get(first, {})) & set(results.get(second, {}))
    seeds = [s for s in sorted(both) if all(items_of(results[arm][s], members, grade)[1] for arm in (first, second))]
    if not seeds:
        return None
    better, units = joined(results, first, seeds, members, grade)
    worse, same = joined(results, second, seeds, members, grade)
    if units != same:
        raise ValueError(f"{first} and {second} were asked different things about {members}: remove their results.")
    gained = [one - other for one, other in zip(better, worse, strict=True)]
    row = _as_row(mean_interval(gained, clusters(units), bounds=(-1, 1)))
    row["seeds"] = {
        seed: _mean([gain for gain, (of, _) in zip(gained, units, strict=True) if of == seed]) for seed in seeds
    }
    if tested:
        row["p_value"] = compare_scores(worse, better, units).p_value
    return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summarize(arguments: EvidenceArguments, results: Results) -> dict[str, Any]:
    """Return all figures, in JSON's types: `table[grade][measure]` has `arms` and `differences`."""
    members_of = measures_of(results)
    table = {str(grade): table_of(results, members_of, str(grade)) for grade in arguments.grades}
    return {
        "settings": arguments.fixed(),
        "seeds": arguments.seeds,
        "arms": list(results),
        "table": table,
        "cost": {arm: cost_of(list(seeds.values())) for arm, seeds in results.items()},
        "redrawing": {arm: {s: one["redrawing_loss"] for s, one in seeds.items()} for arm, seeds in results.items()},
    }


def table_of(results: Results, members_of: dict[str, tuple[str, ...]], grade: str) -> dict[str, Any]:
    """Return, for each measure that has scores at a grade, what each `arm` has and the `differences` of pairs of arms."""
    pairs, tested = [pair for pair in PAIRS if set(pair) <= set(results)], grade in TESTED_GRADES
    rows: dict[str, Any] = {}
    for measure, members in members_of.items():
        arms = {arm: _of_arm(results, arm, members, grade) for arm in results}
        if any(arms.values()):
            gains = {f"{a} - {b}": difference(results, a, b, members, grade, tested) for a, b in pairs}
            rows[measure] = {"arms": arms, "differences": {name: gain for name, gain in gains.items() if gain}}
    for name in {name for row in rows.values() for name in row["differences"]} if tested else ():
        tests = {m: row["differences"][name]["p_value"] for m, row in rows.items() if name in row["differences"]}
        for measure, corrected in holm(tests).items():
            rows[measure]["differences"][name]["corrected"] = corrected
    return rows


def _of_arm(results: Results, arm: str, members: Sequence[str], grade: str) -> dict[str, Any] | None:
    seeds = sorted(results[arm])
    scores, units = joined(results, arm, seeds, members, grade)
    if not scores:
        return None
    row = _as_row(mean_interval(scores, clusters(units), bounds=(0, 1)))
    own = {seed: items_of(results[arm][seed], members, grade)[0] for seed in seeds}
    return row | {"seeds": {seed: _mean(scores) for seed, scores in own.items() if scores}}


def cost_of(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return mean CPU seconds (of one thread) of each piece of an arm's work, and the most memory in training, in megabytes."""
    names = {name: 0 for one in results for name in one["seconds"]}
    known = {name: [one["seconds"][name] for one in results if name in one["seconds"]] for name in names}
    seconds = {f"{name} s": _mean(values) for name, values in known.items()}
    return seconds | {"peak MB": max(one["peak_megabytes"] for one in results)}


def said_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what holds and what does not, as (verdict, sentence) by the intervals alone."""
    told = []
    for measure, grade, hoped in HOPES:
        row = summary["table"].get(grade, {}).get(measure)
        gain = row and row["differences"].get("consistency - text")
        if gain:
            told.append(_judged(measure, grade, hoped, gain, row["differences"].get("consistency - exchanged")))
    for measure in ("probe kind", "open kind"):
        row = summary["table"].get("0", {}).get(measure)
        if gain := row and row["differences"].get("consistency - text"):
            kept = gain["low"] > -0.01
            verdict = "holds" if kept else "open" if gain["high"] > -0.01 else "does not hold"
            told.append((verdict, f"{measure}, which captions say, stays within 1 point: {points(gain)}."))
    return told


def _judged(
    measure: str, grade: str, hoped: float, gain: dict[str, Any], own: dict[str, Any] | None
) -> tuple[str, str]:
    text = f"{measure}, grade {grade}: feedback less text alone {points(gain)} (hoped for: {100 * hoped:+.0f})"
    if gain["low"] == gain["high"] == 0:
        return (
            "open",
            f"{text}. Every single answer is worth the same in both: look whether anything was learned at all.",
        )
    if own is None:
        return ("open", f"{text}; without the control nothing is known of whose gain it is.")
    text += f"; less exchanged targets {points(own)}"
    if gain["low"] <= 0:
        return ("open" if gain["high"] > 0 else "does not hold", f"{text}. No gain is shown.")
    if own["low"] <= 0:
        return ("open", f"{text}. There is a gain, but that it is the feedback's own is not shown.")
    if gain["value"] < hoped:
        return ("holds in part", f"{text}. The gain is the feedback's own, and smaller than hoped for.")
    return ("holds", f"{text}. The gain is the feedback's own.")


def points(row: dict[str, Any]) -> str:
    """Return a difference with its interval, in points of a hundred."""
    return f"{100 * row['value']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
