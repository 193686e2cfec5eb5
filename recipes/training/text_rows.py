# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Rows of chats for trl's `SFTTrainer`; what they name as an image lies in the data's own folder (recipes/sft_trl.py)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Dataset, List, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import constants

from recipes.data.faults import BadSample, DataReport
from recipes.data.readers.rows import BUILDERS, HUB, find_image, of_data_uri

STORED = {"images": List(ImageFeature(decode=False)), "image": ImageFeature(decode=False)}
OPENED = {"images": List(ImageFeature()), "image": ImageFeature()}
NAMES = ("image", "url", "path")  # keys of an image part that may hold a name
# where `datasets` puts files of the Hub and of archives
CACHES = (Path(constants.HF_HUB_CACHE), Path(datasets.config.DOWNLOADED_DATASETS_PATH))


def load_rows(sources: Sequence[str], image_folders: Sequence[str] = ()) -> Dataset | None:
    """Return the rows of all sources, one source after another; None without sources.

    Images are opened when read: from bytes, or from files, in the folder of the source or in `image_folders`. Rows that
    name others are left out and counted.

    Raises:
        ValueError: a source does not exist, has no column `messages`, or no row that can be used.
    """
    tables = []
    for source in sources:
        folders = [Path(folder).expanduser() for folder in image_folders]
        if source.startswith(HUB):
            name, configuration, split, *_ = *source.removeprefix(HUB).split(":"), None, None
            table = load_dataset(name, configuration or None, split=split or "train")
            folders = [*CACHES, *folders]
        elif Path(source).is_dir():
            table = load_dataset(source, split="train")
            folders = [Path(source), *folders, *CACHES]
        elif (suffix := Path(source).suffix) in BUILDERS:
            table = load_dataset(BUILDERS[suffix], data_files=source, split="train")
            folders = [Path(source).parent, *folders]
        else:
            raise ValueError(
                f"{source} is no folder and no {', '.join(BUILDERS)} file. Other formats: recipes/sft.py."
            )
        if "messages" not in table.column_names:
            raise ValueError(
                f"{source} has the columns {table.column_names}; expected messages, and images or image. Rename them, "
                "or train with recipes/sft.py, which reads more layouts."
            )
        kept = table.select_columns([c for c in table.column_names if c in ("messages", *STORED)])
        tables.append(_with_images(kept, source, folders))
    return concatenate_datasets(tables) if tables else None


def _with_images(table: Dataset, source: str, folders: list[Path]) -> Dataset:
    """Return the rows that can be used, with their images opened when read."""
    columns = [name for name in STORED if name in table.column_names]
    for name in columns:
        table = table.cast_column(name, STORED[name])
    report, kept, named = DataReport(), [], False
    for index, row in enumerate(_light_rows(table, columns)):
        report.take(source, source)
        try:
            named |= placed(row, folders, f"{source}/row {index}") != row
        except BadSample as bad:
            report.reject(source, source, bad.reason, bad.name, str(index))
            continue
        report.read(source, source, index)
        kept.append(index)
    if len(kept) < len(table):
        print(report)
        if not kept:
            faults = report.to_dict()[source]["skipped"].items()
            found = ", ".join(f"{fault['count']} x {reason}, e.g. {fault['examples'][0]}" for reason, fault in faults)
            raise ValueError(
                f"No row of {source} can be used: {found}. Put its images below it, or give --image_folders."
            )
        table = table.select(kept)
    if named:
        table = table.map(placed, fn_kwargs={"folders": folders, "name": source}, features=table.features)
    for name in columns:
        table = table.cast_column(name, OPENED[name])
    return table if columns else table.add_column("images", [[]] * len(table), feature=OPENED["images"])


def _light_rows(table: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield rows without what they hold of images: bytes are empty where there are any."""
    chats = iter(table.select_columns("messages"))
    for batch in table.with_format("arrow").iter(batch_size=1000):
        stored = {}
        for name in columns:
            flat = batch[name].combine_chunks()
            counts = pc.list_value_length(flat).to_pylist() if name == "images" else [None] * len(flat)
            flat = pc.list_flatten(flat) if name == "images" else flat
            held = pc.is_valid(pc.struct_field(flat, "bytes")).to_pylist()
            paths = pc.struct_field(flat, "path").to_pylist()
            images = iter(
                [{"bytes": b"" if own else None, "path": path} for own, path in zip(held, paths, strict=True)]
            )
            stored[name] = [next(images) if n is None else [next(images) for _ in range(n or 0)] for n in counts]
        for index in range(len(batch)):
            yield {"messages": next(chats)["messages"], **{name: images[index] for name, images in stored.items()}}


def placed(row: dict[str, Any], folders: list[Path], name: str) -> dict[str, Any]:
    """Return a row with the files that its names lead to, looked for in the folders.

    Raises:
        BadSample: a name leads elsewhere or to no file, see `find_image`.
    """
    row = dict(row)
    for column in STORED:
        images = row.get(column)
        if isinstance(images, list):
            row[column] = [_placed_image(image, folders, name) for image in images]
        elif images is not None:
            row[column] = _placed_image(images, folders, name)
    if isinstance(row["messages"], list):
        row["messages"] = [_placed_message(message, folders, name) for message in row["messages"]]
    return row


def _placed_image(image: dict[str, Any] | None, folders: list[Path], name: str) -> dict[str, Any] | None:
    if image is None or image["bytes"] is not None or not image["path"]:
        return image
    if image["path"].startswith("data:"):
        return {"bytes": of_data_uri(image["path"], name), "path": None}
    return {"bytes": None, "path": _file(image["path"], folders, name)}


def _placed_message(message: Any, folders: list[Path], name: str) -> Any:
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, dict) and part.get("type") == "image":
            names = {key: part[key] for key in NAMES if isinstance(part.get(key), str)}
            part = part | {k: v if v.startswith("data:") else _file(v, folders, name) for k, v in names.items()}
        parts.append(part)
    return {**message, "content": parts}


def _file(value: str, folders: list[Path], name: str) -> str:
    file = find_image(value, name, *folders)
    if not file.is_file():
        raise BadSample("missing image", name)
    return str(file)
