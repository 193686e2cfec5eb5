# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files of rows -> entries that can be found again: JSON lines (also zipped) and whole JSON files; where images lie."""

import os
import random
import zipfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.images import open_image
from recipes.data.readers.reader import Entry, Reader, clean_text, is_missing, parse_json


def read_lines(file: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
    """Read the lines of a `*.jsonl` or `*.jsonl.zip` as bytes, blank ones left out.

    Lines are parsed afterwards, one by one: `datasets`' JSON reader ends the whole stream at the first broken one.

    Args:
        file: a zip may hold several files, which follow each other by name.
        number: of the line to begin with, from 0.
        offset: where it begins, in bytes of the (unzipped) text.

    Yields:
        entries keyed `<file name>:<line number from 1>`.

    Raises:
        BadSample: "unreadable annotation file".
    """
    try:
        if file.suffix != ".zip":
            with open(file, "rb") as lines:
                yield from _numbered(lines, file.name, number, offset, 0)
            return
        with zipfile.ZipFile(file) as archive:
            begin = 0
            for member in sorted(archive.infolist(), key=lambda info: info.filename):
                if begin + member.file_size > offset:
                    with archive.open(member) as lines:
                        for entry in _numbered(lines, file.name, number, max(offset - begin, 0), begin):
                            number = entry.number + 1
                            yield entry
                begin += member.file_size
    # RuntimeError and NotImplementedError: an encrypted zip, a compression that is not known
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise BadSample("unreadable annotation file", file.name) from error


def _numbered(lines: BinaryIO, name: str, number: int, offset: int, begin: int) -> Iterator[Entry]:
    lines.seek(offset)
    for count, line in enumerate(lines, start=number):
        if line.strip():
            yield Entry(count, begin + offset, f"{name}:{count + 1}", line)
        offset += len(line)


class AnnotationReader(Reader):
    """Rows of annotation files with images in folders nearby. Subclasses say what a row becomes (`build`).

    Args:
        shards: the files.
        image_token, reserved: special tokens that are taken out of all text.

    Attributes:
        image_folders: where images may lie, below the annotation file's folder or the two above it; "" is the folder
            itself.
    """

    image_folders: tuple[str, ...] = ("", "images")

    def __init__(self, shards: list[Path], image_token: str = "<image>", reserved: tuple[str, ...] = ()) -> None:
        self.name = str(shards[0].parent)
        self.shards = shards
        self.image_token = image_token
        self.reserved = (image_token, *reserved)
        self._folder: dict[Path, Path] = {}  # annotation folder -> where the last image was found

    @abstractmethod
    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Do what `Reader.make_sample` does; `folder` is that of the annotations. May raise KeyError, TypeError,
        ValueError, IndexError or AttributeError if the row has another layout."""

    def make_sample(self, key: str, payload: tuple[Path, Any], rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one sample."""
        folder, row = payload
        try:
            return self.build(key, row, folder, rng, skip)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise BadSample("row of another layout", key) from error

    def clean(self, text: Any, lower: bool = False) -> str:
        """Return text without special tokens and outer white space. Raises TypeError if it is none."""
        if not isinstance(text, str):
            raise TypeError(f"expected text, got {type(text).__name__}")
        return clean_text(text, self.reserved, lower).strip()

    def find(self, folder: Path, *names: str) -> Path:
        """Find the file with one of these names (paths relative to an image folder). Raises BadSample if there is none.

        Names are data and may be anything: a name that leads out of the searched folders is not opened. Links are not
        resolved to judge this, so that an image folder may be one.
        """
        # where the last one was found comes first: the same for all images of a set, as a rule
        places = [self._folder[folder]] if folder in self._folder else []
        searched = (folder, *folder.parents[:2])
        places += [root / name for root in searched for name in self.image_folders]
        for name in names:
            for place in places:
                # `os.path.isfile` is False, too, for names that no file can have
                if os.path.isfile(place / name) and is_below(place / name, place, *searched):
                    self._folder[folder] = place
                    return place / name
        raise BadSample("missing image", str(names[0])[:200])

    def image(self, folder: Path, *names: str, as_stored: bool = False) -> Image.Image:
        """Open the image with one of these names; see `find` and `open_image`."""
        return open_image(self.find(folder, *names), names[0], as_stored)


class RowReader(AnnotationReader):
    """Annotation files that are read as a whole.

    Attributes:
        left_out: see `Reader`; `rows` fills it with `leave_out`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left_out: dict[Path, Counter[str]] = {}

    def leave_out(self, shard: Path, reason: str, number: int = 1) -> None:
        """Count rows of a file that the format's own rules leave out, while `rows` reads it."""
        self.left_out[shard][reason] += number

    @abstractmethod
    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all rows of a file with their names, always in the same order; count those that the format's own rules
        leave out (`leave_out`). May raise KeyError, TypeError, ValueError or AttributeError if the file has another
        layout."""

    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read rows, keyed `<file>:<name>`."""
        self.left_out[shard] = Counter()
        try:
            rows = self.rows(shard)
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"  # of a file beside it, maybe
            raise BadSample("annotation file of another layout", f"{shard.name} ({cause:.300})") from error
        for index, (name, row) in enumerate(rows[number:], start=number):
            yield Entry(index, 0, f"{shard.name}:{name}", (shard.parent, row))


class LineReader(AnnotationReader):
    """Annotation files of JSON lines, possibly zipped."""

    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read lines, keyed `<file>:<line number from 1>`."""
        for entry in read_lines(shard, number, offset):
            yield Entry(*entry[:3], (shard.parent, entry.payload))

    def make_sample(self, key: str, payload: tuple[Path, bytes], rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one sample of a line."""
        folder, line = payload
        return super().make_sample(key, (folder, parse_json(line, key)), rng, skip)


def is_below(file: Path, *folders: Path) -> bool:
    """Return whether a path leads into one of the folders, not following links. `/` does not count: all lies below it."""
    path = Path(os.path.abspath(file))
    roots = [Path(os.path.abspath(folder)) for folder in folders]
    return any(path.is_relative_to(root) for root in roots if root != root.parent)


def row_name(row: Any, key: str, index: int | str) -> Any:
    """Return a row's name: its value of `key`, else its number. It may be of any layout: `build` tells what is wrong."""
    name = row.get(key) if isinstance(row, dict) else None
    return f"row {index}" if name is None else name


def same_id(value: Any) -> Any:
    """Return an id as it is compared, None if it is none: files write the same one as a number and as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return value if isinstance(value, (str, int, float)) and not is_missing(value) else None


def load_json(file: Path) -> Any:
    """Read a whole JSON file. Raises BadSample if it is broken."""
    return parse_json(file.read_bytes(), file.name)
