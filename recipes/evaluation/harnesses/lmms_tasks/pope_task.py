# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""POPE in lmms-eval: what its YAML names."""

from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.harnesses.lmms_tasks.common import doc_to_text, doc_to_visual, figure_of, results_of

METRICS = ("accuracy", "f1", "precision", "recall", "yes_ratio", "unparsed")
_BENCHMARK = benchmark_named("pope")

process_results = results_of(_BENCHMARK, METRICS)
accuracy, f1, precision, recall, yes_ratio, unparsed = (figure_of(_BENCHMARK, name) for name in METRICS)

__all__ = ["doc_to_text", "doc_to_visual", "process_results", *METRICS]
