# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""MMC4: jsonl or jsonl.zip annotations and a flat image folder -> interleaved documents.

Layout and rules: data_and_evaluation.md section 2.1. Lines are read one by one and parsed afterwards, because
`datasets`' JSON reader ends the whole stream at the first broken line.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.data.faults import BadSample, LeftOut, Skip
from recipes.data.readers.files import read_lines
from recipes.data.readers.images import open_image
from recipes.data.readers.reader import Entry, Reader, clean_text, parse_json

IMAGE_FOLDERS = ("mmc4_images", "images")


class InterleavedReader(Reader):
    """Documents of MMC4.

    Args:
        shards: `*.jsonl` and `*.jsonl.zip` files; a line is `{text_list, image_info: [{image_name,
            matched_text_index, matched_sim}], ...}`.
        image_folder: holds `<first 12 characters of image_name>.jpg`.
        image_token: what stands for one image in the text.
        reserved: special tokens that are taken out of the sentences.
        min_similarity: least `matched_sim` of an image that is kept.
        max_images: most images per document.
        single_image_drop: probability of dropping a document with exactly one image.
    """

    kind = "document"

    def __init__(
        self,
        shards: list[Path],
        image_folder: Path,
        image_token: str = "<image>",
        reserved: tuple[str, ...] = (),
        min_similarity: float = 0.24,
        max_images: int = 6,
        single_image_drop: float = 0.5,
    ) -> None:
        self.name = str(shards[0].parent)
        self.shards = shards
        self.image_folder = image_folder
        self.image_token = image_token
        self.reserved = (image_token, *reserved)
        self.min_similarity = min_similarity
        self.max_images = max_images
        self.single_image_drop = single_image_drop

    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read lines as bytes, keyed `<file>:<line number from 1>`."""
        return read_lines(shard, number, offset)

    def make_sample(self, key: str, payload: bytes, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one document. LeftOut if none of its images is like enough, or chance leaves out one with one image."""
        line = parse_json(payload, key)
        try:
            sentences = line["text_list"]
            if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
                raise BadSample("text_list is not a list of texts", key)
            matches = [
                (int(info["matched_text_index"]), Path(info["image_name"]).name)
                for info in line["image_info"]
                if float(info["matched_sim"]) >= self.min_similarity
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadSample("line without text_list and image_info", key) from error
        if any(not 0 <= index < len(sentences) for index, _ in matches):
            raise BadSample("matched_text_index outside text_list", key)

        opened: list[tuple[int, Image.Image]] = []
        for index, image_name in matches:
            file = self.image_folder / f"{image_name[:12]}.jpg"
            try:
                opened.append((index, open_image(file, file.name)))
            except BadSample as bad:
                skip(bad.reason, bad.name)
        if matches and not opened:
            raise BadSample("document without a readable image", key)
        rng.shuffle(opened)
        opened = sorted(opened[: self.max_images], key=lambda one: one[0])
        if not opened:
            raise LeftOut("document without an image")
        if len(opened) == 1 and rng.random() < self.single_image_drop:
            raise LeftOut("document with one image, by chance")
        placed = [(index, rng.random() < 0.5, image) for index, image in opened]
        text, images = interleave(
            [clean_text(sentence, self.reserved) for sentence in sentences], placed, self.image_token
        )
        return {"text": text, "images": images, "id": key}


def interleave(sentences: list[str], placed: list[tuple[int, bool, Any]], image_token: str) -> tuple[str, list[Any]]:
    """Join sentences by one space with a placeholder at each image, no space beside it.

    Args:
        sentences: the text.
        placed: `(index of the sentence, before it?, image)`; images at the same place keep their order.
        image_token: the placeholder.

    Returns:
        The text, and the images in the order of their placeholders.
    """
    pieces, images = [], []
    for index, sentence in enumerate(sentences):
        before = [image for at, is_before, image in placed if at == index and is_before]
        after = [image for at, is_before, image in placed if at == index and not is_before]
        pieces.append(image_token * len(before) + sentence + image_token * len(after))
        images += before + after
    return spaces_removed(" ".join(pieces), image_token), images


def spaces_removed(text: str, image_token: str) -> str:
    """Return text without the spaces that touch a placeholder."""
    return re.sub(f" *({re.escape(image_token)}) *", r"\1", text)


def keep_some(places: list[int], most: int, rng: random.Random) -> list[int]:
    """Draw at most `most` of the places at random and return them in their order."""
    return sorted(rng.sample(places, most)) if len(places) > most else places


def find_image_folder(annotations: Path) -> Path:
    """Find the image folder that belongs to an annotation file: beside it, or beside its folder.

    Raises:
        ValueError: if there is none.
    """
    places = [root / name for root in (annotations.parent, annotations.parent.parent) for name in IMAGE_FOLDERS]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"No image folder for the MMC4 annotations {annotations}: expected one of "
        f"{', '.join(str(place) for place in places)}, holding <first 12 characters of image_name>.jpg."
    )
