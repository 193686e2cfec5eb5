# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write the formats of the grounding and region stages: boxes, masks and dialogues about marked objects."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recipes.synthetic.scenes import Scene, SceneObject, World
from recipes.synthetic.vocabulary import KINDS, pick
from recipes.synthetic.writers.files import numbered_scenes, write_coco_images, write_images, write_lines
from recipes.synthetic.writers.objects import (
    bounding_box,
    categories,
    expression,
    polygons,
    segmentation,
    visual_genome_name,
)

# ---- boxes ----


def write_refcoco(folder: str | Path, world: World, num: int, start: int = 0, split_by: str = "unc") -> None:
    """Write RefCOCO (`split_by` unc) or RefCOCOg (umd).

    `refs(<split_by>).p` (a pickle), `instances.json` and `train2014/COCO_train2014_%012d.jpg`. Every object is referred
    to in two sentences; every tenth ref is of the split val.
    """
    folder, refs, annotations, images = Path(folder), [], [], []
    for image_id, name, scene in write_coco_images(folder, numbered_scenes(world, num, start, "refcoco"), "train2014"):
        images.append({"id": image_id, "file_name": name, "width": world.size, "height": world.size})
        for thing in scene.objects:
            number = len(refs) + 1
            about = {"image_id": image_id, "category_id": KINDS.index(thing.kind) + 1}
            annotations.append(about | {"id": number, "iscrowd": 0, "area": int(thing.mask.sum())})
            annotations[-1] |= {"bbox": bounding_box(thing.mask), "segmentation": segmentation(thing.mask, number)}
            sentences = [expression(thing), f"{thing.color} {thing.kind}"]
            refs.append(
                about
                | {"ref_id": number, "ann_id": number, "split": "val" if number % 10 == 0 else "train"}
                | {"file_name": f"{name[:-4]}_{number}.jpg", "sent_ids": [2 * number, 2 * number + 1]}
                | {
                    "sentences": [
                        {"sent_id": 2 * number + i, "raw": raw, "sent": raw.lower(), "tokens": raw.lower().split()}
                        for i, raw in enumerate(sentences)
                    ]
                }
            )
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    instances = {"images": images, "annotations": annotations, "categories": categories(KINDS)}
    (folder / "instances.json").write_text(json.dumps(instances))


