# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""RobustVQA: what is the main object of an image that a judge got wrong? Its class against what the judge took it for.

File: `robustvqa_test.json` as recipes/build_robustvqa.py writes it, {set: [{file_name, gt_caption, error_caption}]}. Of
each item two yes/no questions (the released form under the protocol "deem", spelling included) and one between the two
classes, in both orders. Where `imagenet_class_index.json` lies beside the file, classes are compared with the paths'.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
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
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.benchmarks.shares import (
    all_right_figure,
    mean_score,
    share_figure,
    unparsed_share,
    yes_no_group,
)
from recipes.evaluation.scoring.vqa import extract_answer
from recipes.evaluation.scoring.yes_no import parse_yes_no
from recipes.evaluation.sources import DataSource, ImageFolders

RELEASED_QUESTION = "Is {name} the main object in this image? Please anwser yes or no"
CLEAN_QUESTION = "Is {name} the main object in this image?"
CHOICE = "What is the main object in this image, {first} or {second}?"
CHOICE_ENDING = "\nAnswer with one of the two names."
KINDS = ("yes", "no", "right first", "wrong first")


class RobustVqa(Benchmark):
    """See the module."""

    name = "robustvqa"

    def load(self, source: DataSource) -> Loaded:
        """Read all sets of the file."""
        file = source.need("robustvqa_test.json", "robustvqa*.json")
        sets = {name: rows for name, rows in read_json(file).items() if isinstance(rows, list)}
        folders = ImageFolders(file.parent, "", "images")
        index = _class_index(file.parent / "imagenet_class_index.json")
        samples = []
        for name, rows in sets.items():
            asked = [(kind, row) for row in rows for kind in KINDS]
            samples += make_samples(asked, partial(_sample, name, folders, index), name, name, kind="yes", item=None)
        return Loaded(samples, {file: sum(map(len, sets.values()))})

    def request(self, sample: Sample, protocol: str) -> Request:
        """The released words, or clean ones with spaces in the classes' names."""
        first, second = sample.about["names"] if protocol == "deem" else map(_spaced, sample.about["names"])
        if sample.about["kind"] in ("yes", "no"):
            form = RELEASED_QUESTION if protocol == "deem" else CLEAN_QUESTION
            return question_request(form.format(name=first), protocol, " ")
        return question_request(CHOICE.format(first=first, second=second), protocol, " ", CHOICE_ENDING)

    def parse(self, raw: str, line: Line) -> str | None:
        """Yes or no; of a choice the one name that is said."""
        if line["about"]["kind"] in ("yes", "no"):
            return parse_yes_no(raw, "deem" if line["protocol"] == "deem" else "word")
        return named(extract_answer(raw) if line["protocol"] == "deem" else raw, line["about"]["names"])

    def score(self, parsed: str | None, line: Line) -> float:
        """1 for the truth."""
        return float(parsed is not None and parsed == line["truth"])

    def figures(self, lines: Sequence[Line]) -> Figures:
        """All items, and each set."""
        figures = _of_items("", lines)
        sets = sorted({line["group"] for line in lines})
        for name in sets if len(sets) > 1 else ():
            figures |= _of_items(f"{name}_", [line for line in lines if line["group"] == name])
        return figures

    def notes(self, loaded: Loaded) -> list[str]:
        """Say how many items name another class than their path."""
        checked = [sample.about["path_fits"] for sample in loaded.samples if sample.about.get("kind") == "yes"]
        known = [fits for fits in checked if fits is not None]
        wrong = len(known) - sum(known)
        return [f"labels: {wrong} of {len(known)} items name another class than their path"] if known else []


def _of_items(prefix: str, lines: Sequence[Line]) -> Figures:
    asked = [line for line in lines if line["about"]["kind"] in ("yes", "no")]
    chosen = [line for line in lines if line["about"]["kind"] not in ("yes", "no")]
    figures = yes_no_group(prefix, asked)
    figures[f"{prefix}item_accuracy"] = all_right_figure(asked, [line["cluster"] for line in asked], 0.25)
    if chosen:
        figures[f"{prefix}choice_accuracy"] = mean_score(chosen, 0.5)
        figures[f"{prefix}choice_item_accuracy"] = all_right_figure(chosen, [line["cluster"] for line in chosen], 0.25)
        figures[f"{prefix}choice_unparsed"] = unparsed_share(chosen)
        first = [line["parsed"] is not None and line["parsed"] == line["about"]["names"][0] for line in chosen]
        figures[f"{prefix}choice_first_ratio"] = share_figure(first, [line["cluster"] for line in chosen], 0.5)
    return figures


def named(text: str, names: Sequence[str]) -> str | None:
    """Return the one of two names that a text says, None for none or both; a name within the other counts once."""
    said = _spaced(text).lower()
    found = []
    for name in sorted(names, key=len, reverse=True):
        said, number = re.subn(rf"(?<!\w){re.escape(_spaced(name).lower())}(?!\w)", " ", said)
        found += [name] * (number > 0)
    return found[0] if len(found) == 1 else None


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _sample(name: str, folders: ImageFolders, index: dict[str, str], number: int, row: Any) -> Sample:
    kind, item = row
    image, right, wrong = (text_of(item[key]) for key in ("file_name", "gt_caption", "error_caption"))
    names = {
        "yes": (right, wrong),
        "no": (wrong, right),
        "right first": (right, wrong),
        "wrong first": (wrong, right),
    }[kind]
    cluster = f"{name}/{(number - 1) // len(KINDS) + 1}"
    return Sample(
        f"{cluster}/{kind.replace(' ', '_')}",
        (ImageSource(image, folders.find(image)),),
        f"{kind}: {', '.join(names)}",
        kind if kind in ("yes", "no") else right,
        cluster=cluster,
        group=name,
        about={"kind": kind, "names": list(names), "path_fits": _fits(image, right, index)},
    )


def _class_index(file: Path) -> dict[str, str]:
    """Return the names of classes by WordNet id and by number, as Keras' file has them; nothing without it."""
    if not file.is_file():
        return {}
    rows = read_json(file)
    return {row[0]: row[1] for row in rows.values()} | {str(number): row[1] for number, row in rows.items()}


def _fits(image: str, label: str, index: dict[str, str]) -> bool | None:
    known = [index[part] for part in PurePosixPath(image).parts[:-1] if part in index]
    return _spaced(known[-1]).lower() == _spaced(label).lower() if known else None
