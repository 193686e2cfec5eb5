# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""RefCOCO, RefCOCO+, RefCOCOg and Visual Genome -> boxes for phrases (grounding) and phrases for boxes (referring).

Files, augmentation and box text: data_and_evaluation.md section 2.7.
"""

import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.files import RowReader, load_json, row_name, same_id
from recipes.data.readers.masks import box_mask, scaled_box
from recipes.data.readers.pickles import load_pickle
from recipes.data.readers.regions import check_size, region_sample
from recipes.data.samples import IMAGE, content, dialogue
from recipes.prompts import GROUNDING_ANSWER, GROUNDING_REQUEST, REFERRING_REQUEST, REFERRING_REQUEST_END

TASKS = ("grounding", "referring")
SCALE = 999  # coordinates in text run from 0 to this
MAX_AREA = 16384  # of Visual Genome's regions, in pixels
# A crop would make these untrue.
_PLACE_WORDS = re.compile(r"\b(top|bottom|left|right|center|middle|above|below|first|second|third)\b", re.IGNORECASE)
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


def box_text(box: Sequence[float], width: int, height: int) -> str:
    """Return a box as text: `(x1,y1)(x2,y2)`, three digits each, in 999ths of the image, truncated."""
    x1, y1, x2, y2 = scaled_box(box, (width, height), (SCALE, SCALE))
    return f"({x1:03d},{y1:03d})({x2:03d},{y2:03d})"


class GroundingReader(RowReader):
    """Phrases that refer to a box in an image.

    Args:
        shards, image_token, reserved: see `AnnotationReader`.
        tasks: `"grounding"` (the box is the answer), `"referring"` (the phrase is); of several one is drawn per sample.
        flip_probability: of mirroring image and box, and exchanging left and right in the phrase.
        crop_probability: of a random crop around the box, if the phrase has no word for a place.

    Raises:
        ValueError: for an unknown task.
    """

    def __init__(
        self,
        shards: list[Path],
        image_token: str = "<image>",
        reserved: tuple[str, ...] = (),
        tasks: Sequence[str] = TASKS,
        flip_probability: float = 0.5,
        crop_probability: float = 0.4,
    ) -> None:
        if not tasks or set(tasks) - set(TASKS):
            raise ValueError(f"Unknown tasks {list(tasks)}: choose from {', '.join(TASKS)}.")
        super().__init__(shards, image_token, reserved)
        self.tasks = tuple(tasks)
        self.flip_probability, self.crop_probability = flip_probability, crop_probability

    def phrase_sample(self, key: str, phrase: str, box: Box, image: Image.Image, rng: random.Random) -> dict[str, Any]:
        """Return one sample of a phrase and its box."""
        x1, y1, x2, y2 = box
        if not (max(x1, 0) < min(x2, image.width) and max(y1, 0) < min(y2, image.height)):
            raise BadSample("empty box", key)  # or one outside of its image
        if not phrase:
            raise BadSample("box without phrase", key)
        if rng.random() < self.flip_probability:
            phrase, box, image = flipped(phrase, box, image)
        if rng.random() < self.crop_probability and not _PLACE_WORDS.search(phrase):
            box, image = cropped(box, image, rng)
        if rng.choice(self.tasks) == "grounding":
            question = GROUNDING_REQUEST.format(phrase=phrase)
            answer = GROUNDING_ANSWER.format(box=box_text(box, *image.size))
            messages = dialogue((content(IMAGE, question), answer))
            return {"messages": messages, "images": [image], "mode": "image_to_text", "id": key}
        mask = box_mask(box, image.height, image.width)
        if not mask.any():
            raise BadSample("empty box", key)
        question = content(IMAGE, REFERRING_REQUEST, IMAGE, REFERRING_REQUEST_END)
        return region_sample(key, dialogue((question, phrase)), image, [mask])


class RefCocoReader(GroundingReader):
    """`refs(unc).p`, `refs(umd).p`, `refs(google).p` (or their JSON, see `pickles`) with `instances.json` beside: one
    sentence of each training ref, drawn at random."""

    image_folders = ("", "train2014", "images", "images/train2014", "coco/train2014", "images/mscoco/images/train2014")

    def rows(self, shard: Path) -> list[tuple[str, Any]]:
        """Return the training refs, each with the box of its annotation."""
        refs = load_json(shard) if shard.suffix == ".json" else load_pickle(shard)
        about = load_json(shard.with_name("instances.json"))
        rows = [row for row in about["annotations"] if isinstance(row, dict)]
        boxes = {same_id(row.get("id")): row.get("bbox") for row in rows}
        images = [row for row in about.get("images", ()) if isinstance(row, dict)]
        sizes = {same_id(row.get("id")): row for row in images}
        found = []
        for index, ref in enumerate(refs):
            if not isinstance(ref, dict):
                found.append((f"row {index}", (ref, (), None)))
            elif ref.get("split", "train") == "train":
                box, size = boxes.get(same_id(ref.get("ann_id"))), sizes.get(same_id(ref.get("image_id")))
                found.append((row_name(ref, "ref_id", index), (ref, box, size)))
            else:
                self.leave_out(shard, "expression outside of the training split")
        return found

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one sample."""
        ref, box, size = row
        if box is None:
            raise BadSample("ref without annotation", key)
        x, y, width, height = (float(value) for value in box)
        corners = tuple(float(int(value)) for value in (x, y, x + width, y + height))
        phrase = self.clean(rng.choice(ref["sentences"])["raw"])
        image = self.image(folder, f"COCO_train2014_{int(ref['image_id']):012d}.jpg", as_stored=True)
        check_size(image, size, key)
        return self.phrase_sample(key, phrase, corners, image, rng)


