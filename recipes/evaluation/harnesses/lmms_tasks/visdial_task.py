# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""VisDial in lmms-eval: what its YAML names.

Models of lmms-eval write answers; their likelihoods it cannot score (0.7.3). So the options are put in order by how well
their words agree with the written answer: another figure than that of likelihoods, of `recipes/evaluate.py`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from recipes.evaluation.benchmark import Line
from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.harnesses.lmms_tasks.common import doc_to_text, doc_to_visual, figure_of, results_of
from recipes.evaluation.harnesses.tables import line_of
from recipes.evaluation.scoring.ptb import ptb_tokenize

METRICS = ("ndcg", "mrr", "recall_1", "recall_5", "recall_10", "mean_rank")
_BENCHMARK = benchmark_named("visdial")


def agreement(answer: str, option: str) -> float:
    """Return the F1 of two texts' words, from 0 to 1."""
    said, given = Counter(ptb_tokenize(answer)), Counter(ptb_tokenize(option))
    shared = (said & given).total()
    return 2 * shared / (said.total() + given.total()) if shared else 0.0


def scored_options(doc: Mapping[str, Any], raw: str) -> Line:
    """Return the line of an answer with the options' scores."""
    line = line_of(dict(doc), raw)
    line["option_scores"] = [agreement(raw, option) for option in line["about"]["options"]]
    line["parsed"] = raw
    return line | {"score": _BENCHMARK.score(raw, line)}


process_results = results_of(_BENCHMARK, METRICS, scored_options)
ndcg, mrr, recall_1, recall_5, recall_10, mean_rank = (
    figure_of(_BENCHMARK, name.replace("recall_", "recall@")) for name in METRICS
)

__all__ = ["doc_to_text", "doc_to_visual", "process_results", *METRICS]
