# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""95 % intervals of figures, clustered by whatever samples share: an image, a pair.

Where the spread is estimated, quantiles are Student's with one degree of freedom fewer than clusters, so that few
clusters give honest intervals.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
REPEATS = 1000  # of a bootstrap
_BLOCK = 4_000_000  # numbers drawn at a time


class Interval(NamedTuple):
    """A figure with its 95 % interval, and how many samples in how many clusters it stands on."""

    value: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks for
    clusters: int


def mean_interval(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Return the mean of scores with its interval.

    Scores that are all 0 or 1, of no other `bounds`, get Wilson's interval: the usual one where each sample is its own cluster, else with
    Student's quantile and as many independent samples as the spread between clusters is worth. Others get the mean ±
    Student's quantile times the clustered standard error.

    Args:
        scores: (N,), one per sample.
        clusters: the cluster of each sample, None if each is its own.
        bounds: the lowest and highest possible score, where the interval is cut.

    Returns:
        With a single cluster the spread is unknown: 0..1 for scores of 0 and 1, else `bounds`, else -inf..inf.

    Raises:
        ValueError: for no scores, one that is not finite, or unequal lengths.
    """
    values, members = _checked(scores, clusters)
    number = int(members.max()) + 1
    mean = float(values.mean())
    binary = bounds in (None, (0, 1)) and bool(np.isin(values, (0.0, 1.0)).all())
    low, high = (0.0, 1.0) if binary else (-math.inf, math.inf)
    if number > 1:
        variance = _clustered_variance(values, members, number)
        quantile = student_quantile(0.5 + LEVEL / 2, number - 1)
        if binary and number == len(values):
            low, high = _wilson(mean, number, NormalDist().inv_cdf(0.5 + LEVEL / 2))
        elif binary:
            low, high = _wilson(mean, _worth(mean, variance, len(values), number), quantile)
        else:
            low, high = mean - quantile * math.sqrt(variance), mean + quantile * math.sqrt(variance)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(mean, low, high, len(values), number)


def bootstrap_interval(
    counts: Any,
    figure: Callable[[np.ndarray], np.ndarray],
    clusters: Sequence[Hashable] | None = None,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Interval:
    """Return a figure of a whole set, such as F1 or BLEU, with its interval from drawing clusters with replacement.

    Percentiles, widened so that they are as wide as Student's for few clusters.

    Args:
        counts: (N, K), what each sample adds to the sums that the figure is made of.
        figure: gives (R,) figures of (R, K) sums.
        clusters, seed: as elsewhere; the same seed draws the same samples.
        repeats: how often to draw.

    Raises:
        ValueError: as `mean_interval`, and for a figure that is not finite.
    """
    values, members = _checked(counts, clusters)
    number = int(members.max()) + 1
    per_cluster = cluster_sums(values, members, number)
    value = float(figure(per_cluster.sum(0, keepdims=True))[0])
    if number == 1:
        return Interval(value, -math.inf, math.inf, len(values), number)
    drawn = np.concatenate([figure(weights @ per_cluster) for weights in _draws(number, repeats, seed)])
    if not (math.isfinite(value) and np.isfinite(drawn).all()):
        raise ValueError(
            "The figure is not finite for some of the drawn samples: let it give a number where it divides by 0."
        )
    tail = NormalDist().cdf(-math.sqrt(number / (number - 1)) * student_quantile(0.5 + LEVEL / 2, number - 1))
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Interval(value, float(low), float(high), len(values), number)


def cluster_sums(values: np.ndarray, members: np.ndarray, number: int) -> np.ndarray:
    """Return (G, ...) sums of (N, ...) values over the clusters that `members` (N,) counts from 0."""
    sums = np.zeros((number, *values.shape[1:]))
    np.add.at(sums, members, values)
    return sums


def numbered(clusters: Sequence[Hashable] | None, count: int) -> np.ndarray:
    """Return the clusters of `count` samples as numbers from 0, in order of appearance; each its own for None.

    Raises:
        ValueError: if there are not as many.
    """
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise ValueError(f"There are {count} samples and clusters for {len(clusters)}: give one per sample.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's distribution, by bisection of its integral.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), smooth on a finite range.

    Args:
        probability: between 0.5 and 1.
        freedom: degrees of freedom, 1 or more.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    widest = min(math.pi / 2, 12 / math.sqrt(freedom))  # beyond it there is nothing to sum

    def integral(angle: float) -> float:
        angles = angle * (nodes + 1) / 2
        return float(weights @ np.cos(angles) ** (freedom - 1)) * angle / 2

    aim = 2 * (probability - 0.5) * integral(widest)
    low, high = 0.0, widest
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) < aim else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _checked(scores: Any, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise ValueError("There are no scores to take an interval of.")
    if not np.isfinite(values).all():
        raise ValueError("A score is not a finite number: give failed samples the score of a wrong answer.")
    return values, numbered(clusters, len(values))


def _clustered_variance(values: np.ndarray, members: np.ndarray, number: int) -> float:
    """Of the mean: squares of the clusters' summed residuals, with the correction for few clusters."""
    residuals = cluster_sums(values - values.mean(), members, number)
    return float(residuals @ residuals) / len(values) ** 2 * number / (number - 1)


def _worth(mean: float, variance: float, count: int, number: int) -> float:
    """How many independent samples have the spread that was seen; the clusters, where all answers are the same."""
    independent = mean * (1 - mean)
    if not 0 < mean < 1:
        return number
    return count if variance == 0 else independent / variance


def _wilson(mean: float, count: float, quantile: float) -> tuple[float, float]:
    square = quantile * quantile / count
    middle = (mean + square / 2) / (1 + square)
    half = quantile / (1 + square) * math.sqrt(mean * (1 - mean) / count + square / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _draws(number: int, repeats: int, seed: int) -> Iterator[np.ndarray]:
    """Yield (R, G) how often each cluster is drawn, in blocks that fit the memory."""
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // number)
    for start in range(0, repeats, block):
        size = min(block, repeats - start)
        chosen = random.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
        yield np.bincount(chosen.ravel(), minlength=size * number).reshape(size, number).astype(np.float64)
