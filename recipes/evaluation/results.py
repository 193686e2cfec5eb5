# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Score: figures from saved predictions, without any model; `results.json` for all benchmarks of a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import Benchmark, Line, figure_rows, scored
from recipes.evaluation.benchmarks import BENCHMARKS, benchmark_named
from recipes.evaluation.distances import saved_figures
from recipes.evaluation.predictions import MANIFEST, PREDICTIONS, differences, read_lines, read_manifest, write_lines
from recipes.whole_files import write_whole

RESULTS, SUBMISSION = "results.json", "submission.json"
CHECKED = "check_batching.json"
SAME_OF_BOTH = ("benchmark", "version", "protocol", "limit", "samples", "annotations")


def evaluated(out: Path) -> list[str]:
    """Return the benchmarks whose predictions lie in a folder, in the order of the table.

    Raises:
        ValueError: there are none.
    """
    found = {file.parent.name for file in out.glob(f"*/{MANIFEST}")}
    if not found:
        raise ValueError(
            f"No predictions in {out}: expected <benchmark>/{PREDICTIONS} and {MANIFEST} there, as "
            "recipes/evaluate.py --benchmarks writes them."
        )
    return [name for name in BENCHMARKS if name in found] + sorted(found - set(BENCHMARKS))


def load_lines(folder: Path) -> tuple[Benchmark, dict[str, Any], list[Line]]:
    """Return a benchmark, the manifest and the predictions of its folder, parsed and scored anew.

    Raises:
        ValueError: predictions are missing, or of another version of the benchmark.
    """
    manifest = read_manifest(folder)
    benchmark = benchmark_named(manifest["benchmark"])
    if manifest["version"] != benchmark.version:
        raise ValueError(
            f"{folder} was made with version {manifest['version']} of {benchmark.name}, this is version "
            f"{benchmark.version}. Evaluate again into another folder."
        )
    lines = [scored(benchmark, line) for line in read_lines(folder / PREDICTIONS)]
    if len(lines) != manifest["samples"]:
        raise ValueError(
            f"{folder} holds {len(lines)} of {manifest['samples']} predictions. Give recipes/evaluate.py the same "
            "command again, and it goes on."
        )
    return benchmark, manifest, lines


def score_benchmark(folder: Path) -> dict[str, Any]:
    """Return the results of one benchmark; update the scores among its predictions, write its submission."""
    benchmark, manifest, lines = load_lines(folder)
    if lines != read_lines(folder / PREDICTIONS):
        write_lines(folder / PREDICTIONS, lines)
    measured, notes = saved_figures(folder, lines)
    figures = measured | benchmark.figures(lines)
    failed = [{"id": line["id"], "error": line["error"]} for line in lines if line.get("error")]
    results = {
        "headline": benchmark.headline if benchmark.headline in figures else next(iter(figures)),
        "figures": figure_rows(figures),
        "partial": len(lines) < manifest["samples_of_the_benchmark"],
        "samples": len(lines),
        "failed": failed,
        "notes": manifest.get("notes", []) + notes,
        "manifest": manifest,
    }
    if (folder / CHECKED).is_file():
        results["check_batching"] = json.loads((folder / CHECKED).read_text(encoding="utf-8"))
    if (submission := benchmark.submission(lines)) is not None:
        write_whole(folder / SUBMISSION, json.dumps(submission))
    return results


def score(out: Path, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Score all benchmarks of a folder, or those named, and write `results.json`; return it."""
    results = {name: score_benchmark(out / name) for name in names or evaluated(out)}
    file = out / RESULTS
    before = json.loads(file.read_text(encoding="utf-8")) if names and file.is_file() else {}
    write_whole(file, json.dumps(before | results, indent=1))
    return results


def comparable(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return what forbids to compare two evaluations by their manifests, one line each; none if nothing does."""
    return [line for name in SAME_OF_BOTH for line in differences(first.get(name), second.get(name), name)]


def format_results(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures as aligned text, one line each, the headline of each benchmark first."""
    lines = []
    for name, result in results.items():
        head = result["headline"]
        figures = dict(sorted(result["figures"].items(), key=lambda item: item[0] != head))
        mark = f"  partial: {result['samples']} samples" if result["partial"] else ""
        failed = f"  {len(result['failed'])} failed, counted as wrong" if result["failed"] else ""
        lines.append(f"{name} ({result['manifest']['protocol']} protocol){mark}{failed}")
        lines += [f"  {key:32s} {format_figure(figure)}" for key, figure in figures.items()]
        lines += [f"  note: {note}" for note in result["notes"]]
        if checked := result.get("check_batching"):
            lines.append(f"  alone or in a batch: {len(checked['different'])} of {checked['checked']} answers differ")
    return "\n".join(lines)


def format_figure(figure: dict[str, Any]) -> str:
    """Return a figure's value, interval, chance and number of samples as text."""
    text = f"{figure['value']:8.4f}"
    text += f"  [{figure['low']:.4f}, {figure['high']:.4f}]" if figure["low"] is not None else " " * 18
    chance = "" if figure["chance"] is None else f"chance {figure['chance']:.4f}"
    return f"{text}  {chance:14s}  n={figure['count']}"
