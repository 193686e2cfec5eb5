# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What all readers share: entries that can be found again, opening images, parsing JSON, cleaning text."""

import json
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from recipes.data.faults import BadSample, Skip

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
MAX_PROPORTION = 30  # the center crop would first enlarge a longer strip to gigabytes
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM")
_TURNED_BACK = {  # EXIF orientation -> what turns an upright image to it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Entry(NamedTuple):
    """A raw unit of a file, before it is parsed: bytes, a line, a row.

    Attributes:
        number: its number within the file, from 0.
        offset: where the reader finds it again (a byte position; 0 where the number is enough).
        key: its name, unique within the source; seeds its random choices.
        payload: what `Reader.make_sample` makes a sample of.
    """

    number: int
    offset: int
    key: str
    payload: Any


class Reader(ABC):
    """One source of one format.

    Shuffling happens between `entries` and `make_sample`, so that its buffer holds raw bytes, lines and rows rather than
    decoded images. A sample is one of `processing.DeemDataCollator`: text or chat messages, its images in
    order, and where the format has them region masks, trained spans and a mode.

    Attributes:
        name: for reports.
        shards: the files; any objects with an order and a `name`.
        kind: "document", "caption" or "dialogue"; what can be packed is a document or a caption.
        captioned: whether it is a set of captions, of which a reader of each of `captions.FORMS` can be made.
    """

    kind: str = "dialogue"
    captioned: bool = False
    name: str
    shards: list[Path]

    @abstractmethod
    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read raw entries of a file, from the one with this number and offset on.

        Raises:
            BadSample: where the rest of the file cannot be read.
        """

    @abstractmethod
    def make_sample(self, key: str, payload: Any, rng: random.Random, skip: Skip) -> dict[str, Any] | None:
        """Return one sample; None if the format's own rules drop it. All chance comes from `rng`; `skip` notes what is
        left out of a sample that is otherwise used.

        Raises:
            BadSample: if the entry cannot be used.
        """

    def fetch(self, shard: Path, places: Iterable[tuple[int, int]]) -> Iterator[Entry]:
        """Read the entries at these places (number, offset) again, in ascending order, in one pass from first to last."""
        wanted = sorted(places)
        if not wanted:
            return
        numbers, last = {number for number, _ in wanted}, wanted[-1][0]
        for entry in self.entries(shard, *wanted[0]):
            if entry.number in numbers:
                yield entry
            if entry.number >= last:
                return


def open_image(source: Path | bytes | Image.Image, name: str, as_stored: bool = False) -> Image.Image:
    """Return a fully decoded RGB image of a file, of bytes, or of what `datasets` has opened.

    Args:
        source: where its bytes are, or the image.
        name: what it is called if it is unusable.
        as_stored: return the pixels as they are stored, whatever the EXIF orientation says: boxes and masks are drawn on
            those. Else the orientation is kept, for the image processor.

    Raises:
        BadSample: "missing image", "empty image", "not an image", "image of floating point numbers",
            "image too large" (more pixels than `MAX_PIXELS`, or a strip longer than `MAX_PROPORTION`; judged before
            decoding) or "truncated or broken image".
    """
    image = source if isinstance(source, Image.Image) else _opened(source, name)
    if image.mode == "F":  # nothing says which values are black and white
        raise BadSample("image of floating point numbers", name)
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_PROPORTION * min(image.size):
        raise BadSample("image too large", name)
    converted = None
    try:
        orientation = _orientation(image)
        image.load()
        # an image that is RGB already is not copied
        converted = image if image.mode == "RGB" and not getattr(image, "is_animated", False) else _as_rgb(image)
        return _as_stored(converted, orientation) if as_stored else converted
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise BadSample("truncated or broken image", name) from error
    finally:
        if image is not source and image is not converted:
            image.close()


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits: `convert` would cut them at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none. Broken EXIF data, which would raise again later, is removed."""
    probe = Image.new("1", (1, 1))
    probe.info = image.info
    try:
        probe.getexif()  # as copies of the image will read it; the file itself may have swallowed the error
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as Pillow's decoders
        image.info = {name: value for name, value in image.info.items() if "exif" not in str(name).lower()}
        return 1


def _as_stored(image: Image.Image, orientation: int) -> Image.Image:
    """Return a loaded image as its pixels are stored, without an orientation; `orientation` is that before loading."""
    if orientation in _TURNED_BACK and _orientation(image) == 1:
        return image.transpose(_TURNED_BACK[orientation])  # Pillow turns TIFF files upright while it loads them
    stored = image.copy()  # an image file would keep the orientation that it has read, also without its `info`
    stored.info.clear()
    return stored


def _opened(source: Path | bytes, name: str) -> Image.Image:
    """Open an image: its header is read, its pixels are not."""
    if isinstance(source, Path) and not os.path.isfile(source):  # False, too, for names that no file can have
        raise BadSample("missing image", name[:200])
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise BadSample("empty image", name)
    try:
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise BadSample("image too large", name) from error
    except UnidentifiedImageError as error:
        if isinstance(source, Path):
            with open(source, "rb") as file:
                source = file.read(4)
        known = source.startswith(_MAGIC)
        raise BadSample("truncated or broken image" if known else "not an image", name) from error
    except Exception as error:  # as above
        raise BadSample("truncated or broken image", name) from error


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON; broken JSON and broken UTF-8 raise BadSample. NaN and Infinity, which are no JSON, are missing values."""
    try:
        return json.loads(text, parse_constant=lambda constant: None)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadSample("broken json", name) from error


def is_missing(value: Any) -> bool:
    """Return whether a value stands for none: None, NaN (as tables have it) or an infinite number."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def clean_text(text: str, reserved: tuple[str, ...], lower: bool = False) -> str:
    """Return running text without the tokenizer's special tokens, which would count as images or document ends.

    Args:
        text: what a file says.
        reserved: the special tokens. None is left, also where taking one out puts another together.
        lower: return it in lower case, without what becomes a special token in it.
    """
    # half of a surrogate pair, as cut JSON has it, is no text: tokenizers refuse it
    text = _without(text.encode("utf-8", "ignore").decode("utf-8"), reserved)
    return _without(text.lower(), reserved) if lower else text


def _without(text: str, tokens: tuple[str, ...]) -> str:
    """Return text without tokens, in one pass: a token is taken out as soon as the text so far ends in it."""
    tokens = tuple(token for token in tokens if token)
    if not any(token in text for token in tokens):
        return text
    kept: list[str] = []
    ends = {token[-1] for token in tokens}
    longest = max(map(len, tokens))
    for letter in text:
        kept.append(letter)
        if letter in ends:
            tail = "".join(kept[-longest:])
            if (token := max((t for t in tokens if tail.endswith(t)), key=len, default=None)) is not None:
                del kept[-len(token) :]
    return "".join(kept)
