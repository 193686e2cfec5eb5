# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Descriptions of outlined regions (RefCOCOg) in lmms-eval: what its YAML names."""

from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.harnesses.lmms_tasks.common import doc_to_text, doc_to_visual, figure_of, results_of

METRICS = ("cider", "bleu_4", "rouge_l")
_BENCHMARK = benchmark_named("refcocog_region")

process_results = results_of(_BENCHMARK, METRICS)
cider, bleu_4, rouge_l = (figure_of(_BENCHMARK, name) for name in METRICS)

__all__ = ["doc_to_text", "doc_to_visual", "process_results", *METRICS]
