# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write the files of benchmarks that are for evaluation alone, in their official layouts."""

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT, KINDS, pick
from recipes.synthetic.writers.captions import write_narratives
from recipes.synthetic.writers.files import (
    jpeg,
    numbered_scenes,
    ten_answers,
    write_coco_images,
    write_images,
    write_lines,
)
from recipes.synthetic.writers.image_benchmarks import write_mmvp_vlm, write_visdial
from recipes.synthetic.writers.objects import bounding_box, expression, segmentation

CAPTION_DETAILS = ("coarse", "medium", "full")


def write_mmvp(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write MMVP: `Questions.csv` and `MMVP Images/<index>.jpg`, in pairs whose main objects differ in color.

    Both images of a pair are asked the same; one of `num` images is left out where there is none that fits.
    """
    folder, rows, truth, first = Path(folder), [], [], None
    (folder / "MMVP Images").mkdir(parents=True, exist_ok=True)
    for scene in numbered_scenes(world, num, start, "mmvp"):
        if first is None:
            first = scene
            continue
        if first.main.color == scene.main.color:
            continue
        options = f"(a) {first.main.color} (b) {scene.main.color}"
        for one, answer in ((first, "(a)"), (scene, "(b)")):
            index = len(rows) + 1
            (folder / "MMVP Images" / f"{index}.jpg").write_bytes(jpeg(one.image))
            truth.append(one.truth(file=f"MMVP Images/{index}.jpg", image_id=index))
            rows.append((index, "What color is the main object?", options, answer))
        first = None
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Index", "Question", "Options", "Correct Answer"), *rows])
    write_lines(folder / "truth.jsonl", truth)


def write_vizwiz(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write VizWiz: `val.json` and `val/VizWiz_val_%08d.jpg`; every fifth question cannot be answered."""
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "vizwiz", "val/VizWiz_val_{:08d}.jpg".format):
        asked = pick(world.rng(scene.index, "vizwiz"), scene.questions())
        answers = ["unanswerable"] * 10 if image_id % 5 == 0 else ten_answers(asked["answer"])
        row: dict[str, Any] = {"image": f"VizWiz_val_{image_id:08d}.jpg", "answerable": int(image_id % 5 > 0)}
        row |= {"question": "What is written here?" if image_id % 5 == 0 else asked["question"]}
        row |= {"answer_type": "unanswerable" if image_id % 5 == 0 else "other"}
        rows.append(row | {"answers": [{"answer": one, "answer_confidence": "yes"} for one in answers]})
    (folder / "val.json").write_text(json.dumps(rows))


