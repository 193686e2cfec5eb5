# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Where a benchmark's files lie: folders in the official layout, rows of `datasets`, or a data set of the Hub."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from recipes.data.readers.files import is_below

HUB = "hub:"  # hub:<owner>/<name>[:<configuration>[:<split>]]
ROW_FILES = ("*.parquet", "*.arrow")


@dataclass(frozen=True)
class DataSource:
    """What `--data` names for one benchmark.

    Attributes:
        name: of the benchmark.
        where: a folder, or a data set of the Hub behind `hub:`.
    """

    name: str
    where: str

    @property
    def folders(self) -> list[Path]:
        """The folders that are looked into: that of the benchmark first."""
        return [] if self.where.startswith(HUB) else [Path(self.where, self.name), Path(self.where)]

    def find(self, *patterns: str) -> Path | None:
        """Return the first file that a pattern fits, in the folders or one below; None if there is none."""
        for folder in self.folders:
            for pattern in patterns:
                for found in (*sorted(folder.glob(pattern)), *sorted(folder.glob(f"*/{pattern}"))):
                    if found.is_file():
                        return found
        return None

    def need(self, *patterns: str) -> Path:
        """As `find`. Raises ValueError if there is none."""
        if (found := self.find(*patterns)) is None:
            searched = " and ".join(str(folder) for folder in self.folders) or self.where
            raise ValueError(
                f"No data for the benchmark {self.name!r}: expected {' or '.join(patterns)} (or rows of `datasets`) in "
                f"{searched}. Give --data a folder with it, {self.name}=FOLDER or {self.name}=hub:<owner>/<name>."
            )
        return found

    @property
    def row_folder(self) -> Path | None:
        """The folder of rows that `datasets` reads; None if there is none."""
        for folder in self.folders:
            if (folder / "dataset_dict.json").is_file() or any(any(folder.glob(kind)) for kind in ROW_FILES):
                return folder
        return None

    def rows(self) -> tuple[Iterator[dict[str, Any]], dict[Path | str, int]] | None:
        """Return rows of `datasets` with their images unread, and their files; None if the source has none.

        Columns of images give functions that return bytes or an image.
        """
        folder = self.row_folder
        if not self.where.startswith(HUB) and folder is None:
            return None
        tables = _from_hub(self.where) if folder is None else _from_folder(folder)
        number = sum(len(table) for table in tables)
        if folder is None:
            files: dict[Path | str, int] = {f"{self.where}@{tables[0]._fingerprint}": number}
        else:
            found = sorted(path for kind in ROW_FILES for path in folder.rglob(kind))
            files = {path: number if len(found) == 1 else 0 for path in found} | {f"rows of {folder.name}": number}
        return _rows(tables), files


def _from_hub(where: str) -> list[datasets.Dataset]:
    name, *rest = where.removeprefix(HUB).split(":")
    configuration, split = (rest + [None, None])[:2]
    loaded = datasets.load_dataset(name, configuration, split=split)
    return list(loaded.values()) if isinstance(loaded, datasets.DatasetDict) else [loaded]


def _from_folder(folder: Path) -> list[datasets.Dataset]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        loaded = datasets.load_from_disk(str(folder))
        return list(loaded.values()) if isinstance(loaded, datasets.DatasetDict) else [loaded]
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    if files:
        return [datasets.Dataset.from_parquet(files)]
    return [datasets.Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))]


def _rows(tables: Sequence[datasets.Dataset]) -> Iterator[dict[str, Any]]:
    for table in tables:
        columns = [name for name, kind in table.features.items() if _is_image(name, kind)]
        plain = table.remove_columns(columns)
        for name in columns:
            if isinstance(table.features[name], datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        for index, row in enumerate(plain):
            yield row | {name: partial(_cell, table, index, name) for name in columns}


def _is_image(name: str, kind: Any) -> bool:
    return isinstance(kind, datasets.Image) or (name == "image" and isinstance(kind, dict) and "bytes" in kind)


def _cell(table: datasets.Dataset, index: int, name: str) -> bytes | Image.Image | Path:
    value = table[index][name]
    if isinstance(value, dict):
        return value["bytes"] if value.get("bytes") else Path(str(value.get("path")))
    return value if value is not None else b""


class ImageFolders:
    """Finds images below an annotation file's folder, or the two above it, whatever folder of the layout they lie in.

    Args:
        folder: of the annotations.
        names: of the folders that images may lie in; "" is the folder itself.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.roots = (folder, *folder.resolve().parents[:2])
        self.places = [root / name for root in self.roots for name in names]

    def find(self, *names: str) -> Path:
        """Return the file of one of these names; where none is there, the place where the first is expected.

        A name that leads out of the searched folders is not found.
        """
        for name in names:
            for number, place in enumerate(self.places):
                if os.path.isfile(place / name) and is_below(place / name, place, *self.roots):
                    self.places.insert(0, self.places.pop(number))  # the same for all images of a set, as a rule
                    return place / name
        return self.places[0] / "missing" / Path(names[0]).name
