# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""How far drawn images lie from real ones, and how well they fit their texts; all from features.

Definitions: data_and_evaluation.md section 3.12, evaluation_tools.md section 5. Features are arrays of shape (images, D), of
any extractor; a Fréchet distance is FID only with those of the Inception network that FID is defined by.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np

_BLOCK = 1024  # rows of a kernel or of distances at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


class Spread(NamedTuple):
    """A mean over subsets with the standard deviation between them."""

    value: float
    spread: float
    subsets: int


def frechet_distance(real: Any, fake: Any) -> float:
    """Return the Fréchet distance of two sets of features, as if each were normal.

    It is biased upwards for few images; with no more images than features a warning says so.

    Args:
        real, fake: (N, D) and (M, D), two images or more each.

    Raises:
        ValueError: for other shapes or features that are not finite.
    """
    first, second = _checked(real, fake, least=2)
    if min(len(first), len(second)) <= first.shape[1]:
        warnings.warn(
            f"{len(first)} and {len(second)} images are too few for {first.shape[1]} features: the distance is too high. "
            "Prefer KID or CMMD.",
            stacklevel=2,
        )
        return _frechet_of_few(first, second)
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second)]
    return frechet_of_moments(first.mean(0), covariances[0], second.mean(0), covariances[1])


def _frechet_of_few(first: np.ndarray, second: np.ndarray) -> float:
    """The same from the images themselves, at once where they are fewer than the features.

    Where C = XᵀX of centered and scaled X, the trace of the root of C1 C2 is the sum of the singular values of X1 X2ᵀ.
    """
    rows = [(features - features.mean(0)) / np.sqrt(len(features) - 1) for features in (first, second)]
    shared = np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    apart = first.mean(0) - second.mean(0)
    distance = apart @ apart + sum((one**2).sum() for one in rows) - 2 * shared
    return float(max(distance, 0.0))


def frechet_of_moments(mean: Any, covariance: Any, other_mean: Any, other_covariance: Any) -> float:
    """Return the Fréchet distance of two normal distributions: means (D,), covariances (D, D)."""
    mean, covariance, other_mean, other_covariance = (
        np.asarray(moment, dtype=np.float64) for moment in (mean, covariance, other_mean, other_covariance)
    )
    # The trace of the root of C1 C2 is that of the root of the symmetric √C1 C2 √C1, whose eigenvalues are real.
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ other_covariance @ root), 0, None)).sum()
    apart = mean - other_mean
    distance = apart @ apart + np.trace(covariance) + np.trace(other_covariance) - 2 * shared
    return float(max(distance, 0.0))  # rounding alone takes it below


def kid(real: Any, fake: Any, subsets: int = 100, size: int = 1000, seed: int = 0) -> Spread:
    """Return the kernel distance with kernel (x·y / D + 1)³, without bias, as mean and spread over random subsets.

    Args:
        real, fake: (N, D) and (M, D).
        size: images of a subset, of each set; fewer where there are fewer.

    Raises:
        ValueError: as `frechet_distance`.
    """
    first, second = _checked(real, fake, least=2)
    random = np.random.default_rng(seed)
    size = min(size, len(first), len(second))
    values = []
    for _ in range(subsets):
        x = first[random.choice(len(first), size, replace=False)]
        y = second[random.choice(len(second), size, replace=False)]
        own = sum((kernel.sum() - np.trace(kernel)) / (size * (size - 1)) for kernel in (_cubic(x, x), _cubic(y, y)))
        values.append(own - 2 * _cubic(x, y).mean())
    return Spread(float(np.mean(values)), float(np.std(values)), subsets)


def cmmd(real: Any, fake: Any) -> float:
    """Return CMMD of image embeddings of CLIP: Gaussian kernel of width 10 on unit vectors, times 1000.

    Args:
        real, fake: (N, D) and (M, D), normalized here.

    Raises:
        ValueError: as `frechet_distance`; for a feature vector of zeros.
    """
    first, second = (_unit(features) for features in _checked(real, fake, least=1))
    return CMMD_SCALE * (
        _gaussian_mean(first, first) + _gaussian_mean(second, second) - 2 * _gaussian_mean(first, second)
    )


def precision_recall(real: Any, fake: Any, neighbors: int = 5) -> dict[str, float]:
    """Return `precision`, `recall`, `density` and `coverage` of the drawn images.

    Each image owns the ball that reaches its `neighbors`-th nearest of the same set. Precision is the share of drawn images
    in a ball of real ones, recall the share of real images in a ball of drawn ones, density how many balls of real images a
    drawn one lies in, over `neighbors`, and coverage the share of real balls with a drawn image.

    Args:
        real, fake: (N, D) and (M, D), more than `neighbors` images each.

    Raises:
        ValueError: as `frechet_distance`, and for too few images.
    """
    first, second = _checked(real, fake, least=neighbors + 1)
    real_radius, fake_radius = _radii(first, neighbors), _radii(second, neighbors)
    in_real = np.zeros(len(second))
    in_fake, covered = [], []
    for start in range(0, len(first), _BLOCK):
        distances = _distances(first[start : start + _BLOCK], second)
        inside = distances < real_radius[start : start + _BLOCK, None]
        in_real += inside.sum(0)
        covered.append(inside.any(1))
        in_fake.append((distances < fake_radius).any(1))
    return {
        "precision": float((in_real > 0).mean()),
        "recall": float(np.concatenate(in_fake).mean()),
        "density": float(in_real.mean() / neighbors),
        "coverage": float(np.concatenate(covered).mean()),
    }


def clip_scores(texts: Any, images: Any) -> np.ndarray:
    """Return (N,) CLIP scores, 100 times the cosine of text and image where it is above 0.

    Args:
        texts, images: (N, D) embeddings; row by row they belong together.

    Raises:
        ValueError: for unequal shapes, features that are not finite, or a vector of zeros.
    """
    return 100 * np.maximum(similarities(texts, images), 0)


def similarities(first: Any, second: Any) -> np.ndarray:
    """Return (N,) cosines of two (N, D) arrays, row by row; see `clip_scores`."""
    one, other = _checked(first, second, least=1)
    if len(one) != len(other):
        raise ValueError(f"Rows belong together; got {len(one)} and {len(other)}.")
    return (_unit(one) * _unit(other)).sum(1)


def _checked(real: Any, fake: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(features, dtype=np.float64) for features in (real, fake))
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"Features are (images, D) with the same D; got {first.shape} and {second.shape}.")
    if min(len(first), len(second)) < least:
        raise ValueError(f"At least {least} images of each set are needed; got {len(first)} and {len(second)}.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("A feature is not a finite number: look for broken images or an overflow of the extractor.")
    return first, second


def _unit(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError("A feature vector of zeros has no direction.")
    return features / norms


def _cubic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _gaussian_mean(first: np.ndarray, second: np.ndarray) -> float:
    """The mean of the kernel over all pairs, those of an image with itself included."""
    sums = [
        np.exp(-(_distances(first[start : start + _BLOCK], second) ** 2) / (2 * CMMD_SIGMA**2)).sum()
        for start in range(0, len(first), _BLOCK)
    ]
    return float(sum(sums)) / (len(first) * len(second))


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.clip(squares, 0, None))


def _radii(features: np.ndarray, neighbors: int) -> np.ndarray:
    """The distance of each image to its n-th nearest other one; itself comes first."""
    return np.concatenate(
        [
            np.partition(_distances(features[start : start + _BLOCK], features), neighbors, axis=1)[:, neighbors]
            for start in range(0, len(features), _BLOCK)
        ]
    )