def write_easy_vqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write Easy-VQA: `<split>/questions.json` of [question, answer, image id] and `<split>/images/<id>.png`.

    The split is test from `HELD_OUT` on, else train.
    """
    folder, rows, truth = Path(folder) / ("test" if start >= HELD_OUT else "train"), [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image_id, scene in enumerate(numbered_scenes(world, num, start, "easy_vqa")):
        scene.image.save(folder / "images" / f"{image_id}.png")
        truth.append(scene.truth(file=f"{folder.name}/images/{image_id}.png", image_id=image_id))
        other = pick(world.rng(scene.index, "easy_vqa"), [color for color in COLORS if color != scene.main.color])
        rows.append([f"what color is the {scene.main.kind}?", scene.main.color, image_id])
        rows.append([f"is there a {scene.main.color} shape in the image?", "yes", image_id])
        rows.append([f"does the image not contain a {other} shape?", _yes_no(other not in _colors(scene)), image_id])
    (folder / "questions.json").write_text(json.dumps(rows))
    write_lines(folder.parent / "truth.jsonl", truth)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _colors(scene: Scene) -> set[str]:
    return {thing.color for thing in scene.objects}


def write_captioned(folder: str | Path, world: World, num: int, start: int = 0, name: str = "coco") -> None:
    """Write a caption benchmark with several captions an image, in the files that its evaluation reads.

    Args:
        name: "coco" (`annotations/coco_karpathy_test.json`, `annotations/captions_val2014.json`,
            `annotations/instances_val2014.json` with kinds as categories, `val2014/`), "nocaps" (`nocaps_val_4500_captions.json` with
            domains, `validation/`), "flickr30k" (`flickr30k_test1k.json`, `flickr30k-images/`) or "textcaps"
            (`TextCaps_0.1_val.json`, `train_images/`).
    """
    folder = Path(folder)
    name_of = {
        "coco": "val2014/COCO_val2014_{:012d}.jpg",
        "nocaps": "validation/{:016x}.jpg",
        "flickr30k": "flickr30k-images/{}.jpg",
        "textcaps": "train_images/{:016x}.jpg",
    }[name].format
    listed, images, annotations, rows = [], [], [], []
    objects: list[dict[str, Any]] = []
    for number, scene in write_images(folder, world, num, start, name, name_of):
        objects += [{"image_id": number, "category_id": KINDS.index(one.kind) + 1} for one in scene.objects]
        captions = [scene.caption(detail).capitalize() for detail in CAPTION_DETAILS]
        listed.append({"image": name_of(number), "caption": captions})
        images.append({"id": number, "file_name": Path(name_of(number)).name})
        if name == "nocaps":
            images[-1]["domain"] = ("in-domain", "near-domain", "out-domain")[number % 3]
        annotations += [{"id": len(annotations) + i, "image_id": number, "caption": c} for i, c in enumerate(captions)]
        about = {"image_id": f"{number:016x}", "set_name": "val", "reference_strs": captions}
        rows += [about | {"caption_str": caption, "caption_id": len(rows)} for caption in captions]
    file, content = {
        "coco": ("annotations/coco_karpathy_test.json", listed),
        "nocaps": ("nocaps_val_4500_captions.json", {"images": images, "annotations": annotations}),
        "flickr30k": ("flickr30k_test1k.json", {"images": images, "annotations": annotations}),
        "textcaps": ("TextCaps_0.1_val.json", {"data": rows}),
    }[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    if name == "coco":
        kinds = [{"id": number, "name": kind} for number, kind in enumerate(KINDS, start=1)]
        instances = {"images": images, "annotations": objects, "categories": kinds}
        (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
        captioned = json.dumps({"images": images, "annotations": annotations})
        (folder / "annotations" / "captions_val2014.json").write_text(captioned)


def write_referred_boxes(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write RefCOCO's evaluation: `refcoco_val.json` of img_id, bbox (x, y, width, height) and sents, and `train2014/`."""
    folder, rows = Path(folder), []
    for _, name, scene in write_coco_images(folder, numbered_scenes(world, num, start, "boxes"), "train2014"):
        for number, thing in enumerate(scene.objects):
            sentences = [expression(thing), f"{thing.color} {thing.kind}"]
            row = {"img_id": f"{name[:-4]}_{number}", "bbox": bounding_box(thing.mask), "sents": sentences}
            rows.append(row | {"height": world.size, "width": world.size})
    (folder / "refcoco_val.json").write_text(json.dumps(rows))


def write_described_regions(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write RefCOCOg's evaluation: `finetune_refcocog_val_with_mask.json`, an image record with its caption per region."""
    folder, images, annotations = Path(folder), [], []
    for _, name, scene in write_coco_images(folder, numbered_scenes(world, num, start, "regions"), "train2014"):
        for thing in scene.objects:
            number = len(images) + 1
            about = {"file_name": name, "height": world.size, "width": world.size}
            images.append({"id": number, "caption": expression(thing)} | about)
            mask = {"bbox": bounding_box(thing.mask), "segmentation": segmentation(thing.mask, number), "iscrowd": 0}
            annotations.append({"id": number, "image_id": number, "category_id": 1} | mask)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    (folder / "finetune_refcocog_val_with_mask.json").write_text(json.dumps(content))


BENCHMARK_FORMATS = {
    "mmvp": write_mmvp,
    "vizwiz": write_vizwiz,
    "coco_captions": write_captioned,
    "nocaps": partial(write_captioned, name="nocaps"),
    "flickr30k_test": partial(write_captioned, name="flickr30k"),
    "textcaps_val": partial(write_captioned, name="textcaps"),
    "refcoco_grounding": write_referred_boxes,
    "refcocog_region": write_described_regions,
    "ln_coco": partial(write_narratives, split="val2017"),
    "visdial": write_visdial,
    "mmvp_vlm": write_mmvp_vlm,
}
