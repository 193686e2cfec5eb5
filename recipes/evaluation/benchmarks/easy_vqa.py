# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Easy-VQA: one colored shape per image, 13 answers; the test split of the PyPI package `easy-vqa`.

Files: `test/questions.json` ([question, answer, image id]) and `test/images/<id>.png`, in --data or in the package, if it
is installed. Chance is always giving the most frequent answer.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import (
    ONE_WORD,
    Benchmark,
    Figures,
    ImageSource,
    Line,
    Loaded,
    Request,
    Sample,
    question_request,
)
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.benchmarks.shares import mean_score, share_figure, unparsed_share, yes_no_group
from recipes.evaluation.scoring.vqa import extract_answer
from recipes.evaluation.sources import DataSource
from recipes.prompts import ONE_WORD_REQUEST


class EasyVqa(Benchmark):
    """See the module."""

    name = "easy_vqa"

    def load(self, source: DataSource) -> Loaded:
        """Read the test split."""
        file = source.find("test/questions.json", "data/test/questions.json") or _packaged()
        file = file or source.need("test/questions.json")
        rows = read_json(file)

        def sample(number: int, row: Any) -> Sample:
            question, answer, image = row
            name = f"{int(image)}.png"
            where = ImageSource(name, file.parent / "images" / name)
            return Sample(str(number), (where,), text_of(question), text_of(answer).lower(), name)

        return Loaded(make_samples(rows, sample, ""), {file: len(rows)})

    def request(self, sample: Sample, protocol: str) -> Request:
        """The question with the request for one word."""
        return question_request(sample.asked, protocol, ONE_WORD_REQUEST, ONE_WORD)

    def parse(self, raw: str, line: Line) -> str | None:
        """The answer in lower case without a full stop; under the protocol "deem" cut as the release does."""
        return (extract_answer(raw) if line["protocol"] == "deem" else raw.strip().lower().rstrip(".")) or None

    def score(self, parsed: str | None, line: Line) -> float:
        """1 for the answer."""
        return float(parsed is not None and parsed == line["truth"])

    def figures(self, lines: Sequence[Line]) -> Figures:
        """All questions, those of yes and no, and the others."""
        said = [line for line in lines if line["truth"] in ("yes", "no")]
        others = [line for line in lines if line["truth"] not in ("yes", "no")]
        figures = {"accuracy": mean_score(lines, _most_frequent(lines)), "unparsed": unparsed_share(lines)}
        if said:
            given = [line["parsed"] if line["parsed"] in ("yes", "no") else None for line in said]
            figures |= yes_no_group("yes_no_", said, given)
        if others:
            figures["other_accuracy"] = mean_score(others, _most_frequent(others))
        right = {line["cluster"]: True for line in lines}
        for line in lines:
            right[line["cluster"]] &= line["score"] == 1
        figures["images_all_right"] = share_figure(list(right.values()), list(right))
        return figures


def _most_frequent(lines: Sequence[Line]) -> float:
    return max(Counter(line["truth"] for line in lines).values()) / len(lines)


def _packaged() -> Path | None:
    found = find_spec("easy_vqa")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "data" / "test" / "questions.json"
    return file if file.is_file() else None
