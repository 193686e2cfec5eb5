# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Build POPE of any instance annotation in COCO's form: is a class of objects in an image or not?

    python recipes/build_pope.py --instances annotations/instances_val2014.json --out pope
    python recipes/evaluate.py --model MODEL --benchmarks pope --data pope

Of `--num` images with at least `--objects` classes each, asked are so many classes that are there and as many that are
not: any (random), those that the most images have (popular), those that most often lie beside what is there
(adversarial). Writes `coco_pope_{random,popular,adversarial}.json`, JSON lines as the official files have them, and
`header.json` with the annotation's SHA-256, the seed and the counts. Images stay where they are: keep them in
`val2014/` or `images/` beside the file, or one or two folders above.
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from recipes.evaluation.benchmarks.files import read_json
from recipes.evaluation.benchmarks.pope import SETS
from recipes.evaluation.predictions import digest
from recipes.whole_files import write_whole


@dataclass
class BuildArguments:
    """Options of `recipes/build_pope.py`."""

    instances: str = field(
        default="", metadata={"help": "Annotations in COCO's form: images, annotations, categories."}
    )
    out: str = field(default="outputs/pope", metadata={"help": "Folder for the three files."})
    num: int = field(default=500, metadata={"help": "Images to ask about, at most."})
    objects: int = field(default=3, metadata={"help": "Classes asked that are there, and as many that are not."})
    seed: int = field(default=0, metadata={"help": "Seed of the images and classes drawn."})


def classes_of_images(instances: dict[str, Any]) -> dict[str, set[str]]:
    """Return the names of the classes in each image, by file name; crowds count. Annotations of unknown images or classes
    are left out."""
    names = {row["id"]: row["name"] for row in instances["categories"]}
    files = {row["id"]: row["file_name"] for row in instances["images"]}
    found: dict[str, set[str]] = {file: set() for file in files.values()}
    for row in instances["annotations"]:
        if row["image_id"] in files and row["category_id"] in names:
            found[files[row["image_id"]]].add(names[row["category_id"]])
    return found


def absent_classes(
    kind: str, there: list[str], absent: list[str], frequent: Counter[str], beside: dict[str, Counter[str]]
) -> list[str]:
    """Return a class that is not there for each one that is, each once.

    Args:
        kind: a name of `SETS`.
        absent: in random order, which decides between equals.
        frequent: how many images have a class.
        beside: of each class, how many of its images have another.
    """
    chosen: list[str] = []
    for name in there:
        left = [one for one in absent if one not in chosen]
        if kind == "popular":
            left.sort(key=lambda one: -frequent[one])
        elif kind == "adversarial":
            left.sort(key=lambda one, name=name: -beside[name][one])  # type: ignore[misc]
        chosen.append(left[0])
    return chosen


def question(name: str) -> str:
    """Return POPE's question about a class."""
    return f"Is there {'an' if name[0].lower() in 'aeiou' else 'a'} {name} in the image?"


def main(arguments: BuildArguments) -> dict[str, Any]:
    """Build and write the files; return their header.

    Raises:
        ValueError: the annotation is none of COCO's form, or no image has enough classes.
    """
    file = Path(arguments.instances)
    if not file.is_file():
        raise ValueError(f"No annotation at {str(file)!r}: give --instances FILE in COCO's form.")
    try:
        classes = classes_of_images(read_json(file))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not in COCO's form: expected images, annotations and categories.") from error
    every = sorted(set().union(*classes.values()))
    number = arguments.objects
    usable = [image for image, names in sorted(classes.items()) if number <= len(names) <= len(every) - number]
    if not usable:
        raise ValueError(
            f"No image of {file} has {number} classes of {len(every)} and lacks as many. Give fewer --objects."
        )
    draw = random.Random(arguments.seed)
    images = draw.sample(usable, min(arguments.num, len(usable)))
    frequent = Counter(name for names in classes.values() for name in names)
    beside = {name: Counter(o for names in classes.values() if name in names for o in names) for name in every}
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SETS}
    for image in images:
        there = draw.sample(sorted(classes[image]), number)
        absent = draw.sample([name for name in every if name not in classes[image]], len(every) - len(classes[image]))
        for kind in SETS:
            for yes, no in zip(there, absent_classes(kind, there, absent, frequent, beside), strict=True):
                for name, label in ((yes, "yes"), (no, "no")):
                    asked = {"image": image, "text": question(name), "label": label}
                    rows[kind].append({"question_id": len(rows[kind]) + 1} | asked)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for kind, lines in rows.items():
        write_whole(out / f"coco_pope_{kind}.json", "".join(json.dumps(line) + "\n" for line in lines))
    header = {"options": asdict(arguments), "sha256": digest(file), "images": len(images), "classes": len(every)}
    header |= {"questions": {kind: len(lines) for kind, lines in rows.items()}}
    write_whole(out / "header.json", json.dumps(header, indent=1))
    print(f"{len(images)} images, {len(rows['random'])} questions a set: {out}")
    return header


if __name__ == "__main__":
    main(*TrlParser(BuildArguments, allow_abbrev=False).parse_args_and_config())
