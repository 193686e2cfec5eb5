# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""COCO-style region masks -> dialogues about marked regions.

Files: data_and_evaluation.md section 2.8: COCO instances (`instances_*.json`), RefCOCO and RefCOCO+ with masks
(`*refcoco*_with_mask.json`), Visual Genome with masks (`vg_*_with_mask.json`), PartImageNet, Pascal-Part.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.data.faults import BadSample, LeftOut, Skip
from recipes.data.readers.files import RowReader, load_json, same_id
from recipes.data.readers.masks import decode_segmentation
from recipes.data.samples import IMAGE, content, dialogue
from recipes.prompts import REGION_INSTRUCTIONS, REGION_REQUESTS

MAX_REGIONS = 15


class RegionReader(RowReader):
    """Images with masked regions and a name, expression or phrase for each: one round per region.

    The first turn holds the whole image and an instruction; each turn holds the image again, with the mask of its
    region. At most `MAX_REGIONS` regions of an image, in random order. Crowds (`iscrowd`) are left out.
    """

    image_folders = (
        *("", "train2017", "train2014", "val2017", "val2014", "images", "VG_100K", "VG_100K_2", "train", "JPEGImages"),
        *("coco/train2017", "coco/train2014", "vg/VG_100K", "vg/VG_100K_2"),
    )

    def rows(self, shard: Path) -> list[tuple[str, Any]]:
        """Return one row per image that has annotations."""
        file = load_json(shard)
        given = [row for row in file.get("categories", ()) if isinstance(row, dict)]
        shared = {
            "kind": region_kind(shard.name),
            "categories": {same_id(row["id"]): row["name"] for row in given if {"id", "name"} <= row.keys()},
        }
        regions = self._regions_by_image(shard, file["annotations"])
        found, known = [], set()
        for index, row in enumerate(file["images"]):
            number = same_id(row.get("id")) if isinstance(row, dict) else None
            known.add(number)
            if number is not None and number not in regions:
                self.leave_out(shard, "image without annotations")
                continue
            name = f"row {index}" if number is None else number  # without an id: `build` tells what is wrong
            found.append((name, {"image": row, "regions": regions.get(number, []), **shared}))
        if strange := sum(len(some) for number, some in regions.items() if number not in known):
            self.leave_out(shard, "annotation of an image that the file does not list", strange)
        return found

    def _regions_by_image(self, shard: Path, annotations: list[Any]) -> dict[Any, list[dict[str, Any]]]:
        regions: dict[Any, list[dict[str, Any]]] = {}
        for row in annotations:
            number = same_id(row.get("image_id")) if isinstance(row, dict) else None
            if number is not None:
                regions.setdefault(number, []).append(row)
            else:
                self.leave_out(shard, "annotation without image_id")
        return regions

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue."""
        about, names = row["image"], row["categories"]
        regions = [region for region in row["regions"] if not region.get("iscrowd")]
        if row["regions"] and not regions:
            raise LeftOut("image with crowds only")
        rng.shuffle(regions)
        image = self.image(folder, about["file_name"], as_stored=True)
        check_size(image, about, key)
        masks, answers = [], []
        for region in regions[:MAX_REGIONS]:
            name = f"{key}/{region['id']}"
            if (mask := region_mask(region["segmentation"], image, name, skip)) is None:
                continue
            said = region.get("caption") or about.get("caption") or names[same_id(region["category_id"])]
            answer = self.clean(said.replace(":", " ") if row["kind"] == "part" else said)
            if not answer:
                skip("region without text", name)
                continue
            masks.append(mask)
            answers.append(answer)
        if not masks:
            raise BadSample("image without a usable region", key)
        instruction = REGION_INSTRUCTIONS[row["kind"]]
        if row["kind"] == "part":
            instruction = instruction.format(
                classes=", ".join(sorted(self.clean(n.replace(":", " ")) for n in names.values()))
            )
        first = (IMAGE, f" {instruction} ")
        rounds = []
        for number, answer in enumerate(answers):
            request = f" {rng.choice(REGION_REQUESTS)}" if row["kind"] == "phrases" else ""
            rounds.append((content(*(first if number == 0 else ()), IMAGE, request), answer))
        return region_sample(key, dialogue(*rounds), image, masks)


def region_kind(file_name: str) -> str:
    """Return the kind of data that the file's name tells, a key of `REGION_INSTRUCTIONS`."""
    name = file_name.lower()
    if "refcoco" in name:
        return "refcoco+" if any(mark in name for mark in ("refcoco+", "refcocop", "refcoco_plus")) else "refcoco"
    if name.startswith("vg"):
        return "phrases"
    return "part" if "part" in name else "category"


def region_sample(
    key: str, messages: list[dict[str, Any]], image: Image.Image, masks: list[np.ndarray | None]
) -> dict[str, Any]:
    """Return a sample of the whole image, then the same image once for each mask."""
    return {
        "messages": messages,
        "images": [image] * (1 + len(masks)),
        "region_masks": [None, *masks],
        "mode": "image_to_text",
        "id": key,
    }


def region_mask(segmentation: Any, image: Image.Image, name: str, skip: Skip) -> np.ndarray | None:
    """Return a mask, (H, W) bool, or None (noted by `skip`) if it is broken, empty or of another size than its image."""
    try:
        mask = decode_segmentation(segmentation, image.height, image.width)
    except (ValueError, KeyError, TypeError, OverflowError):
        skip("broken mask", name)
        return None
    if not mask.any():
        skip("empty mask", name)
        return None
    return mask


def check_size(image: Image.Image, about: dict[str, Any] | None, key: str) -> None:
    """Refuse an image that was resized after its boxes and masks were drawn. Annotations without a size pass."""
    about = about or {}
    for name, size in (("width", image.width), ("height", image.height)):
        if about.get(name) is not None and about[name] != size:
            raise BadSample("image of another size than its annotations say", key)
