# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Rows of `datasets` (local files or the Hub, streamed), of JSON lines and of tables in text.

What a row becomes is told by its columns, see `row_layouts`. Images are bytes, paths (relative to the file, or to `images`
beside it), data URIs, or what the Image feature stores; they are opened one by one, so that a broken one is skipped and
the stream goes on.
"""

import base64
import binascii
import csv
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from recipes.data.faults import BadSample, DataError, LeftOut, Skip
from recipes.data.readers.captions import caption_sample, form_suffix
from recipes.data.readers.chats import chat_sample
from recipes.data.readers.files import is_below, read_lines
from recipes.data.readers.images import open_image
from recipes.data.readers.interleaved import keep_some, spaces_removed
from recipes.data.readers.questions import check_round, question_messages, read_answers
from recipes.data.readers.reader import Entry, Reader, clean_text, parse_json
from recipes.data.readers.row_layouts import (
    ANSWER_COLUMNS,
    CAPTION_COLUMNS,
    EXPECTED,
    IMAGE_COLUMNS,
    first_of,
    kind_of,
    layout_of,
)
from recipes.data.samples import around_images, dialogue

HUB = "hub:"  # prefix of a Hub id among the data: hub:<owner>/<name>[:<configuration>[:<split>]]
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json"}  # of `datasets`
TABLES = (".csv", ".tsv")
MAX_UNKNOWN = 20  # rows that are looked at for columns that are known


@dataclass(frozen=True, order=True)
class HubShard:
    """One of the files of a dataset on the Hub."""

    name: str
    index: int
    dataset: datasets.IterableDataset = field(compare=False, repr=False)


class DatasetReader(Reader):
    """Rows of a dataset.

    Args:
        shards: parquet, arrow, jsonl, csv or tsv files, or those of `open_hub`.
        image_token, reserved: special tokens that are taken out of all text.
        form: one of `captions.FORMS`, for captions.
        max_images: most images of a document.

    Attributes:
        layout: of the first row that tells, see `row_layouts.layout_of`.
        image_folders: where images may lie besides the folder of the file that names them. Names are data and may be
            anything: one that leads out of these is not opened (links are not resolved to judge this).

    Raises:
        DataError: if that row has none of the known sets of columns.
    """

    def __init__(
        self,
        shards: list[Path] | list[HubShard],
        image_token: str = "<image>",
        reserved: tuple[str, ...] = (),
        form: str = "plain",
        max_images: int = 6,
    ) -> None:
        first = shards[0]
        self.name = (str(first.parent) if isinstance(first, Path) else first.name) + form_suffix(form)
        self.shards = shards
        self.image_token = image_token
        self.reserved = (image_token, *reserved)
        self.form, self.max_images = form, max_images
        self.image_folders: tuple[Path, ...] = ()
        self.layout = self._find_layout()
        self.kind = kind_of(self.layout)
        self.captioned = self.kind == "caption"
        if self.captioned and form != "plain":
            self.kind = "dialogue"

    def _find_layout(self) -> str:
        """Return the layout of the first row that can be read and tells.

        Raises:
            DataError: if none can be read, or the columns of the first `MAX_UNKNOWN` are not known.
        """
        fault, unknown, read = None, [], False
        for shard in self.shards:
            try:
                for entry in self.entries(shard):
                    try:
                        row = self._row(entry.payload[1], entry.key)
                    except BadSample as bad:  # a broken line, counted when the file is read
                        fault = bad
                        continue
                    read, layout = True, layout_of(row)
                    if layout is None:
                        unknown.append(sorted(row))
                        if len(unknown) == MAX_UNKNOWN:
                            break
                    elif layout != "texts":
                        return layout
            except BadSample as bad:
                fault = bad
            if len(unknown) == MAX_UNKNOWN:
                break
        if unknown:
            raise DataError(f"The columns of {self.name} are {unknown[0]}; expected {EXPECTED}. Rename them.")
        if not read and fault is not None:
            raise DataError(f"No row of {self.name} can be read: {fault}. Repair or leave out these files.")
        return "document"

    @staticmethod
    def _row(row: dict[str, Any] | bytes, key: str) -> dict[str, Any]:
        row = parse_json(row, key) if isinstance(row, bytes) else row
        if not isinstance(row, dict):
            raise BadSample("row of another layout", key)
        return row

    def entries(self, shard: Path | HubShard, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read rows, keyed `<file>:<row number from 1>`, images undecoded; lines of `*.jsonl` unparsed."""
        folder = shard.parent if isinstance(shard, Path) else None
        if isinstance(shard, Path) and shard.suffix.lower() in (".jsonl", ".zip"):
            # Not through `datasets`: its JSON reader ends at a broken line, and turns columns of mixed types into text.
            for entry in read_lines(shard, number, offset):
                yield entry._replace(payload=(folder, entry.payload))
            return
        table = isinstance(shard, Path) and shard.suffix.lower() in TABLES
        rows = read_table(shard, number) if table else _read_dataset(shard, number)
        for index, row in enumerate(rows, start=number):
            yield Entry(index, 0, f"{shard.name}:{index + 1}", (folder, row))

    def make_sample(
        self, key: str, payload: tuple[Path | None, dict[str, Any]], rng: random.Random, skip: Skip
    ) -> dict[str, Any]:
        """Return one sample."""
        folder, row = payload
        row = self._row(row, key)
        layout = layout_of(row)
        layout = self.layout if layout == "texts" else layout
        if layout is None or kind_of(layout) != kind_of(self.layout):  # packing, for one, needs all of one kind
            raise BadSample("row of another layout", key)
        try:
            if layout == "chat":
                clean = partial(clean_text, reserved=self.reserved)
                return chat_sample(key, row, self.image_token, clean, partial(self._image, folder))
            if layout == "document":
                return self._document(key, row, folder, rng, skip)
            if layout == "rounds":
                return self._rounds(key, row, folder)
            if layout == "question":
                return self._question(key, row, folder, rng)
            return self._caption(key, row, folder, rng)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise BadSample("row of another layout", key) from error

    def _caption(self, key: str, row: dict[str, Any], folder: Path | None, rng: random.Random) -> dict[str, Any]:
        said = read_answers(row[first_of(row, CAPTION_COLUMNS)])
        captions = [caption for one in said if (caption := self._clean(one, lower=True))]
        if not captions:
            raise BadSample("image without caption", key)
        image = self._image(folder, row[first_of(row, IMAGE_COLUMNS)], key)
        caption = captions[0] if len(captions) == 1 else rng.choice(captions)
        return caption_sample(key, caption, image, self.form, rng, self.image_token)

    def _document(
        self, key: str, row: dict[str, Any], folder: Path | None, rng: random.Random, skip: Skip
    ) -> dict[str, Any]:
        if isinstance(row["texts"], str) or isinstance(row["images"], str):
            raise TypeError("a text in place of a list")
        pieces: list[Any] = []
        for index, (image, text) in enumerate(zip(row["images"], row["texts"], strict=True)):
            if image is not None:
                try:
                    pieces.append(self._image(folder, image, f"{key}/{index}"))
                except BadSample as bad:
                    skip(bad.reason, bad.name)
            if text is not None:
                pieces.append(self._clean(text))
        if any(image is not None for image in row["images"]) and not any(isinstance(p, Image.Image) for p in pieces):
            raise BadSample("document without a readable image", key)
        places = [index for index, piece in enumerate(pieces) if isinstance(piece, Image.Image)]
        kept = set(keep_some(places, self.max_images, rng))
        pieces = [piece for index, piece in enumerate(pieces) if index in kept or isinstance(piece, str)]
        images = [piece for piece in pieces if isinstance(piece, Image.Image)]
        if not images:
            raise LeftOut("document without an image")
        text = " ".join(piece if isinstance(piece, str) else self.image_token for piece in pieces)
        return {"text": spaces_removed(text, self.image_token), "images": images, "id": key}

    def _rounds(self, key: str, row: dict[str, Any], folder: Path | None) -> dict[str, Any]:
        rounds = [(self._clean(turn["user"]), self._clean(turn["assistant"])) for turn in row["texts"]]
        if not rounds:
            raise BadSample("dialogue without a round", key)
        if not all(answer for _, answer in rounds):
            raise BadSample("question without answer", key)
        images = [self._image(folder, image, f"{key}/{index}") for index, image in enumerate(row["images"])]
        marks = self.image_token * len(images)
        spoken = [
            (around_images((marks if number == 0 else "") + user + "\n", self.image_token), answer)
            for number, (user, answer) in enumerate(rounds)
        ]
        return {"messages": dialogue(*spoken), "images": images, "mode": "image_to_text", "id": key}

    def _question(self, key: str, row: dict[str, Any], folder: Path | None, rng: random.Random) -> dict[str, Any]:
        given = next((row[name] for name in ANSWER_COLUMNS if read_answers(row.get(name))), None)
        answers = [answer for said in read_answers(given) if (answer := self._clean(said))]
        question, answer = self._clean(row["question"]), rng.choice(answers) if answers else None
        check_round(question, answer, key)
        return {
            "messages": question_messages(question, answer),
            "images": [self._image(folder, row[first_of(row, IMAGE_COLUMNS)], key)],
            "mode": "image_to_text",
            "id": key,
        }

    def _clean(self, text: str, lower: bool = False) -> str:
        return clean_text(text, self.reserved, lower).strip()

    def _image(self, folder: Path | None, value: Any, name: str) -> Image.Image:
        if isinstance(value, list):
            if len(value) != 1:
                raise BadSample("several images in place of one", name)
            (value,) = value
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value["path"]
        if value is None or value == "":
            raise BadSample("row without an image", name)
        if not isinstance(value, str):
            return open_image(value, name)
        if value.startswith("data:"):
            return open_image(of_data_uri(value, name), name)
        if folder is None:
            raise BadSample("image is not on disk", name)
        return open_image(find_image(value, name, folder, *self.image_folders), name)


