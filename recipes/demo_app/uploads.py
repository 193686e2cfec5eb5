# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files and strokes of a user -> images and regions. What a user is told names the file, never its folder."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from processing.image_reading_deem import read_image, to_rgb
from processing.regions_deem import Region

MARKS = ("mask", "box", "point")


def image_upload(**options: Any) -> gr.Image:
    """A `gradio.Image` that gives the uploaded file as it is: Gradio would open it itself, and fail without a sentence."""
    image = gr.Image(sources=["upload", "clipboard"], **options)
    image.preprocess = _path_of  # a subclass would write a stub beside it
    return image


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def open_upload(file: str | dict[str, Any] | None) -> Image.Image:
    """Read an uploaded file as the model's own image processor does.

    Args:
        file: its path, or a dict with it, as Gradio gives a message that is asked again.

    Raises:
        ValueError: there is none (any more), or it is no image that can be read.
    """
    path = file["path"] if isinstance(file, dict) else file
    if not path:
        raise ValueError("There is no image yet: upload one first.")
    name = Path(path).name
    try:
        return read_image(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{name} is no longer there: upload it again.") from error
    except ValueError as error:
        reason = error.__cause__ if isinstance(error.__cause__, ValueError) else "no image format"
        raise ValueError(
            f"{name} cannot be read as an image ({str(reason)[:200]}). Upload a whole PNG, JPEG, WebP, GIF or TIFF file."
        ) from error


def marked_image(editor: dict[str, Any] | None, mark: str, radius: float) -> tuple[Image.Image, Any] | None:
    """The image of an editor and the region marked in it; None where there is no image.

    Args:
        editor: value of a `gradio.ImageEditor` of type "pil".
        mark: what strokes mean: the mask that they paint, the box around them, or the disc around their middle.
        radius: of the disc, as a share of the image's shorter side.

    Returns:
        The image (RGB, on white), and its region as the image processor takes it, None without strokes.

    Raises:
        ValueError: something is painted, and there is no image below.
    """
    if editor is None or editor.get("background") is None:
        return None
    image = editor["background"].convert("RGBA")
    painted = np.zeros(image.size[::-1], dtype=bool)
    for layer in editor["layers"]:
        painted |= np.asarray(layer.convert("RGBA").resize(image.size, Image.Resampling.NEAREST))[..., 3] > 0
    if not image.getchannel("A").getextrema()[1]:
        if painted.any():
            raise ValueError("Something is painted, but on no image: upload one into the editor first.")
        return None
    if not painted.any():
        return to_rgb(image), None
    rows, columns = np.nonzero(painted)
    if mark == "mask":
        region: Any = painted
    elif mark == "box":
        region = Region(box=(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    else:
        region = Region(point=(float(columns.mean()), float(rows.mean())), radius=radius)
    return to_rgb(image), region
