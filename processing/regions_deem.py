# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Regions of images as boxes and points, and the masks that they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POINT_RADIUS = 0.05  # of the image's shorter side


@dataclass(frozen=True)
class Region:
    """A box or a disc, in pixels of the image as given, upright; x to the right, y down.

    Attributes:
        box: (x1, y1, x2, y2) with x1 < x2 and y1 < y2; a pixel belongs to it where its center does.
        point: (x, y), the center of a disc.
        radius: of the disc, as a share of the image's shorter side; at least the pixel of the point itself.
    """

    box: tuple[float, ...] | None = None
    point: tuple[float, ...] | None = None
    radius: float = POINT_RADIUS

    def mask(self, size: tuple[int, int], index: int) -> np.ndarray:
        """The region in an image of size (H, W): bool (H, W).

        Args:
            index: of the image, for the message.

        Raises:
            ValueError: a box without an area, or a region that lies outside of the image.
        """
        height, width = size
        x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (left < right and top < bottom):
                raise ValueError(
                    f"Box {index} is {list(self.box)}; expected [x1, y1, x2, y2] with x1 < x2 and y1 < y2, in pixels of the "
                    "upright image."
                )
            mask = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        else:
            across, down = self.point
            if not (0 <= across < width and 0 <= down < height):
                raise ValueError(
                    f"Point {index}, {list(self.point)}, lies outside of its image of {height} x {width} (height x width)."
                )
            mask = np.hypot(x - across, y - down) <= self.radius * min(size)
            mask[int(down), int(across)] = True
        if not mask.any():
            raise ValueError(
                f"Box {index}, {list(self.box)}, holds no pixel of its image of {height} x {width} (height x width)."
            )
        return mask


def _numbers(value: Any, length: int, what: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != length or not np.isfinite(numbers).all():
        names = "[x1, y1, x2, y2]" if length == 4 else "[x, y]"
        raise ValueError(f"{what} is {str(value)[:80]}; expected {names}, numbers in pixels of the upright image.")
    return numbers


def merge_regions(
    region_masks: Any, boxes: Sequence[Any] | None, points: Sequence[Any] | None, radius: float | None = None
) -> Any:
    """Masks, boxes and points of the same images -> one region or mask per image, None for a whole image.

    Args:
        region_masks: as the image processor takes them.
        boxes: one [x1, y1, x2, y2] or None per image; a single box for a single image.
        points: one [x, y] or None per image, likewise.
        radius: of the discs around points, a share of the shorter side; 0.05 by default.

    Raises:
        ValueError: values that are no box or point, lists of different lengths, or two regions for one image.
    """
    if boxes is None and points is None:
        return region_masks
    radius = POINT_RADIUS if radius is None else radius
    if not 0 < radius <= 1:
        raise ValueError(
            f"point_radius is {radius}; expected a share of the image's shorter side, above 0 and at most 1."
        )
    kinds: dict[str, list[Any]] = {}
    for name, given, length in (("boxes", boxes, 4), ("points", points, 2)):
        if given is not None:
            if not hasattr(given, "__len__"):
                raise ValueError(f"{name} is {str(given)[:80]}; expected one entry per image, None for a whole image.")
            rows = list(given)
            rows = [rows] if len(rows) == length and all(np.isscalar(one) for one in rows) else rows
            field = "box" if length == 4 else "point"
            numbers = [
                None if one is None else _numbers(one, length, f"Entry {i} of {name}") for i, one in enumerate(rows)
            ]
            kinds[name] = [None if one is None else Region(**{field: one}, radius=radius) for one in numbers]
    if region_masks is not None:
        kinds["region_masks"] = list(region_masks) if isinstance(region_masks, (list, tuple)) else [region_masks]
    if len(counts := {name: len(rows) for name, rows in kinds.items()}) > 1 and len(set(counts.values())) > 1:
        raise ValueError(
            f"Got regions of different numbers of images, {counts}. Give one entry per image, None for a whole."
        )
    merged = []
    for index, row in enumerate(zip(*kinds.values(), strict=True)):
        given = [one for one in row if one is not None]
        if len(given) > 1:
            raise ValueError(
                f"Image {index} has {len(given)} regions, of {', '.join(kinds)}. Give one, as a mask if need be."
            )
        merged.append(given[0] if given else None)
    return merged


__all__ = ["POINT_RADIUS", "Region", "merge_regions"]
