# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""One rule for what an image is, by every door: transparency, orientation, depth, sizes, files and addresses."""

import base64
import io
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from processing import DeemImageProcessorPil

try:
    import torchvision  # noqa: F401

    from processing import DeemImageProcessor

    BACKENDS = [DeemImageProcessorPil, DeemImageProcessor]
except ImportError:
    BACKENDS = [DeemImageProcessorPil]

SHARED = Path(__file__).resolve().parents[2] / "../shared/faults/pictures"


@pytest.fixture(params=BACKENDS)
def seen(request):
    """What the encoder is shown of anything that users give: (N, 16, 16, 3), 0 ... 255."""
    processor = request.param(
        size={"height": 16, "width": 16}, target_size=16, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )

    def show(images, **options) -> np.ndarray:
        pixels = processor(images, return_tensors="pt", **options)["pixel_values"]
        return (pixels * 255).permute(0, 2, 3, 1).numpy().round(3)

    return show


@pytest.fixture
def server(tmp_path) -> Iterator[str]:
    """Serves `tmp_path`; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = tmp_path / self.path.lstrip("/")
            self.send_response(200 if path.is_file() else 404)
            self.end_headers()
            if path.is_file():
                self.wfile.write(path.read_bytes())

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def doors(data: bytes, folder: Path, address: str) -> list:
    """The same file by every door, opened by Pillow where it can be."""
    (folder / "image").write_bytes(data)
    text = base64.b64encode(data).decode()
    try:
        opened = [Image.open(folder / "image")]
    except ValueError:
        opened = []
    return [
        data,
        bytearray(data),
        folder / "image",
        str(folder / "image"),
        f"{address}/image",
        text,
        f"data:image/png;base64,{text}",
        *opened,
    ]


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A file as Pillow would not write it; `color` 0 is gray, 2 RGB; each of `rows` starts with its filter, 0."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    everything = [header, *chunks, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in everything)


# ---- transparency ----


def logo(mode: str) -> Image.Image:
    """Black everywhere; the left half is transparent."""
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, :8] = 0
    rgba = Image.fromarray(np.dstack([np.zeros((16, 16, 3), np.uint8), alpha]))
    if mode == "PA":  # `convert` loses the alpha channel
        image = Image.frombytes("PA", (16, 16), np.dstack([np.zeros_like(alpha), alpha]).tobytes())
        image.putpalette([0] * 768)
        return image
    return rgba.convert(mode)


def keyed(mode: str) -> tuple[Image.Image, dict]:
    """Left half of one color, that is named as the transparent one, right half black."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 7
    if mode == "RGB":
        return Image.fromarray(np.dstack([pixels] * 3)), {"transparency": (7, 7, 7)}
    if mode == "I;16":
        return Image.fromarray(pixels.astype(np.uint16)), {"transparency": 7}
    if mode == "1":
        return Image.fromarray(pixels > 0), {"transparency": 255}
    image = Image.fromarray(pixels)
    if mode == "L":
        return image, {"transparency": 7}
    palette = Image.fromarray(pixels)
    palette.putpalette([0] * 768)
    return palette, {"transparency": 7 if mode == "P" else bytes([255] * 7 + [0])}


HALF = np.concatenate([np.full((1, 16, 8, 3), 255.0), np.zeros((1, 16, 8, 3))], axis=2)
LOGOS = [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("PA", "TIFF")]
LOGOS += [("RGBA", "GIF")]


@pytest.mark.parametrize("mode, form", LOGOS)
def test_transparency_lies_on_white_by_every_door(seen, tmp_path, server, mode, form) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    for door in doors(encoded(logo(mode), form, **options), tmp_path, server):
        assert (seen(door) == HALF).all(), type(door)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "P with bytes", "I;16"])
def test_a_transparent_color_is_white_by_every_door(seen, tmp_path, server, mode) -> None:
    image, options = keyed(mode)
    for door in doors(encoded(image, "PNG", **options), tmp_path, server):
        assert (seen(door) == HALF).all(), type(door)


@pytest.mark.parametrize("depth, color, shade", [(1, 0, 1), (2, 0, 1), (4, 0, 7), (16, 0, 40000), (16, 2, 40000)])
def test_a_transparent_color_of_any_depth_is_white(seen, tmp_path, server, depth, color, shade) -> None:
    values = ([shade] * 8 + [0] * 8) if color == 0 else ([shade] * 24 + [0] * 24)
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    key = struct.pack(">H", shade) * (1 if color == 0 else 3)
    for door in doors(png(16, 16, depth, color, row * 16, (b"tRNS", key)), tmp_path, server):
        assert (seen(door) == HALF).all(), type(door)


