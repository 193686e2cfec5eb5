# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""VQA accuracy by the rule of VizWiz, with its 95 % interval."""

from collections.abc import Hashable, Sequence
from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.scoring.vqa import vizwiz_accuracy


class VizwizAccuracy(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Gurari et al., "VizWiz Grand Challenge" (2018).',
            inputs_description=(
                "predictions: answers; references: the answers of the annotators, usually ten; clusters: what the"
                " questions share, such as their image."
            ),
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], clusters: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        scores = [vizwiz_accuracy(answer, expected) for answer, expected in zip(predictions, references, strict=True)]
        return mean_interval(scores, clusters, bounds=(0.0, 1.0))._asdict()
