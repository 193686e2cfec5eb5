# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Two evaluations of the same samples: how far they are apart, how sure that is, and which samples changed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import Line
from recipes.evaluation.page import Images, images_of, said, sample_image, write_html
from recipes.evaluation.results import comparable, evaluated, load_lines
from recipes.evaluation.scoring.paired import Comparison, compare_scores, exact_mcnemar, holm
from recipes.evaluation.sources import DataSource
from recipes.run_report.markup import cards, section, table

LEVEL = 0.05  # of significance, after Holm's correction
SHOWN = 12  # samples that changed, per benchmark


@dataclass(frozen=True)
class Pair:
    """The lines of two evaluations of a benchmark, in the same order, and what each sample is worth in them."""

    name: str
    lines: tuple[list[Line], list[Line]]
    scores: tuple[list[float], list[float]]

    @property
    def changed(self) -> list[int]:
        """The numbers of the samples whose score changed, the largest change first."""
        first, second = self.scores
        found = [number for number, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]]
        return sorted(found, key=lambda number: -abs(first[number] - second[number]))


def read_pairs(first: Path, second: Path) -> list[Pair]:
    """Return what two folders hold of the same benchmarks.

    Raises:
        ValueError: they share no benchmark, or one of them was evaluated under another protocol or over other samples.
    """
    shared = [name for name in evaluated(first) if name in evaluated(second)]
    if not shared:
        raise ValueError(
            f"Nothing to compare: {first} holds {', '.join(evaluated(first))}, {second} {', '.join(evaluated(second))}."
        )
    pairs = []
    for name in shared:
        benchmark, manifest, lines = load_lines(first / name)
        _, other_manifest, other_lines = load_lines(second / name)
        if found := comparable(manifest, other_manifest):
            raise ValueError(
                f"{name} cannot be compared, it was evaluated in another way: {'; '.join(found)}. Evaluate both alike."
            )
        by_id = {line["id"]: line for line in other_lines}
        if {line["id"] for line in lines} != set(by_id):
            raise ValueError(f"{name} cannot be compared: the ids of its samples differ.")
        ordered = [by_id[line["id"]] for line in lines]
        pairs.append(Pair(name, (lines, ordered), (benchmark.scores(lines), benchmark.scores(ordered))))
    return pairs


def compare(pairs: Sequence[Pair], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return, by benchmark, both means, their difference with its interval, p-values and the ids that changed.

    `p_value` is of the test that is named, `corrected` the same by Holm over the benchmarks. Differences are of the second
    from the first.
    """
    found = {}
    for pair in pairs:
        first, second = pair.scores
        clusters = [line["cluster"] for line in pair.lines[0]]
        result: Comparison = compare_scores(first, second, clusters, seed)
        binary = set(first) | set(second) <= {0.0, 1.0}
        found[pair.name] = {
            "first": sum(first) / len(first),
            "second": sum(second) / len(second),
            "difference": result.difference.value,
            "low": _known(result.difference.low),
            "high": _known(result.difference.high),
            "test": result.test,
            "p_value": result.p_value,
            "mcnemar": exact_mcnemar(first, second) if binary else None,
            "count": len(first),
            "clusters": result.difference.clusters,
            "gained": sum(one < other for one, other in zip(first, second, strict=True)),
            "lost": sum(one > other for one, other in zip(first, second, strict=True)),
            "changed": [pair.lines[0][number]["id"] for number in pair.changed],
        }
    corrected = holm({name: result["p_value"] for name, result in found.items()})
    for name, result in found.items():
        result |= {"corrected": corrected[name], "significant": corrected[name] < LEVEL}
    return found


def _known(value: float) -> float | None:
    """Return an end of an interval, None where a single cluster tells nothing of the spread."""
    return value if math.isfinite(value) else None


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.4f}"


def format_comparison(results: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as aligned text, a line per benchmark."""
    lines = []
    for name, result in results.items():
        interval = f"[{_signed(result['low'])}, {_signed(result['high'])}]"
        sure = "significant" if result["significant"] else "not significant"
        lines.append(
            f"{name:20s} {result['first']:.4f} -> {result['second']:.4f}  {result['difference']:+.4f} {interval}  "
            f"p={result['p_value']:.4g} ({result['test']}), {result['corrected']:.4g} by Holm: {sure}; "
            f"{result['gained']} gained, {result['lost']} lost of {result['count']}"
        )
    return "\n".join(lines)


def write_comparison(
    path: Path, names: tuple[str, str], pairs: Sequence[Pair], results: dict[str, Any], sources: dict[str, DataSource]
) -> Path:
    """Write the page of a comparison: its table, and samples that changed with both answers."""
    head = ("benchmark", "first", "second", "difference", "95 % interval", "p", "by Holm", "gained", "lost", "samples")
    rows = [
        (
            escape(name),
            *(f"{result[key]:.4f}" for key in ("first", "second")),
            f"{result['difference']:+.4f}",
            f"{_signed(result['low'])} – {_signed(result['high'])}",
            f"{result['p_value']:.3g}",
            f'<span class="{"good" if result["significant"] else ""}">{result["corrected"]:.3g}</span>',
            *(str(result[key]) for key in ("gained", "lost", "count")),
        )
        for name, result in results.items()
    ]
    blocks = [section("Difference", "Second less first, over the same samples.", table(head, rows))]
    for pair in pairs:
        images = images_of(pair.name, sources.get(pair.name))
        shown = (_changed_card(pair, number, images) for number in pair.changed[:SHOWN])
        note = f"{len(pair.changed)} samples changed; the largest changes first."
        blocks.append(section(f"{pair.name}: what changed", note, cards("sheet", shown)))
    return write_html(path, "Comparison", f"{names[0]} → {names[1]}", blocks, "recipes/compare.py")


def _changed_card(pair: Pair, number: int, images: Images) -> str:
    line, other = (lines[number] for lines in pair.lines)
    first, second = (scores[number] for scores in pair.scores)
    better = "good" if second > first else "bad"
    return (
        f'<h3 class="{better}">{escape(line["id"])}</h3>{sample_image(line, images)}{said("prompt", line["prompt"])}'
        + said("first", f"{line['raw']} → {line['parsed']} ({first:.2f})")
        + said("second", f"{other['raw']} → {other['parsed']} ({second:.2f})")
        + said("truth", line["truth"])
    )