def test_transparency_made_in_memory_lies_on_white(seen) -> None:
    for mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        assert (seen(logo(mode) if mode[-1] == "A" else logo(mode[:-1] + "A").convert(mode)) == HALF).all(), mode


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64, bool, np.float32, np.float64, np.float16])
def test_arrays_with_alpha_lie_on_white(seen, dtype) -> None:
    white = {"b": 1, "f": 1, "u": np.iinfo(dtype).max if dtype in (np.uint8, np.uint16) else 0, "i": 255}
    for mode in ("RGBA", "LA"):
        array = np.asarray(logo(mode))
        array = ((array > 0) * white[np.dtype(dtype).kind]).astype(dtype)
        for one in (array, array.transpose(2, 0, 1)):
            assert (seen(one) == HALF).all()
            if dtype != np.uint16:
                assert (seen(torch.from_numpy(np.ascontiguousarray(one))) == HALF).all()


def test_half_transparent_is_half_white_by_every_door(seen, tmp_path, server) -> None:
    image = Image.new("RGBA", (16, 16), (200, 0, 100, 51))
    expected = np.array([244, 204, 224])
    for door in [*doors(encoded(image, "PNG"), tmp_path, server), np.asarray(image), np.asarray(image) / 255]:
        assert (seen(door) == expected).all(), type(door)


# ---- depth ----


@pytest.mark.parametrize("most", [65535, 4095])
def test_gray_of_sixteen_bits_is_scaled_by_every_door(seen, tmp_path, server, most) -> None:
    array = np.linspace(0, most, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.rint(array / 257)[None, ..., None].repeat(3, axis=3)
    inputs = [array, array[None], array[..., None], torch.from_numpy(array.astype(np.uint16)), Image.fromarray(array)]
    inputs += [Image.fromarray(array.astype(np.int32))]
    for form in ("PNG", "TIFF"):
        inputs += doors(encoded(Image.fromarray(array), form), tmp_path, server)
    for one in inputs:
        assert (seen(one) == expected).all(), type(one)


def test_floats_and_bools_have_their_own_white(seen) -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        atol = 1 if dtype in (torch.float16, torch.bfloat16) else 0
        tensor = torch.from_numpy(array)
        for one in ((tensor.double() / 255).to(dtype), tensor.to(dtype)):
            np.testing.assert_allclose(seen(one)[0], array, atol=atol)
            np.testing.assert_allclose(seen(one.permute(2, 0, 1).clone().requires_grad_())[0], array, atol=atol)
    for integer in (np.int8, np.int32, np.int64, np.uint32):
        small = array // 2
        assert (seen(small.astype(integer))[0] == small).all()
    half = np.zeros((16, 16), bool)
    half[:, :8] = True
    for one in (half, torch.from_numpy(half), half[..., None], Image.fromarray(half)):
        assert (seen(one) == HALF).all()


def test_floats_that_are_not_rescaled_stay_as_fine_as_they_are(seen) -> None:
    array = np.random.default_rng(0).random((3, 16, 16), dtype=np.float32)
    shown = seen(array, do_rescale=False, do_resize=False)[0]
    np.testing.assert_allclose(shown, array.transpose(1, 2, 0) * 255, atol=0.01)


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8, 3), -1.0),
        np.full((8, 8, 3), np.nan),
        np.full((8, 8, 3), np.inf),
        np.full((8, 8, 3), 256.0),
        np.full((8, 8, 3), 1.02),  # a white that overshoots, or nearly black?
        np.dstack([np.full((8, 8, 3), 200.0), np.ones((8, 8, 1))]),  # alpha on another scale
        np.full((8, 8, 3), 256),
        np.full((8, 8, 3), -1),
        np.full((8, 8, 3), 1j),
        np.full((8, 8, 3), "a"),
        np.full((8, 8, 3), None),
        np.full((8, 8, 5), 7, np.uint8),
        np.full((0, 8, 3), 7, np.uint8),
        np.full((8, 0, 3), 7, np.uint8),
        np.full((0, 8), 7, np.uint8),
        np.full((0, 8, 8, 3), 7, np.uint8),
        np.full(8, 7, np.uint8),
        np.array(7, np.uint8),
        np.full((1, 1, 8, 8, 3), 7, np.uint8),
        Image.fromarray(np.full((8, 8), 0.5, np.float32)),
        Image.fromarray(np.full((8, 8), -1, np.int32)),
        Image.fromarray(np.full((8, 8), 65536, np.int32)),
        Image.fromarray(np.full((8, 8), 200, np.int32)),
        Image.new("RGB", (0, 8)),
        7,
        None,
        {"image": "x"},
        [],
        [[]],
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_what_is_no_image_is_refused_in_words(seen, array) -> None:
    with pytest.raises(ValueError, match="(Give|Expected)"):
        seen(array)


def test_float_files_are_refused_by_every_door(seen, tmp_path, server) -> None:
    data = encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF")
    for door in doors(data, tmp_path, server):
        with pytest.raises(ValueError, match="floating point numbers"):
            seen(door)


