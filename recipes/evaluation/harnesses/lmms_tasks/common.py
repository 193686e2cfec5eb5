# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the tasks share: rows of `recipes/export_benchmark.py`, and our benchmarks' own parsing, scores and figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from recipes.evaluation.benchmark import Benchmark, Line
from recipes.evaluation.harnesses.tables import scored_row

Row = Mapping[str, Any]
Score = Callable[[Row, str], Line]


def doc_to_visual(doc: Row) -> list[Image.Image]:
    """Return the row's image."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Row) -> str:
    """Return the row's question."""
    return doc["question"]


def results_of(
    benchmark: Benchmark, metrics: Sequence[str], score: Score | None = None
) -> Callable[[Row, Sequence[str]], dict[str, Line]]:
    """Return the task's `process_results`: the scored answer, for each metric.

    Args:
        score: of a row and an answer; by default as the benchmark parses and scores.
    """

    def process_results(doc: Row, results: Sequence[str]) -> dict[str, Line]:
        raw = str(results[0]) if results else ""
        line = score(doc, raw) if score is not None else scored_row(benchmark, dict(doc), raw)
        return dict.fromkeys(metrics, line)

    return process_results


def figure_of(benchmark: Benchmark, name: str) -> Callable[[Sequence[Line]], float]:
    """Return the aggregation of a metric: the benchmark's figure of that name over all answers, NaN where it has none."""

    def aggregate(lines: Sequence[Line]) -> float:
        figure = benchmark.figures(lines).get(name)
        return float("nan") if figure is None else figure.value

    return aggregate
