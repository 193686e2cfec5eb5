# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Two models on the same samples: is the second better than the first, and by how much?

Differences are second minus first. p-values are two-sided; equal scores give 1.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recipes.evaluation.scoring.intervals import REPEATS, Interval, bootstrap_interval, cluster_sums, numbered

FLIPS = 10_000  # of a permutation test
_BLOCK = 4_000_000  # numbers drawn at a time
_ROUNDING = 1e-12  # sums in another order are not another difference
Figure = Callable[[np.ndarray], np.ndarray]  # (R, K) sums -> (R,) figures


class Comparison(NamedTuple):
    """The difference of two means with its interval, its p-value, and the test that gave it."""

    difference: Interval
    p_value: float
    test: str


def compare_scores(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare the means of two lists of scores of the same samples.

    The interval is of a paired clustered bootstrap. The test is McNemar's where scores are 0 and 1 and each sample is its
    own cluster, else the clusters' differences change their signs at random.

    Args:
        first, second: (N,) scores in the same order.
        clusters: the cluster of each sample, None if each is its own.

    Raises:
        ValueError: for no scores, unequal lengths or one that is not finite.
    """
    difference = paired_bootstrap(_counted(first), _counted(second), _mean, clusters, seed=seed)
    binary = np.isin(np.concatenate([first, second]), (0, 1)).all()
    if binary and difference.clusters == difference.count:
        return Comparison(difference, exact_mcnemar(first, second), "exact McNemar")
    p_value = permutation_test(_counted(first), _counted(second), _mean, clusters, seed=seed)
    return Comparison(difference, p_value, "sign flips by cluster")


def exact_mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the p-value of McNemar's exact test: how odd it is that so many of the samples that changed changed one way.

    Args:
        first, second: (N,) right (1) or wrong (0), of independent samples.
    """
    _same_length(first, second)
    lost = sum(one > other for one, other in zip(first, second, strict=True))
    won = sum(one < other for one, other in zip(first, second, strict=True))
    changed = lost + won
    logs = [
        math.lgamma(changed + 1) - math.lgamma(count + 1) - math.lgamma(changed - count + 1) - changed * math.log(2)
        for count in range(min(lost, won) + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(log) for log in logs))


def permutation_test(
    first: Any,
    second: Any,
    figure: Figure,
    clusters: Sequence[Hashable] | None = None,
    repeats: int = FLIPS,
    seed: int = 0,
) -> float:
    """Return the p-value of a difference of figures of whole sets, from exchanging the models within random clusters.

    All exchanges are tried where that is no more than `repeats`. Of a mean this is the sign-flip test.

    Args:
        first, second: (N, K) counts, see `bootstrap_interval`.
        figure: gives (R,) figures of (R, K) sums.
    """
    _same_length(first, second)
    members = numbered(clusters, len(first))
    sums = [
        cluster_sums(np.asarray(one, dtype=np.float64), members, int(members.max()) + 1) for one in (first, second)
    ]
    change = sums[1] - sums[0]
    totals = [one.sum(0) for one in sums]
    change = change[np.abs(change).max(1) > _ROUNDING]  # the others change nothing
    if not len(change):
        return 1.0
    seen = abs(float((figure(totals[1][None]) - figure(totals[0][None]))[0]))
    exact = 2 ** len(change) <= repeats
    extreme = number = 0
    for exchanged in _exchanges(len(change), repeats, seed, exact):
        moved = exchanged @ change
        differences = np.abs(figure(totals[1] - moved) - figure(totals[0] + moved))
        extreme += int((differences >= seen - _ROUNDING).sum())
        number += len(differences)
    return extreme / number if exact else (extreme + 1) / (number + 1)


def paired_bootstrap(
    first: Any,
    second: Any,
    figure: Figure,
    clusters: Sequence[Hashable] | None = None,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Interval:
    """Return the difference of two figures with its interval, from drawing the same clusters for both.

    Args:
        first, second: (N, K) counts, see `bootstrap_interval`.
        figure: gives (R,) figures of (R, K) sums.
    """
    _same_length(first, second)
    both = np.concatenate([np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)], axis=1)
    width = both.shape[1] // 2
    return bootstrap_interval(
        both, lambda sums: figure(sums[:, width:]) - figure(sums[:, :width]), clusters, repeats, seed
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected by Holm for how many there are: below 0.05 means significant among all of them."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}


def _counted(scores: Sequence[float]) -> np.ndarray:
    return np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def _same_length(first: Sequence[Any], second: Sequence[Any]) -> None:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"Compare the same samples of both models; got {len(first)} and {len(second)}.")


def _exchanges(number: int, repeats: int, seed: int, exact: bool) -> Any:
    """Yield (R, G) whether each cluster is exchanged, in blocks that fit the memory; every way once if `exact`."""
    if exact:
        yield (np.arange(2**number)[:, None] >> np.arange(number) & 1).astype(np.float64)
        return
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // number)
    for start in range(0, repeats, block):
        yield random.integers(2, size=(min(block, repeats - start), number)).astype(np.float64)
