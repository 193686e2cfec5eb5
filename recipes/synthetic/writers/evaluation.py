# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write the files of benchmarks that ask whether something is there: POPE and RobustVQA."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import COLORS, KINDS, UNSEEN, pick
from recipes.synthetic.writers.files import jpeg, numbered_scenes, write_coco_images, write_lines


def write_pope(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write POPE: `coco_pope_{random,popular,adversarial}.json` and images `val2014/*.jpg`.

    The files are JSON lines of question_id, image, text, label. An object is a color with a kind. Asked are, per image, up
    to three that are there and as many that are not: any (random), those most frequent in these images (popular), those
    that share the color or kind of an object that is there (adversarial).
    """
    folder = Path(folder)
    scenes = list(write_coco_images(folder, numbered_scenes(world, num, start, "pope"), "val2014"))
    frequent = Counter((thing.color, thing.kind) for _, _, scene in scenes for thing in scene.objects)
    every = [(color, kind) for color in COLORS for kind in KINDS]
    for sampling in ("random", "popular", "adversarial"):
        rows = []
        for _, name, scene in scenes:
            rng = world.rng(scene.index, f"pope {sampling}")
            there = [(thing.color, thing.kind) for thing in scene.objects]
            absent = [pair for pair in (every[i] for i in rng.permutation(len(every))) if pair not in there]
            if sampling == "popular":
                absent.sort(key=lambda pair: -frequent[pair])
            if sampling == "adversarial":
                absent.sort(key=lambda pair: not any(pair[0] == c or pair[1] == k for c, k in there))
            for yes, no in zip(there[:3], absent, strict=False):
                for (color, kind), label in ((yes, "yes"), (no, "no")):
                    text = f"Is there a {color} {kind} in the image?"
                    rows.append({"question_id": len(rows) + 1, "image": name, "text": text, "label": label})
        write_lines(folder / f"coco_pope_{sampling}.json", rows)


def write_robustvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write RobustVQA: `robustvqa_test.json` and the images it names, `num` in all.

    The file is {imagenet_a, imagenet_r, imagenet_v2: [{file_name, gt_caption, error_caption}]}. `imagenet_v2` holds new
    images of `world`, the other two its shifted variant: `imagenet_a` those with combinations of kind and color that the
    unshifted world never shows. The error class is the kind of another object in the image where there is one, else any
    other kind.
    """
    folder, truth = Path(folder), []
    asked: dict[str, list[dict[str, str]]] = {"imagenet_a": [], "imagenet_r": [], "imagenet_v2": []}
    shifted = replace(world, shifted=True)
    for number, plain in enumerate(numbered_scenes(world, num, start, "robustvqa")):
        scene = plain if number % 3 == 0 else shifted.scene(plain.index)
        kind, rng = scene.main.kind, scene.world.rng(scene.index, "error class")
        unseen = (kind, scene.main.color) in UNSEEN
        name = "imagenet_v2" if number % 3 == 0 else "imagenet_a" if unseen else "imagenet_r"
        others = [thing.kind for thing in scene.objects if thing.kind != kind] or [k for k in KINDS if k != kind]
        label = KINDS.index(kind)
        place = f"imagenetv2/{label}" if name == "imagenet_v2" else f"{name.replace('_', '-')}/n{label + 1:08d}"
        file_name = f"{place}/{scene.index:08d}.{'jpeg' if name == 'imagenet_v2' else 'jpg'}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_bytes(jpeg(scene.image))
        asked[name].append({"file_name": file_name, "gt_caption": kind, "error_caption": pick(rng, others)})
        truth.append(scene.truth(file=file_name, set=name))
    (folder / "robustvqa_test.json").write_text(json.dumps(asked))
    write_lines(folder / "truth.jsonl", truth)