def write_vg(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write Visual Genome: `region_descriptions.json` and images `VG_100K/<id>.jpg`, every second `VG_100K_2/<id>.jpg`."""
    folder, rows, region_id = Path(folder), [], 0
    for image_id, scene in write_images(folder, world, num, start, "vg", visual_genome_name):
        rows.append({"id": image_id, "regions": []})
        for thing in scene.objects:
            region_id += 1
            x, y, width, height = bounding_box(thing.mask)
            about = {"region_id": region_id, "image_id": image_id, "phrase": expression(thing)}
            rows[-1]["regions"].append(about | {"x": x, "y": y, "width": width, "height": height})
    (folder / "region_descriptions.json").write_text(json.dumps(rows))


# ---- masks ----


def write_coco_instances(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write COCO's `annotations/instances_train2017.json` and `train2017/%012d.jpg`; the category is the kind of object."""
    _write_masks(
        Path(folder),
        "annotations/instances_train2017.json",
        list(write_images(Path(folder), world, num, start, "coco", lambda i: f"train2017/{i:012d}.jpg")),
        lambda thing: [(thing.kind, thing.mask)],
    )


def write_object_halves(folder: str | Path, world: World, num: int, start: int = 0, joint: str = " ") -> None:
    """Write PartImageNet or Pascal-Part, with each object cut into an upper and a lower half.

    With a space as `joint` the file is PartImageNet's `partImagenet_train_format.json`, with a colon Pascal-Part's
    `pascalpart_train.json`. Categories are "<kind><joint>top" and "<kind><joint>bottom".
    """

    def halves(thing: SceneObject) -> list[tuple[str, np.ndarray]]:
        upper = np.arange(world.size)[:, None] < thing.center[1] * world.size
        cut = {"top": thing.mask & upper, "bottom": thing.mask & ~upper}
        return [(f"{thing.kind}{joint}{name}", half) for name, half in cut.items() if half.any()]

    place, name = (
        ("train", "partImagenet_train_format.json") if joint == " " else ("JPEGImages", "pascalpart_train.json")
    )
    images = write_images(Path(folder), world, num, start, "parts", lambda i: f"{place}/{i:06d}.jpg")
    _write_masks(Path(folder), name, list(images), halves)


def write_captioned_masks(folder: str | Path, world: World, num: int, start: int = 0, kind: str = "refcoco") -> None:
    """Write Osprey's files of captioned masks.

    `finetune_refcoco_train_with_mask.json` or `finetune_refcoco+_train_with_mask.json` list an image, with its `caption`,
    once per expression; with kind "vg", `vg_train_with_mask.json` has the captions in the annotations.
    """
    folder = Path(folder)
    name_of: Callable[[int], str] = (
        visual_genome_name if kind == "vg" else lambda i: f"train2014/COCO_train2014_{i:012d}.jpg"
    )
    images, annotations = [], []
    for image_id, scene in write_images(folder, world, num, start, kind, name_of):
        file_name = Path(name_of(image_id)).name
        size = {"height": world.size, "width": world.size}
        for thing in scene.objects:
            number = len(annotations) + 1
            said = f"{thing.color} {thing.kind}" if kind == "refcoco+" else expression(thing)
            if kind == "vg":
                about, caption = image_id, {"caption": said}
                if thing.number == 0:
                    images.append({"id": image_id, "file_name": file_name} | size)
            else:
                about, caption = number, {}
                images.append({"id": number, "file_name": file_name, "caption": said} | size)
            mask = {"bbox": bounding_box(thing.mask), "segmentation": segmentation(thing.mask, number), "iscrowd": 0}
            annotations.append({"id": number, "image_id": about, "category_id": 1, **mask, **caption})
    name = "vg_train_with_mask.json" if kind == "vg" else f"finetune_{kind}_train_with_mask.json"
    file = {"images": images, "annotations": annotations, "categories": categories(["object"])}
    (folder / name).write_text(json.dumps(file))


def _write_masks(
    folder: Path,
    file_name: str,
    scenes: list[tuple[int, Scene]],
    regions: Callable[[SceneObject], list[tuple[str, np.ndarray]]],
) -> None:
    """Write a file in COCO's form: one annotation per region, its category by name."""
    images, annotations = [], []
    found = {name for _, scene in scenes for thing in scene.objects for name, _ in regions(thing)}
    numbered = categories(sorted(found))
    number_of = {row["name"]: row["id"] for row in numbered}
    truth = {
        row["image_id"]: row["file"] for row in map(json.loads, (folder / "truth.jsonl").read_text().splitlines())
    }
    for image_id, scene in scenes:
        size = {"height": scene.world.size, "width": scene.world.size}
        images.append({"id": image_id, "file_name": Path(truth[image_id]).name} | size)
        for thing in scene.objects:
            for name, mask in regions(thing):
                number = len(annotations) + 1
                row = {"id": number, "image_id": image_id, "category_id": number_of[name], "iscrowd": 0}
                row |= {"bbox": bounding_box(mask), "area": int(mask.sum())}
                annotations.append(row | {"segmentation": segmentation(mask, number)})
    (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
    file = {"images": images, "annotations": annotations, "categories": numbered}
    (folder / file_name).write_text(json.dumps(file))


# ---- dialogues about several regions ----


def write_vcr(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write VCR: `train.jsonl`, `vcr1images/<name>.jpg` and `vcr1images/<name>.json` (boxes, segms, names, width, height)."""
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "vcr", lambda i: f"vcr1images/scene_{i:05d}.jpg"):
        name = f"scene_{image_id:05d}"
        corners = [[x, y, x + w, y + h, 1.0] for x, y, w, h in (bounding_box(thing.mask) for thing in scene.objects)]
        outlines = [[np.reshape(p, (-1, 2)).tolist() for p in polygons(mask)] for mask in scene.masks]
        kinds = [thing.kind for thing in scene.objects]
        metadata = {"boxes": corners, "segms": outlines, "names": kinds, "width": world.size, "height": world.size}
        (folder / "vcr1images" / f"{name}.json").write_text(json.dumps(metadata))
        number = int(world.rng(scene.index, "vcr").integers(len(kinds))) + 1
        thing = scene.objects[number - 1]
        said = {
            "question_orig": f"What color is {number}?",
            "answer_orig": f"{number} is {thing.color}.",
            "rationale_orig": f"{number} is {thing.color}, as can be seen at {thing.position}.",
        }
        files = {"img_fn": f"{name}.jpg", "metadata_fn": f"{name}.json"}
        rows.append(said | files | {"objects": kinds, "annot_id": f"train-{image_id - 1}"})
    write_lines(folder / "train.jsonl", rows)


def write_osprey(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write Osprey-724K: conversations, descriptions and images `train2017/%012d.jpg`.

    Conversations stand in `osprey_conversation.json`, `osprey_short_form.json`, `osprey_part_level.json` and
    `osprey_lvis_positive_negative.json`, descriptions in `osprey_detail_description.json`.
    """
    folder = Path(folder)
    files: dict[str, list[dict[str, Any]]] = {
        name: []
        for name in ("conversation", "short_form", "part_level", "lvis_positive_negative", "detail_description")
    }
    for image_id, scene in write_images(folder, world, num, start, "osprey", lambda i: f"train2017/{i:012d}.jpg"):
        about = {"file_name": f"{image_id:012d}.jpg", "height": world.size, "width": world.size}
        about["annotation"] = [{"segmentation": segmentation(mask, i)} for i, mask in enumerate(scene.masks)]
        rng = world.rng(scene.index, "osprey")
        number = int(rng.integers(len(scene.objects)))
        thing, region = scene.objects[number], f"<region{number + 1}>"
        other = pick(rng, [kind for kind in KINDS if kind != thing.kind])
        asked = {
            "conversation": [(f"What color is {region}?", f"It is {thing.color}."), ("And its size?", thing.size)],
            "short_form": [(f"What is {region}? Answer in one word.", thing.kind)],
            "part_level": [(f"What shape has {region}?", f"The shape of {region} is a {thing.kind}.")],
            "lvis_positive_negative": [(f"Is {region} a {other}?", "No."), (f"Is {region} a {thing.kind}?", "Yes.")],
        }
        for name, rounds in asked.items():
            turns = [
                {"from": who, "value": value}
                for pair in rounds
                for who, value in zip(("human", "gpt"), pair, strict=True)
            ]
            files[name].append(about | {"conversations": turns})
        told = [f"<region{i}>: This is {expression(thing)}." for i, thing in enumerate(scene.objects, start=1)]
        files["detail_description"].append(about | {"description": told})
    for name, rows in files.items():
        (folder / f"osprey_{name}.json").write_text(json.dumps(rows))
