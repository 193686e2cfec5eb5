# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CMMD of two sets of CLIP embeddings of images."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.frechet import cmmd


class Cmmd(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Jayasumana et al., "Rethinking FID" (2024).',
            inputs_description=(
                "predictions: features of drawn images; real: features of real images, another number of them if "
                "need be."
            ),
            features=Features({"predictions": List(Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]], real: Any) -> dict[str, Any]:
        return {"cmmd": cmmd(real, predictions)}
