# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Precision, recall, density and coverage of drawn images among features of real ones."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.frechet import precision_recall


class PrecisionRecall(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=(
                'Kynkäänniemi et al., "Improved Precision and Recall Metric" (2019); Naeem et al., "Reliable '
                'Fidelity and Diversity Metrics" (2020).'
            ),
            inputs_description=(
                "predictions: features of drawn images; real: features of real images, another number of them if "
                "need be. neighbors: of which the farthest says how far a ball reaches."
            ),
            features=Features({"predictions": List(Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]], real: Any, neighbors: int = 5) -> dict[str, Any]:
        return precision_recall(real, predictions, neighbors)
