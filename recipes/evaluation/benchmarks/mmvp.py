# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""MMVP: pairs of images that CLIP takes for the same, one question about both, two options.

Files: `Questions.csv` (Index, Question, Options, Correct Answer) and `MMVP Images/<Index>.jpg`; or rows of `datasets` with
the same columns and `image`. Four answers of the file are known to be wrong: figures are of the corrected ones, and of
the original ones under names that say so. Chance of a pair: 1/4.
"""

import csv
import re
from collections.abc import Sequence
from typing import Any

from recipes.evaluation.benchmark import (
    Benchmark,
    Figure,
    Figures,
    ImageSource,
    Line,
    Loaded,
    Request,
    Sample,
    question_request,
)
from recipes.evaluation.benchmarks.files import make_samples, text_of
from recipes.evaluation.benchmarks.shares import all_right_figure, mean_score, share_figure, unparsed_share
from recipes.evaluation.scoring.letters import correct_letter, parse_letter
from recipes.evaluation.sources import DataSource, ImageFolders

LETTER_ENDING = "Answer with the option's letter from the given choices directly."
OTHER_RULE = {"deem": "lmms_eval", "standard": "strict"}


class Mmvp(Benchmark):
    """See the module."""

    name = "mmvp"
    headline = "pair_accuracy"

    def load(self, source: DataSource) -> Loaded:
        """Read the 300 questions."""
        if source.find("Questions.csv") is None and (rows := source.rows()):
            return Loaded(make_samples(rows[0], lambda _, row: _sample(row, row["image"]), ""), rows[1])
        file = source.need("Questions.csv")
        folders = ImageFolders(file.parent, "MMVP Images", "images", "")

        def sample(number: int, row: Any) -> Sample:
            index = int(row["Index"])
            return _sample(row, folders.find(f"{index}.jpg", f"{index}.png"))

        with open(file, newline="", encoding="utf-8-sig") as stream:
            table = [{(key or "").strip(): value for key, value in row.items()} for row in csv.DictReader(stream)]
        return Loaded(make_samples(table, sample, ""), {file: len(table)})

    def request(self, sample: Sample, protocol: str) -> Request:
        """Question and options as in the file, or a line each as lmms-eval has them, and the request for a letter."""
        options = sample.about["options"]
        lines = re.sub(r"\s*\(([a-z])\)\s*", lambda match: f"\n{match[1].upper()}. ", options)
        asked = f"{sample.asked} {options}" if protocol == "deem" else sample.asked + lines
        return question_request(asked, protocol, f" {LETTER_ENDING} ", f"\n{LETTER_ENDING}")

    def parse(self, raw: str, line: Line) -> str | None:
        """A letter: as lmms-eval finds it, or strictly under the protocol "deem"."""
        return parse_letter(raw, "AB", "strict" if line["protocol"] == "deem" else "lmms_eval")

    def score(self, parsed: str | None, line: Line) -> float:
        """1 for the corrected letter."""
        return float(parsed is not None and parsed == line["truth"])

    def figures(self, lines: Sequence[Line]) -> Figures:
        """Pairs and single questions, by the corrected and the original answers, and by the other rule for letters."""
        pairs, clusters = ([line["cluster"] for line in lines] for _ in range(2))
        original = [
            line | {"score": self.score(line["parsed"], line | {"truth": line["about"].get("original")})}
            for line in lines
        ]
        other = OTHER_RULE[lines[0]["protocol"]]
        again = [line | {"score": self.score(_letter(line, other), line)} for line in lines]
        return {
            "pair_accuracy": all_right_figure(lines, pairs, 0.25),
            "accuracy": mean_score(lines, 0.5),
            "unparsed": unparsed_share(lines),
            "a_ratio": share_figure([line["parsed"] == "A" for line in lines], clusters),
            "original_pair_accuracy": all_right_figure(original, pairs, 0.25),
            "original_accuracy": _mean(original),
            f"{other}_rule_pair_accuracy": all_right_figure(again, pairs, 0.25),
            f"{other}_rule_accuracy": _mean(again),
        }


def _letter(line: Line, rule: str) -> str | None:
    return None if line.get("error") else parse_letter(line["raw"], "AB", rule)


def _mean(lines: Sequence[Line]) -> Figure:
    return mean_score(lines, 0.5)


def _sample(row: Any, where: Any) -> Sample:
    index = int(row["Index"])
    answer = text_of(row["Correct Answer"])
    pair = (index - 1) // 2 + 1
    return Sample(
        str(index),
        (ImageSource(str(index), where),),
        text_of(row["Question"]),
        correct_letter(answer, index),
        cluster=f"pair {pair}",
        about={"options": text_of(row["Options"]), "original": correct_letter(answer)},
    )
