# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""POPE: is the named object in the image? Three sets, by how the absent objects were chosen.

Files: `coco_pope_{random,popular,adversarial}.json` (JSON lines), images of COCO's val2014; or rows of `datasets` with
`question`, `answer`, `category`, `image`. Protocols: data_and_evaluation.md section 3.4.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from recipes.evaluation.benchmark import (
    Benchmark,
    Figures,
    ImageSource,
    Line,
    Loaded,
    Request,
    Sample,
    question_request,
)
from recipes.evaluation.benchmarks.files import json_lines, make_samples, text_of
from recipes.evaluation.benchmarks.shares import all_right_figure, f1_over_groups, yes_no_group
from recipes.evaluation.scoring.yes_no import parse_yes_no
from recipes.evaluation.sources import DataSource, ImageFolders

SETS = ("random", "popular", "adversarial")
# How the sets are told apart: the official files hold 3,000 questions each; an older random set that is still around 2,910.
SIZES = {3000: "the 3,000 questions of the official files", 2910: "the older file of 2,910 questions"}
OTHER_RULE = {"deem": "official", "standard": "deem"}


class Pope(Benchmark):
    """See the module."""

    name = "pope"
    generation = {
        "deem": {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 0.0, "do_sample": False},
        "standard": {"num_beams": 1, "max_new_tokens": 10, "do_sample": False},
    }

    def load(self, source: DataSource) -> Loaded:
        """Read the sets that are there, one of them at least."""
        if source.find(*(f"*pope_{name}.json" for name in SETS)) is None and (rows := source.rows()):
            return Loaded(_from_rows(rows[0]), rows[1])
        source.need("coco_pope_random.json", *(f"*pope_{name}.json" for name in SETS))
        samples: list[Sample] = []
        files: dict[Any, int] = {}
        for name in SETS:
            file = source.find(f"coco_pope_{name}.json", f"*pope_{name}.json")
            if file is None:
                continue
            folders = ImageFolders(file.parent, "val2014", "", "images")
            rows = make_samples(json_lines(file), partial(_official, name, folders), name, name)
            files[file] = len(rows)
            samples += rows
        return Loaded(samples, files)

    def request(self, sample: Sample, protocol: str) -> Request:
        """The question, with the release's request (so spelt) or that for one word."""
        return question_request(sample.asked, protocol, " Please anwser yes or no ")

    def parse(self, raw: str, line: Line) -> str | None:
        """By POPE's own rule, or by DEEM's under its protocol."""
        return parse_yes_no(raw, "deem" if line["protocol"] == "deem" else "official")

    def score(self, parsed: str | None, line: Line) -> float:
        """1 for the label."""
        return float(parsed is not None and parsed == line["truth"])

    def figures(self, lines: Sequence[Line]) -> Figures:
        """All questions together, each set, the mean of the sets' F1; accuracy and F1 by the other rule."""
        other = OTHER_RULE[lines[0]["protocol"]]
        again = [None if line.get("error") else parse_yes_no(line["raw"], other) for line in lines]
        figures = yes_no_group("", lines)
        figures |= {"images_all_right": all_right_figure(lines, [line["cluster"] for line in lines])}
        figures |= yes_no_group(f"{other}_rule_", lines, again, only=("accuracy", "f1", "yes_ratio", "unparsed"))
        groups = [name for name in SETS if any(line["group"] == name for line in lines)]
        for name in groups:
            figures |= yes_no_group(f"{name}_", [line for line in lines if line["group"] == name])
        if len(groups) > 1:
            figures["mean_f1"] = f1_over_groups(lines)
        return figures

    def notes(self, loaded: Loaded) -> list[str]:
        """Say which file each set is of."""
        counts = {name: sum(sample.group == name for sample in loaded.samples) for name in SETS}
        return [f"{name}: {SIZES.get(count, f'{count} questions')}" for name, count in counts.items() if count]


def _official(name: str, folders: ImageFolders, number: int, row: Any) -> Sample:
    image = text_of(row["image"])
    return Sample(
        f"{name}/{number}",
        (ImageSource(image, folders.find(image)),),
        text_of(row["text"]),
        _label(row["label"]),
        cluster=image,
        group=name,
        about={"question_id": row.get("question_id")},
    )


def _label(value: Any) -> str:
    label = text_of(value).lower()
    if label not in ("yes", "no"):
        raise ValueError(f"a label is yes or no, got {value!r:.40}")
    return label


def _from_rows(rows: Iterable[dict[str, Any]]) -> list[Sample]:
    numbers = dict.fromkeys(SETS, 0)

    def sample(number: int, row: Any) -> Sample:
        name = str(row.get("category") or "random")
        numbers[name] += 1
        image = str(row.get("image_source") or f"row {number}")
        return Sample(
            f"{name}/{numbers[name]}",
            (ImageSource(image, row["image"]),),
            text_of(row["question"]),
            _label(row["answer"]),
            cluster=image,
            group=name,
            about={"question_id": row.get("question_id")},
        )

    return make_samples(rows, sample, "row", SETS[0])
