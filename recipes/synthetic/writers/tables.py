# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write rows of image and text columns as the parquet shards of a data set on the Hub."""

from pathlib import Path
from typing import Any


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as one or two shards `data/train-*.parquet`; `image` or `images` holds dicts of bytes and path."""
    import datasets  # takes seconds to import, and only these formats need it

    (folder / "data").mkdir(parents=True, exist_ok=True)
    image = datasets.Image()
    dataset = datasets.Dataset.from_list(rows)
    column = "images" if "images" in rows[0] else "image"
    dataset = dataset.cast_column(column, datasets.List(image) if column == "images" else image)
    number = 2 if len(dataset) > 1 else 1
    for index in range(number):
        shard = dataset.shard(num_shards=number, index=index, contiguous=True)
        shard.to_parquet(folder / "data" / f"train-{index:05d}-of-{number:05d}.parquet")
