# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Figures with intervals, as the benchmarks share them: shares, yes/no sets, groups that must be right as a whole."""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from recipes.evaluation.benchmark import Figure, Figures, Line
from recipes.evaluation.scoring.intervals import Interval, bootstrap_interval, mean_interval
from recipes.evaluation.scoring.pairs import all_right
from recipes.evaluation.scoring.yes_no import yes_no_counts

BOUNDS = (0.0, 1.0)
SAYING_YES = 2 / 3  # F1 of always saying yes, where half of the labels are yes


def figure_of(interval: Interval, chance: float | None = None) -> Figure:
    """Return an interval as a figure; ends that are not known are None."""
    low, high = (value if math.isfinite(value) else None for value in (interval.low, interval.high))
    return Figure(interval.value, low, high, chance, interval.count, interval.clusters)


def share_figure(scores: Sequence[float], clusters: Sequence[Hashable], chance: float | None = None) -> Figure:
    """Return the mean of scores from 0 to 1."""
    return figure_of(mean_interval(scores, clusters, BOUNDS), chance)


def line_shares(
    lines: Sequence[Line], chance: float | None, groups: Callable[[Line], str | None], prefix: str = ""
) -> Figures:
    """Return the mean score of the lines of each group, by name in alphabetical order; None leaves a line out."""
    members: dict[str, list[Line]] = {}
    for line in lines:
        if (name := groups(line)) is not None:
            members.setdefault(name, []).append(line)
    return {f"{prefix}{name}": mean_score(members[name], chance) for name in sorted(members)}


def mean_score(lines: Sequence[Line], chance: float | None = None) -> Figure:
    """Return the mean score of lines, clustered."""
    return share_figure([line["score"] for line in lines], [line["cluster"] for line in lines], chance)


def unparsed_share(lines: Sequence[Line]) -> Figure:
    """Return the share of answers of which nothing could be made; failed samples are among them."""
    return share_figure([line["parsed"] is None for line in lines], [line["cluster"] for line in lines])


def all_right_figure(lines: Sequence[Line], groups: Sequence[Hashable], chance: float | None = None) -> Figure:
    """Return the share of groups of which every line is right; clusters are the lines'."""
    right = all_right([line["score"] == 1 for line in lines], groups)
    cluster = {group: line["cluster"] for group, line in zip(groups, lines, strict=True)}
    return share_figure(list(right.values()), [cluster[group] for group in right], chance)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.zeros_like(over, dtype=float), where=under > 0)


# Of (R, 6) sums as `yes_no_counts` has them: label yes, prediction yes, both yes, both no, neither, 1.
_OF_SUMS: dict[str, tuple[float | None, Callable[[np.ndarray], np.ndarray]]] = {
    "accuracy": (0.5, lambda sums: _ratio(sums[:, 2] + sums[:, 3], sums[:, 5])),
    "precision": (0.5, lambda sums: _ratio(sums[:, 2], sums[:, 1])),
    "recall": (0.5, lambda sums: _ratio(sums[:, 2], sums[:, 0])),
    "f1": (SAYING_YES, lambda sums: _ratio(2 * sums[:, 2], sums[:, 0] + sums[:, 1])),
    "yes_ratio": (None, lambda sums: _ratio(sums[:, 1], sums[:, 5])),
    "unparsed": (None, lambda sums: _ratio(sums[:, 4], sums[:, 5])),
    "accuracy_yes": (0.5, lambda sums: _ratio(sums[:, 2], sums[:, 0])),
    "accuracy_no": (0.5, lambda sums: _ratio(sums[:, 3], sums[:, 5] - sums[:, 0])),
}
_MEANS = ("accuracy", "yes_ratio", "unparsed")  # of numbers of 0 and 1, which have a closed interval


def yes_no_group(
    prefix: str, lines: Sequence[Line], predictions: Sequence[str | None] | None = None, only: Sequence[str] = ()
) -> Figures:
    """Return the figures of a yes/no set: accuracy, precision, recall and F1 of yes, ratio of yes among the predictions,
    unparsed, and accuracy per label.

    Args:
        prefix: of the figures' names.
        predictions: instead of the lines' own.
        only: names of figures, all by default.
    """
    given = [line["parsed"] for line in lines] if predictions is None else list(predictions)
    labels = [line["truth"] or "yes" for line in lines]  # a row without a label counts as a yes that nobody said
    counts = np.asarray(yes_no_counts(given, labels), dtype=float)
    clusters = [line["cluster"] for line in lines]
    figures = {}
    for name, (chance, of_sums) in _OF_SUMS.items():
        if (only and name not in only) or (name == "accuracy_no" and not (counts[:, 0] == 0).any()):
            continue
        if name == "accuracy_yes" and not counts[:, 0].any():
            continue
        if name in _MEANS:
            column = {"accuracy": counts[:, 2] + counts[:, 3], "yes_ratio": counts[:, 1], "unparsed": counts[:, 4]}
            interval = mean_interval(column[name].tolist(), clusters, BOUNDS)
        else:
            interval = bootstrap_interval(counts, of_sums, clusters)
        figures[f"{prefix}{name}"] = figure_of(interval, chance)
    return figures


def f1_over_groups(lines: Sequence[Line]) -> Figure:
    """Return the mean of the F1 of each group of lines, as POPE is often reported."""
    groups = sorted({line["group"] for line in lines})
    counts = yes_no_counts([line["parsed"] for line in lines], [line["truth"] or "yes" for line in lines])
    wide = np.zeros((len(lines), 6 * len(groups)))
    for row, line, count in zip(wide, lines, counts, strict=True):
        place = 6 * groups.index(line["group"])
        row[place : place + 6] = count

    def figure(sums: np.ndarray) -> np.ndarray:
        f1 = _OF_SUMS["f1"][1]
        return np.mean([f1(sums[:, 6 * number : 6 * number + 6]) for number in range(len(groups))], axis=0)

    return figure_of(bootstrap_interval(wide, figure, [line["cluster"] for line in lines]), SAYING_YES)
