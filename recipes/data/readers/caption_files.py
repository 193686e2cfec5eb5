# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Captions in annotation files: COCO (Karpathy), Flickr30k, TextCaps, Image2Paragraph, Localized Narratives.

Files: data_and_evaluation.md section 2.6. Each caption is a sample in one of `captions.FORMS`: the image described, or
drawn from its description. Captions are in lower case, except paragraphs.
"""

import random
from abc import abstractmethod
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.captions import caption_sample, form_suffix
from recipes.data.readers.files import AnnotationReader, LineReader, RowReader, load_json, row_name, same_id
from recipes.data.readers.reader import is_missing


class CaptionFileReader(AnnotationReader):
    """Rows of one image and one caption.

    Args:
        shards, image_token, reserved: see `AnnotationReader`.
        form: one of `captions.FORMS`.

    Attributes:
        lower: whether captions become lower case.
    """

    captioned = True
    lower = True

    def __init__(
        self, shards: list[Path], image_token: str = "<image>", reserved: tuple[str, ...] = (), form: str = "plain"
    ) -> None:
        super().__init__(shards, image_token, reserved)
        self.name += form_suffix(form)
        self.form = form
        self.kind = "caption" if form == "plain" else "dialogue"

    @abstractmethod
    def caption(self, row: Any) -> tuple[str, list[str]]:
        """Return the caption, and the names its image may have."""

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one sample."""
        caption, names = self.caption(row)
        caption = "" if is_missing(caption) else self.clean(caption, self.lower)
        if not caption:
            raise BadSample("image without caption", key)
        image = self.image(folder, *names)
        return caption_sample(key, caption, image, self.form, rng, self.image_token)


class KarpathyReader(CaptionFileReader, RowReader):
    """`coco_karpathy_train.json`: `[{image: "train2014/....jpg", caption: str, image_id}]` (a list of captions, as in
    val and test, gives a sample each)."""

    image_folders = ("", "images", "coco", "coco/images")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return one row per caption."""
        found = []
        for index, row in enumerate(load_json(shard)):
            said = row.get("caption") if isinstance(row, dict) else None
            several = isinstance(said, list) and len(said) > 1
            found += [(f"{index}.{i}", (row, i)) for i in range(len(said))] if several else [(index, (row, 0))]
        return found

    def caption(self, row: Any) -> tuple[str, list[str]]:
        """Return caption and image names."""
        about, index = row
        said = about["caption"]
        return (said[index] if said else None) if isinstance(said, list) else said, [about["image"]]


class Flickr30kReader(CaptionFileReader, RowReader):
    """`groundedcaption.json`: `[{image_id, detailed_caption}]`, without the images of `flickr30k_test1k.json` where that
    lies beside."""

    image_folders = ("flickr30k-images", "flickr30k_images", "images", "")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return the rows of images that are not tested on."""
        test = shard.with_name("flickr30k_test1k.json")
        tested = {Path(row["file_name"]).stem for row in load_json(test)["images"]} if test.is_file() else set()
        rows = list(enumerate(load_json(shard)))
        kept = [(i, row) for i, row in rows if Path(str(row_name(row, "image_id", i))).stem not in tested]
        self.leave_out(shard, "caption of an image to test on", len(rows) - len(kept))
        return kept

    def caption(self, row: Any) -> tuple[str, list[str]]:
        """Return caption and image names."""
        return row["detailed_caption"], [f"{Path(str(row['image_id'])).stem}.jpg"]


class TextCapsReader(CaptionFileReader, RowReader):
    """`TextCaps_0.1_train.json`: `{data: [{image_id, caption_str}]}`; images are TextVQA's."""

    image_folders = ("train_images", "textvqa/train_images", "images", "")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all captions."""
        return list(enumerate(load_json(shard)["data"]))

    def caption(self, row: Any) -> tuple[str, list[str]]:
        """Return caption and image names."""
        return row["caption_str"], [f"{row['image_id']}.jpg"]


class ParagraphReader(CaptionFileReader, RowReader):
    """Image2Paragraph: `paragraphs_coco.json` (`{annotations: [{image_id, url, caption}]}`), only what `train_split.json`
    (a list of image ids) names. Images of Visual Genome by the last part of `url`, in both of its folders (the release
    looks into the first only)."""

    image_folders = ("VG_100K", "VG_100K_2", "vg/VG_100K", "vg/VG_100K_2", "images", "")
    lower = False

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return the training paragraphs."""
        train = {same_id(name) for name in load_json(shard.with_name("train_split.json"))}
        rows = [(row_name(row, "image_id", i), row) for i, row in enumerate(load_json(shard)["annotations"])]
        # a row without image_id is kept: `build` counts it as one of another layout
        kept = [one for one in rows if not _has_id(one[1]) or same_id(one[0]) in train]
        self.leave_out(shard, "paragraph outside of train_split.json", len(rows) - len(kept))
        return kept

    def caption(self, row: Any) -> tuple[str, list[str]]:
        """Return paragraph and image names."""
        return row["caption"], [row["url"].rpartition("/")[2]]


def _has_id(row: Any) -> bool:
    return isinstance(row, dict) and same_id(row.get("image_id")) is not None


class NarrativeReader(CaptionFileReader, LineReader):
    """Localized Narratives on COCO: `coco_train_captions.jsonl`, lines of `{image_id, caption, annotator_id,
    dataset_id}`; images `train2017/%012d.jpg`."""

    image_folders = ("train2017", "coco/train2017", "val2017", "coco/val2017", "images", "")

    def caption(self, row: Any) -> tuple[str, list[str]]:
        """Return narrative and image names."""
        return row["caption"], [f"{int(row['image_id']):012d}.jpg"]
