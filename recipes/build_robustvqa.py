# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Build RobustVQA of labelled images: keep what a judge takes for another class.

    python recipes/build_robustvqa.py --judge openai/clip-vit-large-patch14-336 --rule released \\
        --images imagenet_a=imagenet-a imagenet_r=imagenet-r imagenet_v2=imagenetv2 \\
        --class_names imagenet_class_index.json --out robustvqa/robustvqa_test.json
    python recipes/evaluate.py --model MODEL --benchmarks robustvqa --data robustvqa

A judge is a two-tower model of transformers (CLIP, SigLIP), asked with a prompt per class; an image classifier of
transformers; or `module:function`, a function of the classes' names that returns one from images to names. The released
rule does not normalize text features, squashes images and keeps underscores in names; the clean rule does none of it.
Images lie in sub-folders by WordNet id (ImageNet-A, -R, -Sketch), class number (V2) or name, or in tars with json files.

The header of the file says judge, rule, counts and hashes. Kept images are copied beside it if they do not lie there.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from recipes.evaluation.building import (
    images_digest,
    labelled_images,
    read_class_names,
    write_benchmark,
    wrong_items,
)
from recipes.evaluation.judges import RULES, Judge, load_judge
from recipes.evaluation.predictions import library_versions, model_digests


@dataclass
class BuildArguments:
    """Options of `recipes/build_robustvqa.py`."""

    images: list[str] = field(
        default_factory=list, metadata={"help": "Folders or tars of labelled images, each as SET=PLACE or PLACE."}
    )
    judge: str = field(default="", metadata={"help": "Folder or Hub id of a model, or module:function."})
    out: str = field(default="outputs/robustvqa/robustvqa_test.json", metadata={"help": "The file to write."})
    rule: str = field(default="clean", metadata={"help": "How a two-tower model judges.", "choices": [*RULES]})
    class_names: str | None = field(
        default=None,
        metadata={"help": "imagenet_class_index.json or a text file with a name a line; without it, the images' own."},
    )
    batch_size: int = field(default=50, metadata={"help": "Images at a time."})


def main(arguments: BuildArguments, judge: Judge | None = None) -> dict[str, Any]:
    """Build and write the file; return its header.

    Args:
        judge: instead of the one that the options name.
    """
    if not arguments.images or not (arguments.judge or judge):
        raise ValueError("Nothing to build: give --images SET=FOLDER ... and --judge MODEL.")
    names = read_class_names(arguments.class_names)
    sets = {}
    for given in arguments.images:
        name, _, place = given.rpartition("=")
        sets[name or Path(place).stem.replace("-", "_")] = labelled_images(place, names)
    classes = list(dict.fromkeys(names.values())) or sorted({image.label for rows in sets.values() for image in rows})
    judge = judge or load_judge(arguments.judge, classes, arguments.rule)
    file = Path(arguments.out)
    kept, counts = {}, {}
    for name, images in sets.items():
        kept[name], found = wrong_items(images, judge, arguments.batch_size, file.parent)
        counts[name] = {"images": len(images), "sha256": images_digest(images)} | dict(found)
        print(f"{name}: {found['wrong']} of {len(images)} images are taken for another class; {dict(found)}")
    is_model = ":" not in arguments.judge and arguments.judge
    header = {
        "judge": arguments.judge or repr(judge),
        "judge_files": model_digests(arguments.judge) if is_model else None,
        "rule": arguments.rule,
        "classes": len(classes),
        "sets": counts,
        "libraries": library_versions(),
    }
    write_benchmark(file, header, kept)
    print(f"written: {file}")
    return header


if __name__ == "__main__":
    header = main(*TrlParser(BuildArguments, allow_abbrev=False).parse_args_and_config())
    unread = sum(found["images"] - found.get("right", 0) - found.get("wrong", 0) for found in header["sets"].values())
    sys.exit(1 if unread else 0)
