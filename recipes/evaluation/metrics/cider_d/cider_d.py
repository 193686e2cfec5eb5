# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CIDEr-D of captions (0..10) as pycocoevalcap computes it, with its 95 % interval over images."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.captions import cider_d
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.scoring.ptb import ptb_tokenize


class CiderD(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Vedantam et al., "CIDEr" (2015).',
            inputs_description=(
                "predictions: one caption per image; references: its captions; tokenized: whether words are "
                "already apart by spaces."
            ),
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], tokenized: bool = False) -> dict[str, Any]:
        scores = cider_d(predictions, references, str.split if tokenized else ptb_tokenize)
        return mean_interval(scores.per_image, bounds=(0.0, 10.0))._asdict() | {"value": scores.corpus}
