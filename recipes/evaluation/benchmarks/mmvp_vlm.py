# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""MMVP-VLM: pairs of images and statements for two-tower models; which of both images does each statement fit?

Files: `Questions.csv` (Question ID, Type, Statement) and `MLLM_VLM Images/<Type>/<id>.jpg`. Rows 1 and 2, 3 and 4, ... are
pairs. A pair counts when both statements find their image: chance 1/4. Definition: newer_methods.md.
"""

import csv
from collections.abc import Sequence
from typing import Any

from recipes.evaluation.benchmark import Benchmark, Figure, Figures, ImageSource, Line, Loaded, Request, Sample
from recipes.evaluation.benchmarks.files import make_samples, text_of
from recipes.evaluation.benchmarks.shares import all_right_figure, mean_score
from recipes.evaluation.sources import DataSource, ImageFolders

STATEMENT = "a photo of {}"
PAIR_CHANCE = 0.25


class MmvpVlm(Benchmark):
    """See the module."""

    name = "mmvp_vlm"
    headline = "pair_accuracy"
    asks = "towers"
    generation: dict[str, dict[str, Any]] = {"deem": {}, "standard": {}}

    def load(self, source: DataSource) -> Loaded:
        """Read the statements, each with both images of its pair."""
        file = source.need("Questions.csv")
        folders = ImageFolders(file.parent, "MLLM_VLM Images", "MLLM_VLM_Images")
        with open(file, newline="", encoding="utf-8-sig") as stream:
            table = [{(key or "").strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]

        def sample(number: int, row: Any) -> Sample:
            index, kind = int(row["Question ID"]), text_of(row["Type"])
            if index < 1:
                raise ValueError(f"Question ID {index}, counted from 1")
            first = index - (index - 1) % 2
            names = [f"{kind}/{one}.jpg" for one in (first, first + 1)]
            images = (ImageSource(name, folders.find(name, f"{name[:-4]}.png")) for name in names)
            about = {"type": kind}
            truth, pair = str(index - first + 1), f"pair {(first + 1) // 2}"
            return Sample(str(index), tuple(images), text_of(row["Statement"]), truth, pair, kind, about)

        return Loaded(make_samples(table, sample, "row"), {file: len(table)})

    def request(self, sample: Sample, protocol: str) -> Request:
        """The statement as a caption; both protocols are the same."""
        return Request((STATEMENT.format(sample.asked),))

    def parse(self, raw: str, line: Line) -> str:
        """The number of the image, from 1."""
        return raw

    def score(self, parsed: str | None, line: Line) -> float:
        """1 for the statement's own image."""
        return float(parsed is not None and parsed == line["truth"])

    def figures(self, lines: Sequence[Line]) -> Figures:
        """Pairs of all and of each type, the mean of the types, and single statements."""
        figures = {"pair_accuracy": _pairs(lines), "accuracy": mean_score(lines, 0.5)}
        if _types(lines):
            figures["mean_of_types"] = _mean_of_types(lines)
        for kind in _types(lines):
            figures[f"{kind}: pair_accuracy"] = _pairs([line for line in lines if line["group"] == kind])
        return figures


def _types(lines: Sequence[Line]) -> list[str]:
    return sorted({line["group"] for line in lines if line["group"]})


def _pairs(lines: Sequence[Line]) -> Figure:
    return all_right_figure(lines, [line["cluster"] for line in lines], PAIR_CHANCE)


def _mean_of_types(lines: Sequence[Line]) -> Figure:
    """Return the mean of the types' shares of right pairs; its interval is known where all have as many pairs."""
    each = [_pairs([line for line in lines if line["group"] == kind]) for kind in _types(lines)]
    if len({figure.count for figure in each}) == 1:
        return _pairs([line for line in lines if line["group"]])
    mean = sum(figure.value for figure in each) / len(each)
    return Figure(mean, chance=PAIR_CHANCE, count=sum(figure.count for figure in each))
