# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Accuracy of lettered answers, and of pairs of which both must be right."""

from typing import Any

import evaluate
from datasets import Features, Value

from recipes.evaluation.scoring.letters import mmvp_figures, parse_letter


class Mmvp(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation=('Tong et al., "Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs" (2024).'),
            inputs_description=(
                'predictions: answers as the model gave them; references: "Correct Answer", such as "(a)"; '
                'indices: "Index", pairs are 1 and 2, 3 and 4, ...; corrected: whether the four known errors of '
                'the file are corrected; rule: "lmms_eval" or "strict".'
            ),
            features=Features(
                {"predictions": Value("string"), "references": Value("string"), "indices": Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        indices: list[int],
        corrected: bool = True,
        rule: str = "lmms_eval",
    ) -> dict[str, Any]:
        letters = [parse_letter(answer, rule=rule) for answer in predictions]
        return mmvp_figures(letters, references, indices, corrected)
