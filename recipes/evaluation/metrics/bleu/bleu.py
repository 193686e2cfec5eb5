# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""BLEU-1 to BLEU-4 of captions as pycocoevalcap computes them, on PTB-like words, without Java."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from recipes.evaluation.scoring.captions import bleu
from recipes.evaluation.scoring.ptb import ptb_tokenize


class Bleu(evaluate.Metric):
    """See the module."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation='Papineni et al., "BLEU" (2002).',
            inputs_description=(
                "predictions: one caption per image; references: its captions; tokenized: whether words are "
                "already apart by spaces."
            ),
            features=Features({"predictions": Value("string"), "references": List(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], tokenized: bool = False) -> dict[str, Any]:
        corpus = bleu(predictions, references, str.split if tokenized else ptb_tokenize).corpus
        return {f"bleu_{order + 1}": float(score) for order, score in enumerate(corpus)}
