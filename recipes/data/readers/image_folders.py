# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Folders of images, each with a caption in a file beside it, or in a sub-folder named by what it shows."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.captions import caption_sample, form_suffix, read_caption
from recipes.data.readers.images import open_image
from recipes.data.readers.reader import Entry, Reader, clean_text
from recipes.data.readers.tars import ADDED_BY_SYSTEMS, TEXT_SUFFIXES, is_added_by_systems

SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")


class ImageFolderReader(Reader):
    """Images and what they show: `a.txt`, or `a.json` with a `caption`, beside `a.jpg`; without either the name of the
    sub-folder, with spaces for underscores.

    Args:
        shards: the images.
        image_token: what stands for the image in the text.
        reserved: special tokens that are taken out of the captions.
        form: one of `captions.FORMS`.

    Attributes:
        shards: the folders that the images are in.
        root: the folder that holds all of them. Its name, and that of a split, say nothing of an image.
    """

    captioned = True

    def __init__(
        self, shards: list[Path], image_token: str = "<image>", reserved: tuple[str, ...] = (), form: str = "plain"
    ) -> None:
        self.files: dict[Path, list[Path]] = {}
        self.left_out: dict[Path, Counter[str]] = {}
        for file in sorted(shards):
            added = is_added_by_systems(file.parent.parts, file.name)
            self.left_out.setdefault(file.parent, Counter())[ADDED_BY_SYSTEMS] += added
            self.files.setdefault(file.parent, []).extend([] if added else [file])
        self.left_out = {folder: +counts for folder, counts in self.left_out.items()}
        self.shards = list(self.files)
        self.root = Path(os.path.commonpath(self.shards))
        self.name = str(self.root) + form_suffix(form)
        self.image_token = image_token
        self.reserved = (image_token, *reserved)
        self.form = form
        self.kind = "caption" if form == "plain" else "dialogue"

    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Give the images of a folder, keyed `<path below the root>`."""
        for index, file in enumerate(self.files[shard][number:], start=number):
            yield Entry(index, 0, str(file.relative_to(self.root)), file)

    def make_sample(self, key: str, payload: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one caption sample in the chosen form, in lower case."""
        beside = {suffix: payload.with_suffix(f".{suffix}") for suffix in TEXT_SUFFIXES}
        members = {suffix: file.read_bytes() for suffix, file in beside.items() if file.is_file()}
        said = read_caption(members, key) if members else self._label(payload)
        caption = clean_text(said, self.reserved, lower=True)
        if not caption.strip():
            raise BadSample("image without caption", key)
        return caption_sample(key, caption, open_image(payload, key), self.form, rng, self.image_token)

    def _label(self, file: Path) -> str:
        name = file.parent.name
        return "" if file.parent == self.root or is_split(name) else name.replace("_", " ")


def is_split(name: str) -> bool:
    """Return whether a folder's name is that of a split, such as `train2017`, and says nothing of its images."""
    return name.lower().rstrip("0123456789_-") in SPLITS
