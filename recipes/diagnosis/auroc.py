# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Area under the ROC curve, with the interval of DeLong, DeLong and Clarke-Pearson (1988)."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from recipes.evaluation.scoring.intervals import LEVEL


class Auroc(NamedTuple):
    """Probability that a positive sample scores higher than a negative one, ties half, with its 95 % interval.

    The interval is for large samples; where all positives score higher than all negatives it has no width.
    """

    value: float
    low: float
    high: float
    positives: int
    negatives: int


def placements(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each positive, the share of negatives below it, and for each negative that of positives above it."""
    above, below = scores[positive][:, None], scores[~positive][None]
    wins = (above > below) + 0.5 * (above == below)  # [positives, negatives]
    return wins.mean(1), wins.mean(0)


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> Auroc | None:
    """Return how well scores tell positive samples from negative ones; None where there are fewer than two of a kind.

    Raises:
        ValueError: a score that is not finite, or unequal numbers.
    """
    return difference(scores, None, positive)


def difference(scores: Sequence[float], others: Sequence[float] | None, positive: Sequence[bool]) -> Auroc | None:
    """Return by how much the area of some scores exceeds that of other scores of the same samples.

    Args:
        others: None for the area of `scores` itself.
    """
    truth, total = np.asarray(positive, bool), None
    for sign, column in ((1, scores), (-1, others)):
        if column is None:
            continue
        values = np.asarray(column, np.float64)
        if values.shape != truth.shape or not np.isfinite(values).all():
            raise ValueError(
                f"Scores of shape {values.shape} for {truth.shape[0]} samples, {int((~np.isfinite(values)).sum())} of them "
                "not finite: give one finite score per sample."
            )
        if min(truth.sum(), (~truth).sum()) < 2:
            return None
        pair = [sign * one for one in placements(values, truth)]
        total = pair if total is None else [a + b for a, b in zip(total, pair, strict=True)]
    of_positives, of_negatives = total
    value, lowest = float(of_positives.mean()), 0.0 if others is None else -1.0
    error = math.sqrt(of_positives.var(ddof=1) / len(of_positives) + of_negatives.var(ddof=1) / len(of_negatives))
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * error
    numbers = len(of_positives), len(of_negatives)
    return Auroc(value, max(lowest, value - half), min(1.0, value + half), *numbers)
