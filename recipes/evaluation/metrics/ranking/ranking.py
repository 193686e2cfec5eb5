# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Mean rank, mean reciprocal rank and recall at 1, 5 and 10 of the right option (VisDial)."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.ranking import ranking_figures


class Ranking(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Das et al., "Visual Dialog" (2017).',
            inputs_description=(
                "predictions: scores of the options, higher is better; references: the index of the right one."
            ),
            features=Features({"predictions": List(Value("float64")), "references": Value("int64")}),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, Any]:
        return ranking_figures(predictions, references)
