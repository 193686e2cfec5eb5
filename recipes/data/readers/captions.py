# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""WebDataset tars of images and captions (LAION, BLIP, img2dataset) -> caption samples.

Layout and rules: data_and_evaluation.md section 2.2.
"""

import itertools
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.images import IMAGE_SUFFIXES, open_image
from recipes.data.readers.reader import Entry, Reader, clean_text, is_missing, parse_json
from recipes.data.readers.tars import TEXT_SUFFIXES, count_left_out, read_groups
from recipes.data.samples import IMAGE, content, dialogue
from recipes.prompts import CAPTION_BEGIN, DESCRIBE_REQUESTS, DRAW_REQUESTS

FORMS = ("plain", "describe", "draw")


class CaptionReader(Reader):
    """Captioned images in WebDataset tars.

    Args:
        shards: tar files whose consecutive members `<key>.jpg` (or another of `IMAGE_SUFFIXES`) and `<key>.json` with a
            `caption`, or `<key>.txt`, form a sample.
        image_token: what stands for the image in the text.
        reserved: special tokens that are taken out of the captions.
        form: `"plain"` (pre-training: image and caption in either order), `"describe"` (dialogue, the caption is the
            answer) or `"draw"` (dialogue, the image is the answer).

    Raises:
        ValueError: for an unknown form.
    """

    captioned = True

    def __init__(
        self, shards: list[Path], image_token: str = "<image>", reserved: tuple[str, ...] = (), form: str = "plain"
    ) -> None:
        self.name = str(shards[0].parent) + form_suffix(form)
        self.shards = shards
        self.image_token = image_token
        self.reserved = (image_token, *reserved)
        self.form = form
        self.kind = "caption" if form == "plain" else "dialogue"
        self.left_out: dict[Path, Counter[str]] = {}

    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read members by suffix, keyed `<tar>/<key>`; the offset is that of the first member's header."""
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                for count, (start, name, members) in enumerate(read_groups(file, shard)):
                    yield Entry(number + count, start, f"{shard.name}/{name}", members)
                self.left_out[shard] = count_left_out(shard)
                # An archive ends in two blocks of zeros; tarfile is also content if it ends between two members.
                file.seek(-1024, os.SEEK_END)
                if any(file.read()):
                    raise BadSample("tar cut short", shard.name)
        except (OSError, EOFError, tarfile.TarError) as error:
            raise BadSample("unreadable tar", shard.name) from error

    def fetch(self, shard: Path, places: Iterable[tuple[int, int]]) -> Iterator[Entry]:
        """Read as the base class does, but nothing that lies between."""
        for number, offset in sorted(places):
            yield from itertools.islice(self.entries(shard, number, offset), 1)  # none where the tar has changed

    def make_sample(
        self, key: str, payload: dict[str, bytes | None], rng: random.Random, skip: Skip
    ) -> dict[str, Any]:
        """Return one caption sample in the chosen form, in lower case."""
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in payload), None)
        if suffix is None:
            others = sorted(set(payload) - set(TEXT_SUFFIXES))
            if not others:
                raise BadSample("caption without image", key)
            told = len(others) < len(payload)
            reason = (
                "caption without an image of a known kind"
                if told
                else "neither an image of a known kind nor a caption"
            )
            raise BadSample(reason, f"{key} ({', '.join(others)[:80]})")
        if lost := [name for name, data in payload.items() if data is None]:
            raise BadSample("link to what is not in the tar", f"{key}.{lost[0]}")
        caption = clean_text(read_caption(payload, key), self.reserved, lower=True)
        if not caption.strip():
            raise BadSample("image without caption", key)
        image = open_image(payload[suffix], f"{key}.{suffix}")
        return caption_sample(key, caption, image, self.form, rng, self.image_token)


def caption_sample(
    key: str, caption: str, image: Image.Image, form: str, rng: random.Random, image_token: str
) -> dict[str, Any]:
    """Return a caption and its image as a sample in one of `FORMS`."""
    if form == "plain":
        # no space at the joint
        text = image_token + caption if rng.random() < 0.5 else caption + image_token
        return {"text": text, "images": [image], "id": key}
    if form == "describe":
        messages = dialogue((content(IMAGE, f" {rng.choice(DESCRIBE_REQUESTS)} "), f"{CAPTION_BEGIN} {caption}"))
        return {"messages": messages, "images": [image], "mode": "image_to_text", "id": key}
    request = content(f"{rng.choice(DRAW_REQUESTS)}{caption} ")
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": content(IMAGE)}]
    return {"messages": messages, "images": [image], "mode": "text_to_image", "id": key}


def form_suffix(form: str) -> str:
    """Return what a source's name ends in: each form is a source of its own. Raises ValueError for an unknown form."""
    if form not in FORMS:
        raise ValueError(f"Unknown caption form {form!r}: choose one of {', '.join(FORMS)}.")
    return "" if form == "plain" else f" ({form})"


def read_caption(members: dict[str, bytes], key: str) -> str:
    """Return the caption of an entry: `caption` of its json (a list is joined by spaces), else its txt.

    Raises:
        BadSample: if there is none, or it is broken.
    """
    described = parse_json(members["json"], f"{key}.json") if "json" in members else None
    given = described.get("caption") if isinstance(described, dict) else None
    said = [one for one in (given if isinstance(given, list) else [given]) if not is_missing(one)]
    if not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in said):
        raise BadSample("caption is not text", f"{key}.json")
    if any(one != "" for one in said):
        return " ".join(map(str, said))
    if "txt" not in members:
        raise BadSample("image without caption", key)
    try:
        return members["txt"].decode("utf-8-sig").strip()  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise BadSample("caption is not utf-8", f"{key}.txt") from error
