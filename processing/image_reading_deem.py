# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What an image is before anything is computed of it: read from anywhere, upright, RGB, of a size that can be worked on.

The one place of these rules: the image processor and the data readers of the recipes call it.
"""

import base64
import os
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from huggingface_hub.utils import httpx
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
MAX_PROPORTION = 30  # the center crop would first enlarge a longer strip to gigabytes
MAX_DOWNLOAD = 256 * 1024 * 1024  # bytes
SECONDS_TO_ANSWER, SECONDS_TO_SEND = 10, 60

_ORIENTATION = 0x0112
_TURN = {  # EXIF orientation -> what turns an image upright. `exif_transpose` fails on EXIF data that it cannot write
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS_OF_PNG = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_SHADES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # raw mode of a PNG -> what takes its values to 8 bits


def read_image(source: str | os.PathLike | bytes) -> PIL.Image.Image:
    """Load an image from a path, a URL, base64 (also as a data URI) or the bytes of a file, upright, in its own mode.

    Raises:
        ValueError: for what cannot be read, named, with the reason.
    """
    name = f"{len(source)} bytes" if isinstance(source, (bytes, bytearray, memoryview)) else os.fspath(source)
    try:
        image = open_file(_file_of(source))
        check_size(*image.size)
        if getattr(image, "is_animated", False):
            with image:  # which else stays open
                image = image.copy()
        return upright(image)
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise ValueError(
            f"Could not read the image {str(name)[:200]!r} ({type(error).__name__}: {str(error)[:300]}). Give the "
            "path, URL, base64 text or bytes of a whole image file in a format that Pillow reads."
        ) from error


def _file_of(source: Any) -> str | bytes:
    """The path of a file, or its bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        return _download(name)
    if name.startswith("data:") and "," in name:
        return base64.b64decode("".join(name.split(",", 1)[1].split()), validate=True)
    try:
        if os.path.isfile(name):
            return name
        data = base64.b64decode("".join(name.split()), validate=True)
    except ValueError:  # not base64, or a name that no file can have
        data = b""
    if len(data) < 32:  # a name may happen to be base64, but not of an image
        raise FileNotFoundError("no such file, and neither a URL nor base64 of an image")
    return data


def _download(url: str) -> bytes:
    data, end = bytearray(), time.monotonic() + SECONDS_TO_SEND
    with httpx.stream("GET", url, timeout=SECONDS_TO_ANSWER, follow_redirects=True) as response:
        response.raise_for_status()
        for piece in response.iter_bytes():
            data += piece
            if len(data) > MAX_DOWNLOAD:
                raise ValueError(f"more than {MAX_DOWNLOAD} bytes")
            if time.monotonic() > end:
                raise ValueError(f"not sent within {SECONDS_TO_SEND} seconds")
    return bytes(data)


def open_file(source: str | os.PathLike | bytes) -> PIL.Image.Image:
    """Open an image by its path or bytes as Pillow does, its pixels not yet read, and with Pillow's errors.

    Texts and color profiles of a PNG that unpack to more than Pillow allows are left out. PostScript is not identified:
    Pillow would run it.
    """
    try:
        image = PIL.Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        _check_is_no_program(image)
        return image
    except ValueError:  # of such a text
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not data.startswith(_PNG):
            raise
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        length = 12 + int.from_bytes(data[at : at + 4], "big")  # with its name and checksum
        if data[at + 4 : at + 8] not in _TEXTS_OF_PNG:
            kept.append(data[at : at + length])
        at += length
    return PIL.Image.open(BytesIO(b"".join(kept)))


def _check_is_no_program(image: PIL.Image.Image) -> None:
    if image.format == "EPS":
        raise PIL.UnidentifiedImageError("a PostScript program, which is not run")


