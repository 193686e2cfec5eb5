# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Opening images: what training sees is what a user's image is at inference, or it is refused with the true reason."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import fault
from PIL import Image, ImageDraw, PngImagePlugin

from recipes.data.faults import BadSample
from recipes.data.readers.images import open_image

SIZE = (40, 30)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def logo(mode: str) -> Image.Image:
    """A red shape on what is transparent."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((10, 5, 29, 24), fill=(200, 30, 30, 255))
    return image.convert(mode)


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + chunk(name, data) + png[33:]


def sources() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Files with a transparent corner, and the color of their middle."""
    plain = Image.new("RGB", SIZE, (7, 8, 9))
    ImageDraw.Draw(plain).rectangle((10, 5, 29, 24), fill=(200, 30, 30))
    palette = plain.quantize(4)
    corner = palette.getpixel((0, 0))
    red = (200, 30, 30)
    rest = bytes(0 if index == corner else 255 for index in range(4))
    return {
        "RGBA png": (encoded(logo("RGBA"), "PNG"), red),
        "RGBA webp": (encoded(logo("RGBA"), "WEBP", lossless=True), red),
        "RGBA tiff": (encoded(logo("RGBA"), "TIFF"), red),
        "LA png": (encoded(logo("LA"), "PNG"), (81, 81, 81)),
        "RGB tRNS": (encoded(plain, "PNG", transparency=(7, 8, 9)), red),
        "P tRNS": (encoded(palette, "PNG", transparency=corner), red),
        "P tRNS bytes": (encoded(palette, "PNG", transparency=rest), red),
        "GIF": (encoded(palette, "GIF", transparency=corner), red),
        "L tRNS": (encoded(plain.convert("L"), "PNG", transparency=plain.convert("L").getpixel((0, 0))), (81, 81, 81)),
    }


@pytest.mark.parametrize("name", sources())
@pytest.mark.parametrize("as_stored", [False, True])
def test_transparency_lies_on_white_as_at_inference(tmp_path, tiny_processor, name, as_stored):
    data, middle = sources()[name]
    (tmp_path / "a").write_bytes(data)
    stored = Image.open(io.BytesIO(data))
    for source in (data, tmp_path / "a", stored):
        opened = open_image(source, "a", as_stored)
        assert opened.mode == "RGB" and opened.size == SIZE
        assert opened.getpixel((0, 0)) == (255, 255, 255)
        assert max(abs(a - b) for a, b in zip(opened.getpixel((20, 15)), middle, strict=True)) <= 4
        seen = tiny_processor.image_processor(str(tmp_path / "a"), return_tensors="pt")["pixel_values"]
        trained = tiny_processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        assert (seen == trained).all()


@pytest.mark.parametrize("kind, suffix", [("PNG", "png"), ("TIFF", "tif")])
def test_gray_of_sixteen_bits_is_the_same_in_training_and_at_inference(tmp_path, tiny_processor, kind, suffix):
    for top in (65535, 4095):
        gray = np.linspace(0, top, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)
        file = tmp_path / f"{top}.{suffix}"
        file.write_bytes(encoded(Image.fromarray(gray), kind))
        opened = open_image(file, file.name)
        assert opened.getpixel((39, 29)) == (round(top / 257),) * 3
        seen = tiny_processor.image_processor(str(file), return_tensors="pt")["pixel_values"]
        assert (seen == tiny_processor.image_processor(opened, return_tensors="pt")["pixel_values"]).all()


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_sound_images_with_large_texts_and_profiles_are_read(tmp_path, name):
    packed = zlib.compress(bytes(3 * PngImagePlugin.MAX_TEXT_CHUNK))
    text = b"Comment\0\0" if name != b"iTXt" else b"Comment\0\1\0\0\0"
    png = with_chunk(encoded(Image.new("RGB", SIZE, (20, 200, 20)), "PNG"), name, text + packed)
    (tmp_path / "a.png").write_bytes(png)
    for source in (png, tmp_path / "a.png"):
        assert open_image(source, "a.png").getpixel((5, 5)) == (20, 200, 20)
    with pytest.raises(BadSample, match="truncated or broken image: a.png"):
        open_image(png[:-40], "a.png")


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty image"),
        (b"this is text", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image of a kind that is not read"),
        (b"<?xml version='1.0'?><svg/>", "image of a kind that is not read"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "image of a kind that is not read"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "image of a kind that is not read"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "truncated or broken image"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "truncated or broken image"),
        (b"II*\0" + bytes(40), "truncated or broken image"),
        (b"BM" + bytes(10), "truncated or broken image"),
        (b"RIFF\x10\0\0\0WEBP" + bytes(8), "truncated or broken image"),
    ],
)
def test_the_reason_is_the_true_one(tmp_path, data, reason):
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a"):
        with pytest.raises(BadSample, match=f"{reason}: a"):
            open_image(source, "a")


def test_gray_whose_white_is_not_known_is_refused():
    with pytest.raises(BadSample, match="image whose white is not known: a"):
        open_image(Image.fromarray(np.full((8, 8), -5, np.int32)), "a")


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"]
)
def test_every_kind_that_pillow_reads(kind):
    image = Image.new("RGB", (32, 32), (20, 200, 20))
    opened = open_image(encoded(image, kind), "a")
    assert opened.mode == "RGB" and max(np.abs(np.subtract(opened.getpixel((5, 5)), (20, 200, 20)))) < 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I;16", "RGBA", "LA", "RGBX"])
def test_every_mode(mode):
    assert open_image(Image.new(mode, (8, 8)), "a").mode == "RGB"


def test_the_given_images(tiny_processor):
    for file in sorted(fault("pictures").iterdir()):
        opened = open_image(Path(file), file.name)
        seen = tiny_processor.image_processor(str(file), return_tensors="pt")["pixel_values"]
        assert (tiny_processor.image_processor(opened, return_tensors="pt")["pixel_values"] == seen).all(), file.name
