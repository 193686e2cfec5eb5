# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Region masks and boxes against the test vectors (pycocotools, VCR, released box encoding), and what is refused."""

import numpy as np
import pytest

from recipes.data.readers.masks import box_mask, decode_segmentation, scaled_box, vcr_mask
from recipes.synthetic.scenes import World


def test_masks_equal_pycocotools(shared_file):
    for case in shared_file("vectors/masks.json")["coco_cases"]:
        mask = decode_segmentation(case["segmentation"], case["height"], case["width"])
        assert np.array_equal(mask, case["expected"]), case["name"]
        assert mask.sum() == case["area"]
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert box == case["bbox_xywh"]


def test_masks_of_vcr_equal_the_released_ones(shared_file):
    for case in shared_file("vectors/masks.json")["vcr_cases"]:
        mask = vcr_mask(case["box_xyxy_conf"], case["polygons"], case["height"], case["width"])
        assert np.array_equal(mask, case["expected"]), case["name"]


def test_resized_masks_equal_nearest_sampling(shared_file, tiny_processor):
    for case in shared_file("vectors/masks.json")["coco_cases"]:
        image = np.zeros((case["height"], case["width"], 3), np.uint8)
        for size, key in (((4, 5), "resized_nearest_4x5"), ((16, 12), "resized_nearest_16x12")):
            resized = tiny_processor.image_processor(
                image,
                region_masks=[np.array(case["expected"])],
                size={"height": size[0], "width": size[1]},
                return_tensors="np",
            )["region_masks"]
            assert np.array_equal(resized[0, 0], case[key]), (case["name"], key)


def test_vcr_regions_that_reach_over_the_edge():
    whole = [[[-10, -10], [20, -10], [20, 20], [-10, 20]]]
    assert np.argwhere(vcr_mask([-2, -3, 2, 1, 0.9], whole, 6, 7)).tolist() == [[0, 0], [0, 1]]
    assert np.argwhere(vcr_mask([5, 5, 9, 9], whole, 6, 7)).tolist() == [[5, 5], [5, 6]]
    assert not vcr_mask([3, 3, 3, 5], whole, 6, 7).any()
    two = [[[0, 0], [2, 0], [2, 2], [0, 2]], [[3, 3], [5, 3], [5, 5], [3, 5]]]
    assert vcr_mask([0, 0, 6, 6], two, 6, 6).sum() == 8


def test_run_lengths_plain_and_compressed():
    scene = World().scene(3)
    for row, mask in zip(scene.truth()["objects"], scene.masks, strict=True):
        assert np.array_equal(decode_segmentation(row["segmentation"], 64, 64), mask)
    runs = {"size": [9, 10], "counts": [6, 1, 40, 4, 5, 4, 5, 4, 21]}
    packed = runs | {"counts": "61X13mN000`0"}
    assert np.array_equal(decode_segmentation(packed, 9, 10), decode_segmentation(runs, 9, 10))
    assert decode_segmentation(runs, 9, 10).sum() == 13


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 1, 2, 2]], "polygon of 4 numbers"),
        ([[float("nan"), 1, 2, 3, 4, 3]], "polygon with coordinates like"),
        ([[1, 1, 2, 3, 1e300, 3]], "polygon with coordinates like"),
        ({"size": [3, 3], "counts": [9]}, r"size \[3, 3\] for an image of \[4, 5\]"),
        ({"size": [4, 5], "counts": [9]}, "add up to 9, the image has 20"),
        ({"size": [4, 5], "counts": "0"}, "add up to 0, the image has 20"),
        ([], "Expected polygons or run lengths, got list"),
        ("x", "Expected polygons or run lengths, got str"),
    ],
)
def test_bad_segmentations(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 4, 5)


def test_boxes_equal_the_released_encoding(shared_file):
    for case in shared_file("vectors/box_encoding.json")["cases"]:
        size, box = (case["width"], case["height"]), case["bbox_xyxy"]
        assert list(scaled_box(box, size, (999, 999), case["flip"])) == case["expected_999"]
        if "mask_pixels_256" in case:
            assert list(scaled_box(box, size, (256, 256))) == case["mask_pixels_256"]


def test_box_masks_are_clipped():
    assert box_mask([-5, 1.9, 2.2, 40], 4, 6).tolist() == [[False] * 6] + [[True] * 2 + [False] * 4] * 3