def decode(image: PIL.Image.Image) -> PIL.Image.Image:
    """Read the pixels of an opened image, with Pillow's errors, and the color that a PNG calls transparent as they are read."""
    _check_is_no_program(image)
    if image.format == "PNG" and getattr(image, "tile", None) and "transparency" in image.info:
        color, scale = image.info["transparency"], _SHADES.get(image.tile[0][3])
        if scale is not None:
            image.info["transparency"] = (
                tuple(int(value * scale) for value in color) if isinstance(color, tuple) else int(color * scale)
            )
    image.load()
    return image


def check_size(width: int, height: int) -> None:
    """Refuse sizes that no image can be made of, or only with gigabytes; judged before decoding.

    Raises:
        ValueError: no pixel, more than `MAX_PIXELS`, or a strip longer than `MAX_PROPORTION` times its other side.
    """
    if not (width and height):
        raise ValueError(f"An image of {height} x {width} (height x width) has no pixel. Give one with both sides.")
    if width * height > MAX_PIXELS or max(width, height) > MAX_PROPORTION * min(width, height):
        raise ValueError(
            f"An image of {height} x {width} (height x width) is too large: at most {MAX_PIXELS} pixels, and one side "
            f"at most {MAX_PROPORTION} times the other. Shrink or crop it first."
        )


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Load an image and turn it as its EXIF orientation says; broken EXIF data say nothing.

    Raises:
        ValueError: for pixels that cannot be decoded, with the file's name where it is known, and all of `check_size`.
    """
    check_size(*image.size)
    try:
        decode(image)  # PIL reads lazily: a broken file shows here at the latest
    except Exception as error:  # Pillow's decoders raise errors of any kind
        name = getattr(image, "filename", "") or f"{image.format or 'PIL'} image of {image.width}x{image.height}"
        raise ValueError(f"Could not read the image {str(name)!r} ({error}). Replace the file or drop it.") from error
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as above
        return image
    if orientation not in _TURN:
        return image
    turned = image.transpose(_TURN[orientation])
    turned.info = {
        name: value for name, value in image.info.items() if name == "transparency"
    }  # its EXIF data no longer
    return turned


def to_rgb(image: PIL.Image.Image | np.ndarray | torch.Tensor, channels_first: bool | None = None) -> PIL.Image.Image:
    """Return an image of any kind as RGB, 8 bits per channel; transparency lies on white.

    Args:
        image: a PIL image, which keeps its EXIF data, or an array `(H, W)`, `(H, W, C)` or `(C, H, W)` with C of 1
            (gray), 2 (gray, alpha), 3 or 4 (RGB, alpha). What is white follows from its type: True; 255 of 8 bits;
            65535 of 16 bits (PIL's modes `I` and `I;16`, uint16); 255 of wider integers; 1 of floats up to 1, 255 of
            floats up to 255.
        channels_first: layout of an array; None to see it from its shape.

    Raises:
        ValueError: no pixel or too many, numbers of channels or dimensions other than these, values outside of these
            ranges or of which nothing says what is white (PIL's mode `F`).
    """
    if not isinstance(image, PIL.Image.Image):
        return _on_white(_array_to_image(image, channels_first))
    check_size(*image.size)
    if image.mode == "F":
        raise ValueError(
            "An image of floating point numbers (PIL mode F): nothing says which value is white. Give it as an array of "
            "floats in 0 ... 1, or save it with 8 or 16 bits."
        )
    if image.mode == "I" or image.mode.startswith("I;16"):  # `convert` would cut them at 255
        return _of_sixteen_bits(image)
    try:
        return _on_white(image)
    except Exception as error:  # as in `decode`; a palette may be missing, a transparent color none of its mode
        raise ValueError(
            f"An image of mode {image.mode} cannot be made RGB ({type(error).__name__}: {error}). Save it again as RGB."
        ) from error


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any 8-bit mode -> RGB; an RGB image without transparency is not copied."""
    if not image.has_transparency_data:
        plain = image.mode == "RGB" and not getattr(image, "is_animated", False)
        return image if plain else image.convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = PIL.Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    white.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return white


def _of_sixteen_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Gray of 16 bits, or of 32 that hold 16 -> RGB; a transparent shade is white."""
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535 or (image.mode == "I" and 0 < high < 256):
        raise ValueError(
            f"A gray image of whole numbers from {low} to {high} (PIL mode {image.mode}): nothing says which value is "
            "white. Expected are 16 bits, white being 65535; save it with 8 or 16 bits."
        )
    gray = _eight_bits_of_sixteen(array)
    if isinstance(shade := image.info.get("transparency"), int):
        gray[array == shade] = 255
    rgb = PIL.Image.fromarray(gray).convert("RGB")
    rgb.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return rgb


def _eight_bits_of_sixteen(array: np.ndarray) -> np.ndarray:
    """0 ... 65535 -> uint8, to the nearest."""
    eight = np.empty(array.shape, dtype=np.uint8)
    for start in range(0, len(array), 256):  # the sums of all rows at once would take four times as much as the image
        eight[start : start + 256] = (array[start : start + 256].astype(np.uint32) + 128) // 257
    return eight


def as_array(image: Any) -> np.ndarray:
    """A tensor on any device, a PIL image or what NumPy takes as an array of the same type (bfloat16 as float32)."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    return np.asarray(image)


def _array_to_image(array: Any, channels_first: bool | None) -> PIL.Image.Image:
    array = _channels_last(as_array(array), channels_first)
    check_size(array.shape[1], array.shape[0])
    channels = array.shape[2]
    array = np.ascontiguousarray(_as_eight_bits(array))
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    return PIL.Image.frombytes(mode, (array.shape[1], array.shape[0]), array.tobytes())


def _channels_last(array: np.ndarray, channels_first: bool | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C) with 1 to 4 channels."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim == 3:
        for counts in ((1, 3, 4), (2,)):
            try:
                first = infer_channel_dimension_format(array, num_channels=counts) == ChannelDimension.FIRST
            except ValueError:  # neither end is one of these
                continue
            first = first if channels_first is None else channels_first
            if array.shape[0 if first else 2] in counts:
                return np.moveaxis(array, 0, -1) if first else array
    raise ValueError(
        f"An array of shape {array.shape} is no image. Give (height, width), (height, width, channels) or (channels, "
        "height, width) with 1, 2, 3 or 4 channels: gray, gray and alpha, RGB, RGB and alpha."
    )


def _as_eight_bits(array: np.ndarray) -> np.ndarray:
    """An array (H, W, C) of any type as uint8; see `to_rgb` for what is white."""
    kind = array.dtype.kind
    if kind == "b":
        return array * np.uint8(255)
    if array.dtype == np.uint8:
        return array
    if kind == "u" and array.dtype.itemsize == 2:
        return _eight_bits_of_sixteen(array)
    low, high = (array.min(), array.max()) if kind in "iuf" else (np.nan, np.nan)
    if kind in "iu" and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if kind == "f":
        white = 1.0 if high <= 1.001 else 255.0
        alpha = array[..., -1].max() if array.shape[2] in (2, 4) else white
        two_scales = white == 255 and (high < 2 or 0 < alpha <= 1)  # 1.02 may be a white that overshoots
        if low >= -0.001 * white and high <= 1.001 * white and not two_scales:  # not so for NaN
            return np.rint(array.clip(0, white) * np.float32(255 / white)).astype(np.uint8)
    raise ValueError(
        f"An array of {array.dtype} with values from {low} to {high} is no image of a known range. Give bool, uint8 (0 "
        "... 255), uint16 (0 ... 65535), other integers in 0 ... 255, or floats in 0 ... 1 or 0 ... 255, alpha alike."
    )


__all__ = [
    "MAX_PIXELS",
    "MAX_PROPORTION",
    "as_array",
    "check_size",
    "decode",
    "open_file",
    "read_image",
    "to_rgb",
    "upright",
]
