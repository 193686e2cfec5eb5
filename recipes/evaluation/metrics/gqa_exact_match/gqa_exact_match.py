# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Share of answers that equal the reference, with its 95 % interval."""

from collections.abc import Hashable, Sequence
from typing import Any

import evaluate
from datasets import Features, Value

from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.scoring.vqa import gqa_exact_match


class GqaExactMatch(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Hudson and Manning, "GQA" (2019).',
            inputs_description=(
                'predictions: answers; references: one answer each; rule: "strict", "relaxed" or "deem"; '
                "clusters: what the questions share, such as their image."
            ),
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        rule: str = "strict",
        clusters: Sequence[Hashable] | None = None,
    ) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        return mean_interval([float(gqa_exact_match(*pair, rule)) for pair in pairs], clusters)._asdict()
