# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CLIP score: 100 times the cosine of text and image where it is above 0, with its 95 % interval."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.frechet import clip_scores
from recipes.evaluation.scoring.intervals import mean_interval


class ClipScore(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Hessel et al., "CLIPScore" (2021).',
            inputs_description=(
                "predictions: embeddings of images; references: embeddings of their texts, of the same model."
            ),
            features=Features({"predictions": List(Value("float64")), "references": List(Value("float64"))}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, Any]:
        return mean_interval(clip_scores(references, predictions), bounds=(0.0, 100.0))._asdict()
