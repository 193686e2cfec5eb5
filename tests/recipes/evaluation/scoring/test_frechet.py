# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Distances of sets of features against given values, closed forms and plain double loops."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from recipes.evaluation.scoring.frechet import (
    clip_scores,
    cmmd,
    frechet_distance,
    frechet_of_moments,
    kid,
    precision_recall,
    similarities,
)


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(60, 4)), random.normal(0.5, 1.2, size=(50, 4))


def test_frechet_equals_the_given_values(shared_file: Callable[[str], Any]) -> None:
    given = shared_file("vectors/frechet.json")
    for case in given["cases"]:
        distance = frechet_distance(case["features_real"], case["features_fake"])
        assert distance == pytest.approx(case["expected"], abs=1e-4), case["name"]
    for case in given["closed_form"]:
        distance = frechet_of_moments(case["mu1"], case["sigma1"], case["mu2"], case["sigma2"])
        assert distance == pytest.approx(case["expected"], abs=1e-4)


def test_frechet_of_two_normal_distributions_by_hand() -> None:
    assert frechet_of_moments([0], [[4]], [2], [[9]]) == pytest.approx(2**2 + (2 - 3) ** 2)


def test_frechet_of_few_images_is_real_and_warned_of() -> None:
    features = np.random.default_rng(0).normal(size=(6, 32))
    with pytest.warns(UserWarning, match="too few for 32 features"):
        distance = frechet_distance(features[:3], features[3:])
    assert np.isfinite(distance) and distance > 0
    moments = [(part.mean(0), np.cov(part, rowvar=False)) for part in (features[:3], features[3:])]
    assert distance == pytest.approx(frechet_of_moments(*moments[0], *moments[1]), rel=1e-6)
    with pytest.warns(UserWarning, match="too few"):
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_kid_of_all_images_equals_the_sums(sets: tuple[np.ndarray, np.ndarray]) -> None:
    real, fake = sets[0][:50], sets[1]

    def kernel(one: np.ndarray, other: np.ndarray) -> float:
        return float((one @ other / 4 + 1) ** 3)

    own = sum(
        kernel(one[i], one[j]) / (50 * 49) for one in (real, fake) for i in range(50) for j in range(50) if i != j
    )
    across = sum(kernel(one, other) for one in real for other in fake) / 50**2
    result = kid(real, fake, subsets=3)
    assert result.value == pytest.approx(own - 2 * across) and result.spread == pytest.approx(0, abs=1e-12)


def test_kid_has_no_bias_and_a_spread(sets: tuple[np.ndarray, np.ndarray]) -> None:
    random = np.random.default_rng(1)
    same = kid(random.normal(size=(400, 4)), random.normal(size=(400, 4)), size=100)
    other = kid(*sets, size=30)
    assert abs(same.value) < same.spread < other.value
    assert other == kid(*sets, size=30) and other.subsets == 100


def test_cmmd_equals_the_sums(sets: tuple[np.ndarray, np.ndarray]) -> None:
    real, fake = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in sets)

    def mean(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((a - b) @ (a - b)) / 200) for a in one] for b in other]))

    expected = 1000 * (mean(real, real) + mean(fake, fake) - 2 * mean(real, fake))
    assert cmmd(*sets) == pytest.approx(expected, abs=1e-9)
    assert cmmd(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_hand() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    fake = np.array([[0.5], [0.6], [0.7], [9.0]])
    figures = precision_recall(real, fake, neighbors=1)
    # Balls of real images reach 1, those of drawn ones 0.1, 0.1, 0.1 and 8.3.
    assert figures == {"precision": 0.75, "recall": 0.75, "density": 6 / 4, "coverage": 0.5}
    assert precision_recall(real, real, neighbors=1)["coverage"] == 1.0


def test_blocks_do_not_change_the_figures(
    sets: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = precision_recall(*sets), cmmd(*sets)
    monkeypatch.setattr("recipes.evaluation.scoring.frechet._BLOCK", 7)
    assert precision_recall(*sets) == whole[0] and cmmd(*sets) == pytest.approx(whole[1])


def test_clip_scores_by_hand() -> None:
    texts, images = np.array([[1.0, 0], [1, 1], [1, 0]]), np.array([[2.0, 0], [1, 0], [-1, 0]])
    assert clip_scores(texts, images) == pytest.approx([100, 100 / 2**0.5, 0])
    assert similarities(texts, images)[2] == -1.0


def test_what_cannot_be_measured_is_refused() -> None:
    features = np.ones((3, 2))
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3, 1\)"):
        frechet_distance(features, features[:, :1])
    with pytest.raises(ValueError, match="At least 2 images"):
        frechet_distance(features[:1], features)
    with pytest.raises(ValueError, match="At least 6 images"):
        precision_recall(features, features)
    with pytest.raises(ValueError, match="not a finite number"):
        kid(features * np.nan, features)
    with pytest.raises(ValueError, match="zeros has no direction"):
        cmmd(features * 0, features)
    with pytest.raises(ValueError, match="got 2 and 3"):
        clip_scores(features[:2], features)
