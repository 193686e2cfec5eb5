# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Paired tests: equal lists never differ, false alarms are as rare as promised, and values worked by hand."""

import numpy as np
import pytest

from recipes.evaluation.scoring.paired import (
    compare_scores,
    exact_mcnemar,
    holm,
    paired_bootstrap,
    permutation_test,
)


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def counted(scores: np.ndarray) -> np.ndarray:
    return np.stack([scores, np.ones_like(scores)], axis=1)


@pytest.mark.parametrize("scores", [[1.0] * 20, [0.0, 1.0] * 10, list(np.linspace(0, 1, 20)), [0.3]])
@pytest.mark.parametrize("paired", [False, True])
def test_a_list_does_not_differ_from_itself(scores: list[float], paired: bool) -> None:
    clusters = [index // 2 for index in range(len(scores))] if paired else None
    result = compare_scores(scores, scores, clusters)
    assert result.p_value == 1.0
    if len(scores) > 1:
        assert result.difference[:3] == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("lost", "won", "expected"), [(0, 0, 1.0), (1, 1, 1.0), (0, 5, 0.0625), (2, 10, 0.0385742), (12, 3, 0.0351562)]
)
def test_mcnemar_by_the_book(lost: int, won: int, expected: float) -> None:
    first = [1] * lost + [0] * won + [1, 0]
    second = [0] * lost + [1] * won + [1, 0]
    assert exact_mcnemar(first, second) == pytest.approx(expected, abs=1e-6)


def test_all_exchanges_are_tried_where_they_are_few() -> None:
    first, second = np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.4, 0.4])
    assert permutation_test(counted(first), counted(second), mean) == 2 / 8
    clusters = ["a", "a", "b"]
    assert permutation_test(counted(first), counted(second), mean, clusters) == 2 / 4


def test_exact_and_drawn_exchanges_agree() -> None:
    random = np.random.default_rng(0)
    first = random.random(12)
    second = first + random.normal(0.05, 0.1, 12)
    exact = permutation_test(counted(first), counted(second), mean, repeats=5000)
    drawn = permutation_test(counted(first), counted(second), mean, repeats=4000)
    assert 2**12 <= 5000 and drawn == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("size", [1, 5])
def test_false_alarms_are_rare(size: int) -> None:
    random = np.random.default_rng(0)
    members = np.repeat(np.arange(40), size)
    alarms = []
    for seed in range(300):
        level = random.random((2, 40))[:, members]
        scores = (random.random(level.shape) < level).astype(float)
        alarms.append(compare_scores(*scores, members.tolist(), seed=seed).p_value < 0.05)
    assert np.mean(alarms) < 0.08


def test_intervals_of_differences_cover_the_truth() -> None:
    random = np.random.default_rng(0)
    members = np.repeat(np.arange(40), 4)
    hits = 0
    for seed in range(500):
        level = random.normal(0, 0.2, 40)[members]
        first = level + random.normal(0, 0.2, 160)
        second = first + 0.1 + random.normal(0, 0.1, 40)[members] + random.normal(0, 0.1, 160)
        interval = paired_bootstrap(counted(first), counted(second), mean, members.tolist(), seed=seed)
        hits += interval.low <= 0.1 <= interval.high
    assert 0.93 <= hits / 500 <= 0.97


def test_a_clear_difference_is_seen() -> None:
    first, second = [0.0] * 30 + [1.0] * 70, [0.0] * 10 + [1.0] * 90
    result = compare_scores(first, second)
    assert result.test == "exact McNemar" and result.p_value < 1e-5
    assert result.difference.low > 0.1 and result.difference.value == pytest.approx(0.2)
    clustered = compare_scores(first, second, [index // 5 for index in range(100)])
    assert clustered.test == "sign flips by cluster" and clustered.p_value == 2 / 2**4  # four images changed


def test_holm_by_the_book() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": pytest.approx(0.06),
        "d": pytest.approx(0.02),
    }
    assert list(corrected) == ["a", "b", "c", "d"]
    assert holm({}) == {} and holm({"a": 1.0, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        compare_scores([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0"):
        exact_mcnemar([], [])
