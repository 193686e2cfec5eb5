# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Fréchet distance of two sets of features; FID only with those of the Inception network of FID."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.frechet import frechet_distance


class FrechetDistance(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017).',
            inputs_description=(
                "predictions: features of drawn images; real: features of real images, another number of them if "
                "need be."
            ),
            features=Features({"predictions": List(Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]], real: Any) -> dict[str, Any]:
        return {"frechet_distance": frechet_distance(real, predictions)}
