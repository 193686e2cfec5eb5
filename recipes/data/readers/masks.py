# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Region masks from COCO segmentations (pycocotools), polygons of VCR, and boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

MAX_COORDINATE = 1e6  # pixels


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode a COCO segmentation to a mask, (height, width) bool.

    Args:
        segmentation: a list of polygons `[x, y, x, y, ...]` in pixels, which are merged, or run lengths
            `{"size": [height, width], "counts": [int, ...] or str}`, plain or compressed.

    Raises:
        ValueError: for another layout, run lengths of another size, or a polygon of less than three points.
    """
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"Run lengths of size {segmentation.get('size')} for an image of {[height, width]}.")
        counts = segmentation["counts"]
        counts = decompress_counts(counts) if isinstance(counts, (str, bytes)) else counts
        if sum(counts) != height * width or min(counts, default=0) < 0:  # pycocotools would read past their end
            raise ValueError(f"Run lengths add up to {sum(counts)}, the image has {height * width} pixels.")
        return coco.decode(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)).astype(bool)
    if not isinstance(segmentation, (list, tuple)) or not segmentation:
        raise ValueError(
            f"Expected polygons or run lengths, got {type(segmentation).__name__} of {segmentation!r:.80}."
        )
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"A polygon of {len(polygon)} numbers: expected x, y of at least three points.")
        if not all(abs(value) < MAX_COORDINATE for value in polygon):  # NaN too; pycocotools would take all memory
            raise ValueError(f"A polygon with coordinates like {polygon[:4]}: expected pixels of the image.")
    return coco.decode(coco.merge(coco.frPyObjects(list(segmentation), height, width))).astype(bool)


def decompress_counts(text: str | bytes) -> list[int]:
    """Decode COCO's compressed run lengths: five bits per character from 48 on, bit 5 says that more follow, bit 4 of the last
    is the sign; from the third count on, the difference to the one before the last is stored."""
    counts: list[int] = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        value |= ((code - 48) & 0x1F) << shift
        shift += 5
        if (code - 48) & 0x20:
            continue
        if (code - 48) & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def vcr_mask(box: Sequence[float], polygons: Sequence[Any], height: int, width: int) -> np.ndarray:
    """Draw one of VCR's regions, (height, width) bool: the centers of a grid over the box that lie inside one of the
    polygons, pasted at the rounded box.

    Args:
        box: x1, y1, x2, y2 and possibly a confidence, in pixels.
        polygons: each a list of `[x, y]` in pixels of the image.

    Raises:
        ValueError: for a box far outside of every image.
    """
    if not all(abs(value) < MAX_COORDINATE for value in box[:4]):
        raise ValueError(f"A box at {list(box[:4])}: expected pixels of the image.")
    left, top, right, bottom = (round(value) for value in box[:4])
    columns, rows = max(right - left, 0), max(bottom - top, 0)
    x = box[0] + (np.arange(columns) + 0.5) / max(columns, 1) * (box[2] - box[0])
    y = box[1] + (np.arange(rows) + 0.5) / max(rows, 1) * (box[3] - box[1])
    inside = np.zeros((rows, columns), bool)
    for polygon in polygons:
        inside |= _points_inside(np.asarray(polygon, np.float64), x[None, :], y[:, None])
    mask = np.zeros((height, width), bool)
    kept = mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    kept[:] = inside[max(-top, 0) :, max(-left, 0) :][: kept.shape[0], : kept.shape[1]]
    return mask


def _points_inside(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Apply the even-odd rule: count the edges that a ray to the right crosses."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return inside


def box_mask(box: Sequence[float], height: int, width: int) -> np.ndarray:
    """Draw a box x1, y1, x2, y2 in pixels, (height, width) bool."""
    left, top, right, bottom = scaled_box(box, (width, height), (width, height))
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def scaled_box(
    box: Sequence[float], size: tuple[int, int], grid: tuple[int, int], flip: bool = False
) -> tuple[int, int, int, int]:
    """Scale a box to another grid, truncated to whole numbers.

    Args:
        box: x1, y1, x2, y2 on an image of `size` (width, height); clipped to it.
        grid: (width, height) of the result; 999 x 999 for coordinates in text.
        flip: mirror it left to right.
    """
    x1, x2 = (min(max(value, 0), size[0]) * grid[0] / size[0] for value in box[::2])
    y1, y2 = (min(max(value, 0), size[1]) * grid[1] / size[1] for value in box[1::2])
    if flip:
        x1, x2 = grid[0] - x2, grid[0] - x1
    return int(x1), int(y1), int(x2), int(y2)
