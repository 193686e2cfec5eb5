# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Sound inputs made bad, each by one seeded generator: bytes, images, JSON, tensors."""

import copy
import io
import math
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "BMP": ("1", "L", "RGB"),
    "PPM": ("L", "RGB"),
    "ICO": ("RGBA",),
    "TGA": ("L", "RGB", "RGBA"),
}
STRANGE = (
    None, True, 0, -1, 3, 10**12, 0.5, math.nan, math.inf, -math.inf, "", " ", "<image>", "nan", "a" * 20_000, "\x00", "\ud800",
    "../../etc/passwd", "/etc/passwd", "data:image/png;base64,AAAA", "gone.jpg", [], [[]], [None], {}, {"a": 1},
    {"bytes": None, "path": None}, [1, 2, 3], [0.1, -5, math.nan, 9e9],
)  # fmt: skip


def sound_image(rng: random.Random) -> tuple[Image.Image, str]:
    """An image of a random mode and size, and a format that takes it."""
    kind = rng.choice(list(MODES))
    mode = rng.choice(MODES[kind])
    width, height = rng.randint(1, 90), rng.randint(1, 90)
    noise = np.random.default_rng(rng.randrange(2**32))
    if mode == "I;16":
        image = Image.fromarray(noise.integers(0, 65536, (height, width)).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(noise.normal(size=(height, width)).astype(np.float32))
    else:
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    return image, kind


def encoded(image: Image.Image, kind: str, rng: random.Random) -> bytes:
    """The file; sometimes with EXIF data of any orientation, or a transparent color."""
    options: dict[str, Any] = {}
    if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.4:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
        options["exif"] = exif
    if kind == "PNG" and image.mode in ("L", "P") and rng.random() < 0.4:
        options["transparency"] = rng.randrange(256)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def spoiled_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, swapped, repeated, or with another size in the header of a PNG."""
    way = rng.choice(["cut", "flip", "swap", "repeat", "zero", "header", "head", "text", "same"])
    at = rng.randrange(len(data)) if data else 0
    if way == "cut":
        return data[:at]
    if way == "flip":
        spoiled = bytearray(data)
        for _ in range(rng.choice([1, 1, 3, 20])):
            if spoiled:
                spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        return bytes(spoiled)
    if way == "swap":
        other = rng.randrange(len(data)) if data else 0
        low, high = sorted((at, other))
        return data[:low] + data[high:] + data[low:high]
    if way == "repeat":
        return data[:at] + data[at : at + 64] * rng.choice([2, 50]) + data[at:]
    if way == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    if way == "header" and data[:4] == b"\x89PNG":
        size = [rng.choice([0, 1, 20_000, 2**31 - 1, 2**32 - 1]) for _ in range(2)]
        head = struct.pack(">II", *size) + data[24:29]
        return data[:8] + png_chunk(b"IHDR", head) + data[33:]
    if way == "head":
        return bytes(rng.randrange(256) for _ in range(16)) + data[16:]
    if way == "text" and data[:4] == b"\x89PNG":
        return (
            data[:33]
            + png_chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(rng.choice([10, 5_000_000]))))
            + data[33:]
        )
    return data


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return found
    for key, inner in pairs:
        found += places(inner, (*path, key))
    return found


def spoiled_json(value: Any, rng: random.Random) -> Any:
    """A copy with some of its values taken out, doubled or exchanged for strange ones."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 5])):
        found = places(value)
        if not found:
            return rng.choice(STRANGE)
        *way, last = rng.choice(found)
        holder = value
        for key in way:
            holder = holder[key]
        kind = rng.choice(["strange", "strange", "strange", "delete", "wrap", "double", "text"])
        if kind == "strange":
            holder[last] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == "delete":
            del holder[last]
        elif kind == "wrap":
            holder[last] = [holder[last]]
        elif kind == "text":
            holder[last] = str(holder[last])
        elif isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
    return value


def strange_array(rng: random.Random) -> np.ndarray:
    """An array of any kind, shape and content."""
    noise = np.random.default_rng(rng.randrange(2**32))
    side = lambda: rng.choice([0, 1, 2, 3, 4, 5, 17, 64])  # noqa: E731
    shape = tuple(side() for _ in range(rng.choice([0, 1, 2, 3, 3, 3, 4, 5])))
    kind = rng.choice(
        ["uint8", "uint16", "int32", "int64", "float16", "float32", "float64", "bool", "complex64", "U3", "O"]
    )
    if kind == "U3":
        return np.full(shape, "abc")
    if kind == "O":
        return np.full(shape, None, dtype=object)
    array = noise.normal(size=shape) * rng.choice([0.1, 1, 300, 1e30])
    if rng.random() < 0.2 and array.size:
        array.flat[rng.randrange(array.size)] = rng.choice([math.nan, math.inf, -math.inf])
    with np.errstate(all="ignore"):
        return array.astype(kind)
