# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files and strokes of a user -> images and regions. What a user is told names the file, never its folder."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from processing.image_reading_deem import read_image
from processing.regions_deem import Region

MARKS = ("mask", "box", "point")


def image_upload(**options: Any) -> gr.Image:
    """A `gradio.Image` that gives the uploaded file as it is: Gradio would open it itself, and fail without a sentence."""
    image = gr.Image(sources=["upload", "clipboard"], **options)
    image.preprocess = lambda payload: (
        None if payload is None else payload.path
    )  # a subclass would write a stub beside it
    return image


def open_upload(path: str | None) -> Image.Image:
    """Read an uploaded file as the model's own image processor does.

    Raises:
        ValueError: there is none, or it is no image that can be read.
    """
    if not path:
        raise ValueError("There is no image yet: upload one first.")
    try:
        return read_image(Path(path).read_bytes())
    except ValueError as error:
        reason = str(error.__cause__ or error)[:200] if not isinstance(error.__cause__, OSError) else "no image format"
        raise ValueError(
            f"{Path(path).name} cannot be read as an image ({reason}). Upload a whole PNG, JPEG, WebP, GIF or TIFF file."
        ) from error


def marked_image(editor: dict[str, Any] | None, mark: str, radius: float) -> tuple[Image.Image, Any] | None:
    """The image of an editor and the region marked in it; None where there is no image.

    Args:
        editor: value of a `gradio.ImageEditor` of type "pil".
        mark: what strokes mean: the mask that they paint, the box around them, or the disc around their middle.
        radius: of the disc, as a share of the image's shorter side.

    Returns:
        The image (RGB), and its region as the image processor takes it, None without strokes.
    """
    if editor is None or editor.get("background") is None:
        return None
    image = editor["background"]
    painted = np.zeros(image.size[::-1], dtype=bool)
    for layer in editor["layers"]:
        painted |= np.asarray(layer.convert("RGBA").resize(image.size, Image.Resampling.NEAREST))[..., 3] > 0
    if not painted.any():
        return image.convert("RGB"), None
    rows, columns = np.nonzero(painted)
    if mark == "mask":
        region: Any = painted
    elif mark == "box":
        region = Region(box=(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    else:
        region = Region(point=(float(columns.mean()), float(rows.mean())), radius=radius)
    return image.convert("RGB"), region
