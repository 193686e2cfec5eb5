# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Accuracy, precision, recall, F1, yes-ratio of predictions and unparsed rate of yes/no questions (POPE, RobustVQA)."""

from typing import Any

import evaluate
from datasets import Features, Value

from recipes.evaluation.scoring.yes_no import parse_yes_no, yes_no_figures


class YesNo(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (2023).',
            inputs_description=(
                'predictions: answers as the model gave them; references: "yes" or "no"; rule: "official", "deem"'
                ' or "word".'
            ),
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: list[str], references: list[str], rule: str = "official") -> dict[str, Any]:
        return yes_no_figures([parse_yes_no(answer, rule) for answer in predictions], references)
