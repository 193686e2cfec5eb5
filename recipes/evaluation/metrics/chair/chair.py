# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CHAIR of captions: mentions of objects that are not there, captions with one, and recall of the objects."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.hallucination import chair, read_synonyms


class Chair(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Rohrbach et al., "Object Hallucination in Image Captioning" (2018).',
            inputs_description=(
                'predictions: one caption per image; references: the objects in it; synonyms: lines "object, '
                'another word for it, ...".'
            ),
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], synonyms: str) -> dict[str, Any]:
        return chair(predictions, references, read_synonyms(synonyms))
