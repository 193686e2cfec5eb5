# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Dialogues that share a row: whole, in order, each with its own labels, images and masks; resumed where it was."""

import itertools
from pathlib import Path

import pytest
import torch

from processing import DeemDataCollator
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.concatenation import Concatenation, Concatenator
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats


def rows_of(lengths: list[int], images: list[int] | None = None, **settings) -> list[list[str]]:
    """Names of the samples in each row, for samples of these lengths."""
    concatenator, rows = Concatenator(Concatenation(**settings)), []
    for number, length in enumerate(lengths):
        sample = {"id": str(number), "images": [None] * (images[number] if images else 1)}
        concatenator.add({"sample": sample, "tokens": length}, number)
        rows += [row["id"].split("+") for row in concatenator.sequences()]
    return rows


def test_rows_hold_what_fits_in_order() -> None:
    assert rows_of([4, 6, 5, 5, 1, 9], length=10) == [["0", "1"], ["2", "3"]]
    assert rows_of([4, 7, 3, 12, 2, 9], length=10) == [["0"], ["1", "2"], ["3"], ["4"]]  # 12 fits nowhere
    assert rows_of([1] * 6, images=[1, 2, 1, 1, 3, 1], length=100, max_images=3) == [["0", "1"], ["2", "3"], ["4"]]


def test_a_row_has_one_mode() -> None:
    concatenator = Concatenator(Concatenation(length=100))
    for number, mode in enumerate(["image_to_text", "image_to_text", "text_to_image"]):
        concatenator.add({"sample": {"id": str(number), "mode": mode}, "tokens": 1}, number)
    (row,) = concatenator.sequences()
    assert row["mode"] == "image_to_text" and len(row["samples"]) == 2


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=32), 12, formats=["refcoco", "osprey"])
    return folder


def make_dataset(world: Path, processor, **options):
    options = {"pack_length": 1500, "shuffle_buffer": 7, "max_images": -1} | options
    sources = [str(world / "refcoco"), str(world / "osprey" / "osprey_conversation.json")]
    return build_dataset(DataArguments(data=sources, **options), processor, 2, 0)[0]


def test_rows_of_real_formats_are_their_samples_one_behind_the_other(world, tiny_processor) -> None:
    collator, several = DeemDataCollator(tiny_processor), 0
    for row in itertools.islice(make_dataset(world, tiny_processor), 16):
        batch, singles = collator([row]), [collator([sample]) for sample in row["samples"]]
        assert batch["input_ids"].shape[1] <= 1500
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name], torch.cat([single[name] for single in singles], dim=1)), name
        assert torch.equal(batch["pixel_values"], torch.cat([single["pixel_values"] for single in singles]))
        if "region_masks" in batch:
            whole = [torch.ones_like(single["pixel_values"][:, :1]) for single in singles]
            masks = [single.get("region_masks", ones) for single, ones in zip(singles, whole, strict=True)]
            assert torch.equal(batch["region_masks"], torch.cat(masks))
        several += len(singles) > 1
    assert several > 4


@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_resumed_stream_goes_on_with_the_same_rows(world, tiny_processor, at: int) -> None:
    whole = [row["id"] for row in itertools.islice(make_dataset(world, tiny_processor), 16)]
    cut = make_dataset(world, tiny_processor)
    assert [row["id"] for row in itertools.islice(cut, 2 * (at // 2))] == whole[: 2 * (at // 2)]
    resumed = make_dataset(world, tiny_processor)
    resumed.load_state_dict(cut.state_dict(0))
    assert [row["id"] for row in itertools.islice(resumed, 16 - 2 * (at // 2))] == whole[2 * (at // 2) :]


def test_what_cannot_share_a_row_is_refused(world, tiny_processor, tmp_path) -> None:
    write_formats(tmp_path, World(size=32), 4, formats=["chats"])
    data = DataArguments(data=[str(next(tmp_path.rglob("*.parquet")))], pack_length=400)
    with pytest.raises(ValueError, match="Chats in rows .* cannot share a sequence"):
        build_dataset(data, tiny_processor, 2, 0)
    with pytest.raises(ValueError, match="cannot be mixed per sample"):
        make_dataset(world, tiny_processor, data_mixing="sample")
