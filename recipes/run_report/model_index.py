# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Benchmarks in a model card: the `model-index` of its metadata, which the Hub shows, and tables with intervals.

Of `results.json`, as recipes/evaluate.py writes it.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from recipes.run_report.card import table

TASK = "image-text-to-text"
# Figures that the index names besides the headline; the tables have all.
INDEXED = ("accuracy", "f1", "item_accuracy", "pair_accuracy", "bleu_4", "rouge_l", "meteor", "mrr", "recall@1")
Results = Mapping[str, Mapping[str, Any]]


def eval_results(results: Results) -> list[EvalResult]:
    """Return the entries of a `model-index`: the headline of each benchmark, and those of `INDEXED` that it has."""
    entries = []
    for name, result in results.items():
        manifest, figures = result["manifest"], result["figures"]
        asked = {"protocol": manifest["protocol"], "samples": result["samples"], "partial": result["partial"]}
        for figure in [one for one in dict.fromkeys((result["headline"], *INDEXED)) if one in figures]:
            found = figures[figure]
            interval = {"low": found["low"], "high": found["high"], "confidence": 0.95}
            entries.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=name,
                    dataset_name=name,
                    dataset_args=asked,
                    metric_type=figure,
                    metric_name=figure + f" (partial: {result['samples']} samples)" * result["partial"],
                    metric_value=found["value"],
                    metric_args=interval if found["low"] is not None else None,
                )
            )
    return entries


def benchmark_tables(results: Results) -> str:
    """Return a table of figures per benchmark, as Markdown; "" for none."""
    return "\n\n".join(_table(name, result) for name, result in results.items())


def _table(name: str, result: Mapping[str, Any]) -> str:
    manifest = result["manifest"]
    failed = f", {len(result['failed'])} failed and counted as wrong" if result["failed"] else ""
    partial = f"partial: {result['samples']} of {manifest['samples_of_the_benchmark']} samples, " * result["partial"]
    version = f"protocol {manifest['protocol']}, version {manifest['version']}{failed}"
    head = result["headline"]
    figures = dict(sorted(result["figures"].items(), key=lambda item: item[0] != head))
    rows = [
        (
            figure,
            f"{found['value']:.4g}",
            "" if found["low"] is None else f"{found['low']:.4g} to {found['high']:.4g}",
            "" if found["chance"] is None else f"{found['chance']:.4g}",
            found["count"],
        )
        for figure, found in figures.items()
    ]
    lines = [
        f"### {name}",
        f"{partial}{version}".capitalize() + ".",
        table(("figure", "value", "95 % interval", "chance", "samples"), rows),
    ]
    return "\n\n".join(lines + [f"{note.capitalize()}." for note in result["notes"]])
