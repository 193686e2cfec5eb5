# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Accuracy of boxes at an overlap of 0.5, mean overlap, accuracy of their centers and unparsed rate."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.data.readers.grounding import Box
from recipes.evaluation.scoring.grounding import grounding_figures, parse_box, pixel_box


class Grounding(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Yu et al., "Modeling Context in Referring Expressions" (2016).',
            inputs_description=(
                "predictions: answers as the model gave them; references: true boxes x1, y1, x2, y2 in pixels; "
                'widths, heights: of the images; rule: "deem" or "relative".'
            ),
            features=Features(
                {
                    "predictions": Value("string"),
                    "references": List(Value("float64")),
                    "widths": Value("int64"),
                    "heights": Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[Box],
        widths: list[int],
        heights: list[int],
        rule: str = "deem",
    ) -> dict[str, Any]:
        boxes = [parse_box(answer, rule) for answer in predictions]
        sizes = zip(boxes, widths, heights, strict=True)
        named = [box and pixel_box(box, width, height, rule) for box, width, height in sizes]
        return grounding_figures(named, references)
