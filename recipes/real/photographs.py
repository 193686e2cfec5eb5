# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Labelled photographs in tars: their classes by number, and questions about them to train on."""

import json
import random
import tarfile
from collections.abc import Collection
from pathlib import Path

from recipes.evaluation.benchmarks.robustvqa import CLEAN_QUESTION
from recipes.evaluation.building import LabelledImage, labelled_images
from recipes.whole_files import write_whole

EXPECTED = (
    "tars with, per photograph, NAME.jpg and NAME.json of `class_id` (its number in ImageNet, 0 to 999) and `label`"
)
OBJECT_QUESTION = "What is the main object in this image?"


def class_names(folder: Path) -> dict[int, str]:
    """Return the names of the photographs' classes by their number.

    Raises:
        ValueError: the folder holds no labelled photographs.
    """
    names: dict[int, str] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".json"):
                    about = json.loads(archive.extractfile(member).read())  # type: ignore[union-attr]
                    try:
                        names[int(about["class_id"])] = str(about["label"])
                    except (KeyError, TypeError, ValueError) as error:
                        raise ValueError(f"{tar.name}/{member.name} is {about!r:.80}; expected {EXPECTED}.") from error
    if not names:
        raise ValueError(f"No labelled photographs in {folder}: expected {EXPECTED}. Give --photos such a folder.")
    return names


def write_questions(photos: Path, held_out: Collection[str], folder: Path, seed: int) -> int:
    """Write questions to train on, `questions.jsonl` and images: what each photograph shows, and whether it is that, or
    another class.

    Args:
        held_out: names of photographs (`LabelledImage.file_name`) that are left out.
        folder: gets the files.
        seed: of the other classes.

    Returns:
        The number of questions.
    """
    images = [image for image in labelled_images(photos, {}) if image.file_name not in held_out]
    labels = sorted({image.label for image in images})
    rng, rows = random.Random(seed), []
    for image in images:
        name = f"images/{image.file_name}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image.read())
        rows += [{"image": name, "question": asked, "answer": said} for asked, said in _asked(image, labels, rng)]
    write_whole(folder / "questions.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    return len(rows)


def _asked(image: LabelledImage, labels: list[str], rng: random.Random) -> list[tuple[str, str]]:
    other = rng.choice([label for label in labels if label != image.label] or ["nothing"])
    return [
        (OBJECT_QUESTION, image.label),
        (CLEAN_QUESTION.format(name=image.label), "yes"),
        (CLEAN_QUESTION.format(name=other), "no"),
    ]