# ---- orientation ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_upright_by_every_door(seen, tmp_path, server, orientation, form) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[8:, 16:] = 255, 120  # each corner differs
    upright[8:, :16] = 60
    back = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
    back |= {5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}
    image = Image.fromarray(upright)
    if back[orientation]:
        image = image.transpose(Image.Transpose[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = seen(upright)
    for door in doors(encoded(image, form, exif=exif), tmp_path, server):
        np.testing.assert_allclose(seen(door), expected, atol=0 if form in ("PNG", "TIFF") else 30)


def test_a_turned_transparent_image_is_turned_and_white(seen, tmp_path, server) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    image, options = keyed("P")
    for data in (encoded(logo("RGBA"), "PNG", exif=exif), encoded(image, "PNG", exif=exif, **options)):
        for door in doors(data, tmp_path, server):
            assert (seen(door) == HALF[:, :, ::-1]).all()


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"\0" * 40])
def test_broken_metadata_say_nothing(seen, exif) -> None:
    data = encoded(Image.new("RGB", (16, 16), "white"), "PNG", exif=exif)
    assert (seen(data) == 255).all()


# ---- sizes and files ----


@pytest.mark.parametrize("width, height", [(20000, 1), (1, 20000), (65000, 1500), (50000, 50000), (310, 10)])
def test_absurd_sizes_are_refused_at_once_by_every_door(seen, tmp_path, server, width, height) -> None:
    Image.MAX_IMAGE_PIXELS, before = None, Image.MAX_IMAGE_PIXELS  # whatever Pillow itself would refuse
    try:
        rows = bytes((1 + (width + 7) // 8) * min(height, 2000))
        for door in doors(png(width, height, 1, 0, rows), tmp_path, server):
            started = time.perf_counter()
            with pytest.raises(ValueError, match=f"An image of {height} x {width} .* is too large"):
                seen(door, do_center_crop=True)
            assert time.perf_counter() - started < 1
    finally:
        Image.MAX_IMAGE_PIXELS = before
    if width * height < 100_000:
        with pytest.raises(ValueError, match="too large"):
            seen(np.zeros((height, width, 3), np.uint8))


def test_unreadable_addresses_are_named_with_the_reason(seen, server, tmp_path) -> None:
    (tmp_path / "words.html").write_text("<html>no image</html>")
    for address, reason in (
        (f"{server}/missing.png", "404"),
        (f"{server}/words.html", "cannot identify"),
        ("http://127.0.0.1:9/dead.png", "ConnectError|[Cc]onnection"),
        ("http://no-such-host.invalid/a.png", "ConnectError|resol|[Nn]ame"),
    ):
        with pytest.raises(ValueError, match=f"(?s)Could not read the image .*({reason}).*Give the path, URL"):
            seen(address)


def test_programs_are_not_run(seen) -> None:
    program = encoded(Image.new("L", (8, 8)), "EPS")
    for one in (program, Image.open(io.BytesIO(program))):
        with pytest.raises(ValueError, match="a PostScript program, which is not run"):
            seen(one)


def test_a_palette_that_is_missing_is_refused_in_words(seen) -> None:
    image = Image.new("P", (8, 8))
    image.palette = None
    with pytest.raises(ValueError, match="An image of mode P cannot be made RGB"):
        seen(image)


@pytest.mark.parametrize("limit", ["MAX_DOWNLOAD", "SECONDS_TO_SEND"])
def test_endless_answers_are_cut(seen, server, tmp_path, monkeypatch, limit) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (16, 16), "white"), "PNG") + bytes(100_000))
    assert (seen(f"{server}/a.png") == 255).all()
    monkeypatch.setattr(f"processing.image_reading_deem.{limit}", 0)
    with pytest.raises(ValueError, match="Could not read the image .*a.png.*(more than 0 bytes|within 0 seconds)"):
        seen(f"{server}/a.png")


def test_names_that_are_no_file_say_so(seen, tmp_path) -> None:
    for name in ("missing.jpg", "folder/abcd", "", "x" * 5000, "a\0b", str(tmp_path)):
        with pytest.raises(ValueError, match="Could not read the image .*(no such file|cannot identify)"):
            seen(name)


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_large_texts_of_sound_files_are_left_out(seen, tmp_path, server, name) -> None:
    text = zlib.compress(bytes(70_000_000), 1)
    text = b"name\0\1\0\0\0" + text if name == b"iTXt" else b"name\0\0" + text
    for door in doors(png(16, 16, 8, 0, (b"\0" + b"\xff" * 16) * 16, (name, text)), tmp_path, server):
        assert (seen(door) == 255).all(), type(door)


@pytest.mark.parametrize("name", ["ztxt.png", "icc.png", "grey16.png", "logo_la.png", "logo_rgba.webp", "phone_6.jpg"])
def test_given_images_are_read(seen, name) -> None:
    if not SHARED.is_dir():
        pytest.skip("the given images ../shared/faults/pictures are not here")
    shown = seen(SHARED / name)
    assert shown.max() == 255 if "logo" in name else 0 < shown.mean() < 255
