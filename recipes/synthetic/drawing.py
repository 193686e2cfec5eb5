# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Draw shapes on a patterned background, as images with one mask per shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from recipes.synthetic.vocabulary import KINDS

GRAY = 112  # of what hides part of an image


@dataclass(frozen=True)
class Shape:
    """What is drawn of one object.

    Attributes:
        kind: one of `KINDS`.
        center: x and y as shares of the image's side, from the top left corner.
        extent: diameter as a share of the image's side.
        angle: turn in radians, clockwise.
        rgb: color, 0 ... 255 per channel.
    """

    kind: str
    center: tuple[float, float]
    extent: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Background:
    """What is drawn behind the objects.

    Attributes:
        rgb: color, 0 ... 255 per channel.
        texture: one of `TEXTURES` or `SHIFTED_TEXTURES`.
        style: angle, frequency, phase, contrast of the pattern and gloss of the scene, each in [0, 1).
        light: direction the light comes from, radians.
        grain: noise (3, h, w) added to the finished image, resized to it; None for none.
    """

    rgb: tuple[int, int, int]
    texture: str
    style: dict[str, float]
    light: float
    grain: np.ndarray | None = None


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    centers = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(centers, centers, indexing="ij")
    return x, y


def _corners(kind: str) -> np.ndarray:
    """Return the corners of an upright shape of extent 1 around (0, 0), (number, 2)."""
    if kind == "square":
        return 0.43 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float32)
    number, inner = (3, None) if kind == "triangle" else (5, 0.46)
    steps = number if inner is None else 2 * number
    turns = 2 * np.pi * np.arange(steps) / steps - np.pi / 2
    radii = np.full(steps, 0.58)
    if inner is not None:
        radii[1::2] *= inner
    return np.stack([radii * np.cos(turns), radii * np.sin(turns)], axis=1).astype(np.float32)


_CORNERS = {kind: _corners(kind) for kind in KINDS if kind != "circle"}


def _signed_distance(shape: Shape, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance of points `x`, `y` (h, w) from the shape's edge, negative inside, as a share of the side."""
    x, y = (x - shape.center[0]) / shape.extent, (y - shape.center[1]) / shape.extent
    if shape.kind == "circle":
        return (np.hypot(x, y) - 0.5) * shape.extent
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    x, y = cos * x + sin * y, cos * y - sin * x
    corners = _CORNERS[shape.kind]
    nearest, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2, out=nearest)
        if ey:  # even-odd rule: count the edges that a ray to the right crosses
            inside ^= ((ay > y) != (by > y)) & (wx < ex * wy / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest) * shape.extent


def _pattern(texture: str, style: dict[str, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the background's pattern, (h, w) in [-1, 1]."""
    turn, pitch = math.pi * style["angle"], 2 * math.pi * (5 + 3 * style["frequency"])
    shift = 2 * math.pi * style["phase"]
    u = math.cos(turn) * x + math.sin(turn) * y
    v = math.cos(turn) * y - math.sin(turn) * x
    if texture == "plain":
        return 0.4 * np.sin(4 * u + shift) * np.sin(3 * v + shift)
    if texture == "striped":
        return np.tanh(3 * np.sin(pitch * u + shift))
    if texture == "checkered":
        return np.tanh(6 * np.sin(0.7 * pitch * u + shift) * np.sin(0.7 * pitch * v + shift))
    if texture == "dotted":
        return np.tanh(4 * (np.cos(pitch * u + shift) + np.cos(pitch * v + shift) - 0.9))
    if texture == "wavy":
        return np.tanh(3 * np.sin(pitch * u + shift + 1.5 * np.sin(9 * v)))
    if texture == "ringed":
        return np.tanh(3 * np.sin(pitch * np.hypot(x - style["phase"], y - style["contrast"])))
    return np.sin(1.4 * pitch * u + 2 * np.sin(7 * v)) * np.sin(
        1.2 * pitch * v + shift + 2 * np.sin(8 * u)
    )  # speckled


def draw(
    size: int,
    shapes: Sequence[Shape],
    background: Background,
    occluder: tuple[float, float, float] | None = None,
) -> tuple[Image.Image, list[np.ndarray]]:
    """Draw shapes, the main one first, with shadow and shading.

    Args:
        size: side of the image in pixels.
        occluder: center (x, y) and side of a gray square in front of the main shape and the background, behind the other
            shapes, as shares of the image's side; None for none.

    Returns:
        The RGB image, and per shape a (size, size) bool array: where it is visible.
    """
    style = background.style
    x, y = _grid(size)
    light = (math.cos(background.light), math.sin(background.light))
    pattern = _pattern(background.texture, style, x, y)[..., None]
    canvas = np.array(background.rgb, np.float32) + (7 + 11 * style["contrast"]) * pattern  # [H, W, 3] in 0 ... 255
    canvas *= 1 + 0.14 * (light[0] * (x - 0.5) + light[1] * (y - 0.5))[..., None]
    owner = np.full((size, size), -1)
    main_first = style["gloss"] < 0.5  # overlaps: small objects are in front of the main one, or behind it
    order = range(len(shapes)) if main_first else range(len(shapes))[::-1]
    for number in order:
        _draw_shape(canvas, owner, shapes[number], number, light)
    if occluder is not None:
        center_x, center_y, side = occluder
        hidden = (np.abs(x - center_x) < side / 2) & (np.abs(y - center_y) < side / 2) & (owner < 1)
        canvas[hidden], owner[hidden] = GRAY, -1
    if background.grain is not None:
        grain = background.grain
        planes = [np.asarray(Image.fromarray(plane).resize((size, size), Image.BILINEAR)) for plane in grain]
        canvas += np.stack(planes, axis=-1)
    image = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return image, [owner == number for number in range(len(shapes))]


def _draw_shape(canvas: np.ndarray, owner: np.ndarray, shape: Shape, number: int, light: tuple[float, float]) -> None:
    """Draw one shape into the canvas (H, W, 3), and its number into the pixels (H, W) that it covers by half or more."""
    size = len(owner)
    x, y = _grid(size)
    reach = 0.62 * shape.extent + 0.03 + 1 / size
    (left, right), (top, bottom) = (
        (max(math.floor((c - reach) * size), 0), math.ceil((c + reach) * size)) for c in shape.center
    )
    box = (slice(top, bottom), slice(left, right))
    bx, by = x[box], y[box]
    shadow = _signed_distance(shape, bx + 0.018 * light[0], by + 0.018 * light[1])
    canvas[box] *= 1 - 0.3 * np.clip(0.5 - shadow / 0.03, 0, 1)[..., None]
    distance = _signed_distance(shape, bx, by)
    cover = np.clip(0.5 - distance * size, 0, 1)  # anti-aliased: the share of the pixel that is inside
    slope = (light[0] * (bx - shape.center[0]) + light[1] * (by - shape.center[1])) / shape.extent
    shade = (1 + 0.16 * slope) * (1 - 0.2 * np.clip(1 + distance / 0.03, 0, 1))  # lit side, dark rim
    body = shade[..., None] * np.array(shape.rgb, np.float32)
    canvas[box] += cover[..., None] * (body - canvas[box])
    owner[box][cover > 0.5] = number


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Return a mask as uncompressed COCO run lengths: column by column, beginning with zeros (perhaps none)."""
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: len(edges) + (edges[-1] < mask.size)].tolist()}
