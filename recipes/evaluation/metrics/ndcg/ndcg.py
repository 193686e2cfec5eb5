# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""NDCG of options with dense relevance (VisDial), with its 95 % interval."""

from collections.abc import Hashable, Sequence
from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.scoring.ranking import ndcg


class Ndcg(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Das et al., "Visual Dialog" (2017).',
            inputs_description=(
                "predictions: scores of the options, higher is better; references: their relevance; clusters: "
                "what the questions share."
            ),
            features=Features({"predictions": List(Value("float64")), "references": List(Value("float64"))}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        scores = [ndcg(options, relevance) for options, relevance in zip(predictions, references, strict=True)]
        return mean_interval(scores, clusters, bounds=(0.0, 1.0))._asdict()