class VisualGenomeReader(GroundingReader):
    """Visual Genome's `region_descriptions.json`: `[{id, regions: [{region_id, image_id, x, y, width, height, phrase}]}]`;
    regions below `MAX_AREA` pixels."""

    image_folders = ("VG_100K", "VG_100K_2", "vg/VG_100K", "vg/VG_100K_2", "images", "")

    def rows(self, shard: Path) -> list[tuple[str, Any]]:
        """Return one row per small region."""
        found: list[tuple[Any, Any]] = []
        for index, row in enumerate(load_json(shard)):
            regions = row.get("regions") if isinstance(row, dict) else None
            if not isinstance(regions, list):
                found.append((f"row {index}", row))
                continue
            for number, region in enumerate(regions):
                try:
                    small = region["width"] * region["height"] < MAX_AREA
                except (KeyError, TypeError):
                    small = True  # `build` tells what is wrong
                if small:
                    found.append((row_name(region, "region_id", f"{index}.{number}"), region))
                else:
                    self.leave_out(shard, f"region of {MAX_AREA} pixels or more")
        return found

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one sample."""
        box = (row["x"], row["y"], row["x"] + row["width"], row["y"] + row["height"])
        image = self.image(folder, f"{row['image_id']}.jpg", as_stored=True)
        return self.phrase_sample(key, self.clean(row["phrase"]), box, image, rng)


def flipped(phrase: str, box: Box, image: Image.Image) -> tuple[str, Box, Image.Image]:
    """Mirror everything: left and right change places in the phrase, whatever their case."""
    other = {"left": "right", "right": "left"}

    def swap(match: re.Match[str]) -> str:
        word = other[match[0].lower()]
        return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word

    swapped = re.sub(r"(?<![a-z])(?:left|right)", swap, phrase, flags=re.IGNORECASE)
    x1, y1, x2, y2 = box
    return swapped, (image.width - x2, y1, image.width - x1, y2), ImageOps.mirror(image)


def cropped(box: Box, image: Image.Image, rng: random.Random) -> tuple[Box, Image.Image]:
    """Crop to half to all of the area and proportions 3:4 to 4:3 (as far as the image allows), at a random place,
    enlarged so that the crop holds the box."""
    area = rng.uniform(0.5, 1.0) * image.width * image.height
    proportion = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(round(math.sqrt(area * proportion)), image.width)
    height = min(round(math.sqrt(area / proportion)), image.height)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    x1, y1, x2, y2 = box
    left, top = max(min(left, math.floor(x1)), 0), max(min(top, math.floor(y1)), 0)
    right, bottom = (
        min(max(start + size, math.ceil(end)), limit)
        for start, size, end, limit in ((left, width, x2, image.width), (top, height, y2, image.height))
    )
    return (x1 - left, y1 - top, x2 - left, y2 - top), image.crop((left, top, right, bottom))