def find_image(value: str, name: str, folder: Path, *others: Path) -> Path:
    """Return the file that a row names: in the folder of its file, in `images` there, or in one of the others.

    Args:
        name: what the image is called if it is unusable.

    Raises:
        BadSample: an address, or a name that leads out of these folders (links are not resolved to judge this).
    """
    if "://" in value:
        raise BadSample("image is not on disk", name)
    roots = (folder, *others)
    places = [root / value for root in (folder, folder / "images", *others)]
    allowed = [place for place in places if is_below(place, *roots)]
    found = next((place for place in allowed if os.path.isfile(place)), None)
    if found is None and places[0] not in allowed:
        raise BadSample("image outside of the data's folder and --image_folders", name)
    return found or places[0]


def of_data_uri(uri: str, name: str) -> bytes:
    """Return what a data URI holds. Raises BadSample if it cannot be decoded."""
    about, _, data = uri.partition(",")
    if not about.endswith(";base64"):
        raise BadSample("data URI that is not base64", name)
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("broken data URI", name) from error


def read_header(file: Path) -> tuple[list[str], str]:
    """Return the columns of a table, and what divides its cells: tabs in `*.tsv`, else what the header has most of, commas,
    semicolons or tabs. Raises OSError if it cannot be read."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
    divider = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    return next(csv.reader([header], delimiter=divider), []), divider


def read_table(file: Path, number: int = 0) -> Iterator[dict[str, Any]]:
    """Read the rows of a table with a header, from one of them on; empty cells are None.

    Raises:
        BadSample: where the rest cannot be read.
    """
    try:
        # what is not utf-8 must not end the file: it costs its row, see `_sound`
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            for index, row in enumerate(csv.DictReader(lines, delimiter=read_header(file)[1])):
                if index >= number:
                    yield _sound(row)
    except (OSError, csv.Error) as error:
        raise BadSample("unreadable data file", file.name) from error


def _sound(row: dict[Any, Any]) -> Any:
    """Return a row of a table with None for empty cells; None if it has more cells than the header, or is not utf-8."""
    if None in row:
        return None
    try:
        "".join(value for value in row.values() if value).encode()
    except UnicodeEncodeError:
        return None
    return {name: value or None for name, value in row.items()}


def _read_dataset(shard: Path | HubShard, number: int) -> Iterator[dict[str, Any]]:
    try:
        dataset = _opened(shard)
        names = {name: one for name, one in (dataset.features or {}).items() if isinstance(one, datasets.ClassLabel)}
        # By batches of one: row by row, `datasets` would leave out what it takes for other data workers' rows.
        for batch in dataset.skip(number).iter(batch_size=1):
            row = {column: values[0] for column, values in batch.items()}
            for name, label in names.items():
                known = isinstance(row[name], int) and 0 <= row[name] < label.num_classes
                row[name] = label.int2str(row[name]).replace("_", " ") if known else None
            yield row
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
        raise BadSample("unreadable data file", shard.name) from error


def open_hub(data: str) -> list[HubShard]:
    """Return the files of `hub:<owner>/<name>[:<configuration>[:<split>]]`, split train by default."""
    name, configuration, split, *_ = *data.removeprefix(HUB).split(":"), None, None
    dataset = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
    return [HubShard(f"{name}/{index:05d}", index, dataset) for index in range(dataset.num_shards)]


def _opened(shard: Path | HubShard) -> datasets.IterableDataset:
    if isinstance(shard, Path):
        builder = BUILDERS[shard.suffix]
        dataset = datasets.load_dataset(builder, data_files=str(shard), split="train", streaming=True)
    else:
        dataset = shard.dataset.shard(num_shards=shard.dataset.num_shards, index=shard.index)
    return dataset.cast(_undecoded(dataset.features)) if dataset.features else dataset


def _undecoded(feature: Any) -> Any:
    """Return features in which images stay as they are stored, to be opened one by one."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(one) for name, one in feature.items()})
    if (inner := getattr(feature, "feature", None)) is not None:  # lists
        return replace(feature, feature=_undecoded(inner))
    return feature
