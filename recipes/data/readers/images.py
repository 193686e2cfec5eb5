# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Opening images by the rules of `processing.image_reading_deem`, refused with a reason that can be counted."""

import os
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from processing.image_reading_deem import check_size, decode, open_file, to_rgb
from recipes.data.faults import BadSample

# The first that a tar holds is taken.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "jfif", "jpe", "bmp", "gif", "tif", "tiff", "avif", "jp2", "j2k")
_READ = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")
_NOT_READ = (b"<svg", b"\xff\x0a", b"\0\0\0\x0cJXL", b"8BPS", b"II\xbc\x01")  # SVG, JPEG XL, Photoshop, JPEG XR
_TURNED_BACK = {  # EXIF orientation -> what turns an upright image to it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def open_image(source: Path | bytes | Image.Image, name: str, as_stored: bool = False) -> Image.Image:
    """Return a fully decoded RGB image of a file, of bytes, or of what `datasets` has opened; what is transparent lies on
    white.

    Args:
        source: where its bytes are, or the image.
        name: what it is called if it is unusable.
        as_stored: return the pixels as they are stored, whatever the EXIF orientation says: boxes and masks are drawn on
            those. Else the orientation is kept, for the image processor.

    Raises:
        BadSample: "missing image", "empty image", "not an image", "image of a kind that is not read" (HEIC, SVG, ...),
            "image too large" (see `check_size`; judged before decoding), "truncated or broken image", "image of floating
            point numbers" or "image whose white is not known" (see `to_rgb`).
    """
    image = source if isinstance(source, Image.Image) else _opened(source, name)
    try:
        check_size(*image.size)
    except ValueError as error:
        raise BadSample("image too large", name) from error
    converted = None
    try:
        orientation = _orientation(image)
        decode(image)
        converted = _as_rgb(image, name)
        return _as_stored(converted, orientation) if as_stored else converted
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise BadSample("truncated or broken image", name) from error
    finally:
        if image is not source and image is not converted:
            image.close()


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        return to_rgb(image)
    except ValueError as error:
        reason = "image of floating point numbers" if image.mode == "F" else "image whose white is not known"
        raise BadSample(reason, name) from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none. Broken EXIF data, which would raise again later, is removed."""
    probe = Image.new("1", (1, 1))
    probe.info = image.info
    try:
        probe.getexif()  # as copies of the image will read it; the file itself may have swallowed the error
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as Pillow's decoders
        image.info = {name: value for name, value in image.info.items() if "exif" not in str(name).lower()}
        return 1


def _as_stored(image: Image.Image, orientation: int) -> Image.Image:
    """Return a loaded image as its pixels are stored, without an orientation; `orientation` is that before loading."""
    if orientation in _TURNED_BACK and _orientation(image) == 1:
        return image.transpose(_TURNED_BACK[orientation])  # Pillow turns TIFF files upright while it loads them
    stored = image.copy()  # an image file would keep the orientation that it has read, also without its `info`
    stored.info.clear()
    return stored


def _opened(source: Path | bytes, name: str) -> Image.Image:
    """Open an image: its header is read, its pixels are not."""
    if isinstance(source, Path) and not os.path.isfile(source):  # False, too, for names that no file can have
        raise BadSample("missing image", name[:200])
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise BadSample("empty image", name)
    try:
        return open_file(source)
    except Image.DecompressionBombError as error:
        raise BadSample("image too large", name) from error
    except UnidentifiedImageError as error:
        if isinstance(source, Path):
            with open(source, "rb") as file:
                source = file.read(512)
        raise BadSample(_why_unidentified(source), name) from error
    except Exception as error:  # as above
        raise BadSample("truncated or broken image", name) from error


def _why_unidentified(data: bytes) -> str:
    if data.startswith(_READ) or data[4:12] in (b"ftypavif", b"ftypavis"):
        return "truncated or broken image"
    known = data.startswith(_NOT_READ) or data[4:8] == b"ftyp" or b"<svg" in data[:512]
    return "image of a kind that is not read" if known else "not an image"
