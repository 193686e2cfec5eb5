# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Boxes and points give the mask that a person would paint, in the processor, the collator and from file to pixel."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from processing import DeemDataCollator, DeemImageProcessorPil
from processing.regions_deem import Region, merge_regions


def make_image(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


SIZES = {"size": {"height": 32, "width": 32}, "target_size": {"height": 32, "width": 32}}


def painted(shape: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[rows, columns] = True
    return mask


def test_a_box_is_the_rectangle_of_its_pixels() -> None:
    image = make_image(40, 60)  # height, width
    expected = painted((40, 60), slice(5, 30), slice(10, 20))
    assert (Region(box=(10, 5, 20, 30)).mask((40, 60), 0) == expected).all()
    processor = DeemImageProcessorPil(**SIZES)
    given = processor(image, boxes=[[10, 5, 20, 30]])["region_masks"]
    assert (given[0] == processor(image, region_masks=[expected])["region_masks"][0]).all()
    assert (processor(image, boxes=[10, 5, 20, 30])["region_masks"][0] == given[0]).all()  # one image, one box


def test_a_point_is_a_disc_of_the_stated_radius() -> None:
    mask = Region(point=(30.0, 20.0), radius=0.25).mask((40, 60), 0)
    rows, columns = np.nonzero(mask)
    assert mask.sum() == pytest.approx(np.pi * 10**2, rel=0.02)
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == pytest.approx((20.0, 30.0))
    assert Region(point=(59.9, 0.0), radius=0.001).mask((40, 60), 0).nonzero() == (np.array([0]), np.array([59]))


def test_images_without_a_region_are_whole() -> None:
    processor = DeemImageProcessorPil(**SIZES)
    masks = processor([make_image(40, 60)] * 3, boxes=[None, [0, 0, 30, 40], None], points=[None, None, [30, 20]])[
        "region_masks"
    ]
    assert masks[0].mean() == 1 and masks[1].mean() == 0.5 and 0 < masks[2].mean() < 0.05
    assert "region_masks" not in processor(make_image(40, 60), boxes=[None])


def test_boxes_are_of_the_upright_image(tmp_path: Path) -> None:
    """A file that says "turn me" is turned before its box is drawn."""
    upright = np.zeros((40, 60, 3), dtype=np.uint8)
    upright[5:30, 10:20] = 255
    exif = Image.Exif()
    exif[274] = 6  # shown after a quarter turn to the right
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.png", exif=exif)
    processor = DeemImageProcessorPil(**SIZES)
    batch = processor(Image.open(tmp_path / "turned.png"), boxes=[[10, 5, 20, 30]], return_tensors="pt")
    inside = batch["region_masks"][0, 0] > 0
    pixels = batch["pixel_values"][0, 0]
    assert pixels[inside].mean() > pixels[~inside].mean() + 1


def test_training_rows_take_boxes_and_points(tiny_processor) -> None:
    collator = DeemDataCollator(tiny_processor)
    mask = painted((40, 60), slice(0, 40), slice(0, 30))
    rows = [
        {"text": "<image> a", "images": [make_image(40, 60)], "boxes": [[0, 0, 30, 40]]},
        {"text": "<image> a", "images": [make_image(40, 60)], "region_masks": [mask]},
        {"text": "<image> a", "images": [make_image(40, 60)], "points": torch.tensor([[30, 20]])},
    ]
    masks = collator(rows)["region_masks"]
    assert torch.equal(masks[0], masks[1]) and 0 < masks[2].mean() < masks[0].mean()
    with pytest.raises(ValueError, match="Sample x7 has 2 entries in boxes for 1 images"):
        collator.check({**rows[0], "id": "x7", "boxes": [None, None]})
    with pytest.raises(ValueError, match="Sample x7: Image 0 has 2 regions, of boxes, points"):
        collator.check({**rows[0], "id": "x7", "points": [[3, 3]]})
    with pytest.raises(
        ValueError, match=r"Sample x7: Box 0, \[70.0, 0.0, 80.0, 9.0\], holds no pixel of its image of 40 x 60"
    ):
        collator.check({**rows[0], "id": "x7", "boxes": [[70, 0, 80, 9]]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": [[20, 5, 10, 30]]}, "Box 0 is .* expected .* x1 < x2 and y1 < y2"),
        ({"boxes": [[1, 2, 3]]}, r"Entry 0 of boxes is \[1, 2, 3\]; expected \[x1, y1, x2, y2\]"),
        ({"boxes": [["a", 2, 3, 4]]}, "Entry 0 of boxes"),
        ({"boxes": [[0, 0, float("nan"), 4]]}, "Entry 0 of boxes"),
        ({"points": [[61, 20]]}, r"Point 0, \[61.0, 20.0\], lies outside of its image of 40 x 60"),
        ({"points": 3}, "points is 3"),
        ({"points": [[30, 20]], "point_radius": 0}, "point_radius is 0; expected a share"),
        ({"points": [[30, 20], None]}, "Got 2 region masks for 1 image"),
        ({"boxes": [None], "points": [None, None]}, "different numbers of images"),
        ({"boxes": [[0, 0, 9, 9]], "region_masks": np.ones((40, 60))}, "Image 0 has 2 regions"),
    ],
)
def test_what_is_no_region_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeemImageProcessorPil(**SIZES)(make_image(40, 60), **arguments)


def test_without_boxes_and_points_nothing_changes() -> None:
    masks = [np.ones((3, 3))]
    assert merge_regions(masks, None, None) is masks and merge_regions(None, None, None) is None
