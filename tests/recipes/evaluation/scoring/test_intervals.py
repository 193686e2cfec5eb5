# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Intervals cover what they promise on simulated data, clustered and not."""

import math

import numpy as np
import pytest

from recipes.evaluation.scoring.intervals import bootstrap_interval, mean_interval, student_quantile

SIMULATED = 500


def simulated_answers(
    random: np.random.Generator, clusters: int, size: int, correlation: float, mean: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) right answers (0 or 1) and their clusters, with a known mean and correlation within clusters."""
    shares = np.full(clusters, mean)
    if correlation:
        scale = (1 - correlation) / correlation
        shares = random.beta(mean * scale, (1 - mean) * scale, clusters)
    members = np.repeat(np.arange(clusters), size)
    return (random.random(len(members)) < shares[members]).astype(float), members


@pytest.mark.parametrize(
    ("clusters", "size", "correlation", "mean"),
    [
        (150, 1, 0.0, 0.6),
        (150, 1, 0.0, 0.2),
        (40, 6, 0.0, 0.5),
        (40, 6, 0.4, 0.7),
        (150, 2, 0.5, 0.8),
        (20, 5, 0.2, 0.6),
    ],
)
def test_intervals_of_shares_cover_the_truth(clusters: int, size: int, correlation: float, mean: float) -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(SIMULATED):
        right, members = simulated_answers(random, clusters, size, correlation, mean)
        interval = mean_interval(right, members.tolist())
        hits += interval.low <= mean <= interval.high
    assert 0.93 <= hits / SIMULATED <= 0.97


@pytest.mark.parametrize(("clusters", "size", "shared"), [(60, 1, 0.0), (40, 4, 0.5), (12, 5, 0.5)])
def test_intervals_of_graded_scores_cover_the_truth(clusters: int, size: int, shared: float) -> None:
    random = np.random.default_rng(0)
    members = np.repeat(np.arange(clusters), size)
    hits = 0
    for _ in range(SIMULATED):
        scores = shared * random.beta(2, 1, clusters)[members] + (1 - shared) * random.beta(2, 1, len(members))
        interval = mean_interval(scores, members.tolist())
        hits += interval.low <= 2 / 3 <= interval.high
    assert 0.93 <= hits / SIMULATED <= 0.97


@pytest.mark.parametrize(("clusters", "size", "correlation"), [(60, 1, 0.0), (40, 4, 0.3)])
def test_bootstrap_of_f1_covers_the_truth(clusters: int, size: int, correlation: float) -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(SIMULATED):
        right, members = simulated_answers(random, clusters, size, correlation, 0.7)
        label = random.random(len(right)) < 0.5
        given = label == (right == 1)
        counts = np.stack([label, given, label & given], axis=1)
        interval = bootstrap_interval(
            counts, lambda sums: 2 * sums[:, 2] / (sums[:, 0] + sums[:, 1]), members.tolist()
        )
        hits += interval.low <= 0.7 <= interval.high
    assert 0.93 <= hits / SIMULATED <= 0.97


def test_intervals_that_ignore_clusters_do_not_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(SIMULATED):
        right, _ = simulated_answers(random, 40, 6, 0.4, 0.7)
        interval = mean_interval(right)
        hits += interval.low <= 0.7 <= interval.high
    assert hits / SIMULATED < 0.85


def test_wilson_by_the_book() -> None:
    interval = mean_interval([1.0] * 8 + [0.0] * 2)
    assert interval.low == pytest.approx(0.49016, abs=1e-5) and interval.high == pytest.approx(0.94331, abs=1e-5)
    assert (interval.value, interval.count, interval.clusters) == (0.8, 10, 10)
    assert mean_interval([1.0] * 10).low == pytest.approx(0.72247, abs=1e-5)
    assert mean_interval([1.0] * 10).high == 1.0


def test_graded_by_the_book() -> None:
    interval = mean_interval([0.3, 0.6, 0.9])
    half = 4.302653 * math.sqrt(0.09 / 3)
    assert interval.high - interval.value == pytest.approx(half, abs=1e-6)
    assert mean_interval([0.3, 0.6, 0.9], bounds=(0.0, 1.0)).high == 1.0


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062047), (2, 4.3026527), (9, 2.2621572), (99, 1.9842170), (10**6, 1.9599664)]
)
def test_students_quantiles(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-6)


def test_the_same_answers_in_fewer_clusters_are_worth_less() -> None:
    right = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    alone, paired = mean_interval(right), mean_interval(right, list("aabbccdd"))
    assert paired.high - paired.low > alone.high - alone.low
    assert (paired.count, paired.clusters) == (8, 4)
    assert mean_interval([1.0] * 8, list("aabbccdd")).low < mean_interval([1.0] * 8).low


def test_one_cluster_says_nothing() -> None:
    assert mean_interval([1.0, 0.0, 1.0], ["a"] * 3)[1:3] == (0.0, 1.0)
    assert mean_interval([0.5, 0.3], ["a"] * 2)[1:3] == (-math.inf, math.inf)
    assert mean_interval([0.5, 0.3], ["a"] * 2, bounds=(0.0, 1.0))[1:3] == (0.0, 1.0)


def test_a_constant_answer_to_balanced_pairs_still_has_an_interval() -> None:
    interval = mean_interval([1.0, 0.0] * 50, [index // 2 for index in range(100)])
    assert interval.value == 0.5 and interval.low < 0.42 and interval.high > 0.58


def test_the_bootstrap_gives_the_same_interval_again() -> None:
    counts = np.random.default_rng(0).random((50, 2))
    intervals = [bootstrap_interval(counts, lambda sums: sums[:, 0] / sums[:, 1], seed=3) for _ in range(2)]
    assert intervals[0] == intervals[1]
    assert intervals[0].low < intervals[0].value < intervals[0].high


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mean_interval([])
    with pytest.raises(ValueError, match="not a finite number"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="2 samples and clusters for 1"):
        mean_interval([1.0, 0.0], ["a"])
    with np.errstate(invalid="ignore", divide="ignore"), pytest.raises(ValueError, match="figure is not finite"):
        bootstrap_interval([[1, 0], [0, 1]], lambda sums: sums[:, 0] / sums[:, 1])
