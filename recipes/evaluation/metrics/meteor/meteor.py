# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""METEOR 1.5 of captions through the Java program in pycocoevalcap, with the 95 % interval of its mean over images."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.captions import meteor
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.scoring.ptb import ptb_tokenize


class Meteor(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Denkowski and Lavie, "Meteor Universal" (2014).',
            inputs_description=(
                "predictions: one caption per image; references: its captions; tokenized: whether words are "
                "already apart by spaces."
            ),
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], tokenized: bool = False) -> dict[str, Any]:
        scores = meteor(predictions, references, str.split if tokenized else ptb_tokenize)
        return mean_interval(scores.per_image)._asdict() | {"value": scores.corpus}
