# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Maps of cells as images: alone in color, and over the image that they are of."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image

ERRORS = "magma"  # from nothing, dark, to the largest error, bright
CHANGES = "coolwarm"  # blue below 0, red above
SHARE = 0.6  # of the map, over the image
GAP = 4  # pixels between the images of a sheet


def color_map(values: torch.Tensor, limit: float, side: tuple[int, int], signed: bool = False) -> Image.Image:
    """A map (s, s) in color, its cells sharp.

    Args:
        limit: value of the brightest color, above 0; give maps that are compared the same.
        side: (width, height) of the image.
        signed: values are changes, from -limit to limit.
    """
    scaled = values.double().numpy() / max(limit, 1e-12)
    scaled = (scaled + 1) / 2 if signed else scaled
    colors = matplotlib.colormaps[CHANGES if signed else ERRORS](scaled.clip(0, 1), bytes=True)
    return Image.fromarray(colors[..., :3]).resize(side, Image.Resampling.NEAREST)


def overlay(image: Image.Image, values: torch.Tensor, limit: float, signed: bool = False) -> Image.Image:
    """A map (s, s) in color over its image, of which the brightness shows through; see `color_map`."""
    gray = image.convert("L").convert("RGB")
    return Image.blend(gray, color_map(values, limit, image.size, signed), SHARE)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images in rows and columns on white.

    Args:
        rows: one or more, of any lengths; images of equal size.
    """
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            top, left = y * (height + GAP), x * (width + GAP)
            canvas[top : top + height, left : left + width] = np.asarray(image.convert("RGB").resize((width, height)))
    return Image.fromarray(canvas)
