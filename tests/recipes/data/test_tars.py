# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Tars as people have them: which members form a sample, what is read, and the reason where it is not."""

import io
import tarfile
from pathlib import Path

import pytest
from data_fixtures import fault, read_source, write_tar
from PIL import Image

from recipes.data.readers.captions import CaptionReader
from recipes.data.readers.images import IMAGE_SUFFIXES
from recipes.data.readers.tars import count_left_out

READ_BY_PILLOW = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
READ_BY_PILLOW |= {"j2k": "JPEG2000"}


def encoded(kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 32), (20, 200, 20)).save(data, kind)
    return data.getvalue()


def named(*names: str) -> list[tuple[str, bytes]]:
    """Members of these names in this order: an image, or a caption that is the name."""
    return [(name, name.encode() if name.endswith(("txt", "TXT")) else encoded()) for name in names]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar whose members may share a name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, processor) -> tuple[list[str], dict]:
    """Captions in their order, and how often each reason was given."""
    samples, skipped = read_source(path, processor)
    return [sample["text"].replace("<image>", "") for sample in samples], skipped


@pytest.mark.parametrize(
    "names, captions, skipped",
    [
        (["a.jpg", "a.txt", "b.jpg", "b.txt"], ["a.txt", "b.txt"], {}),
        (["a.txt", "a.jpg", "b.txt", "b.jpg"], ["a.txt", "b.txt"], {}),
        (["v1.0_0.jpg", "v1.0_0.txt", "v1.0_1.jpg", "v1.0_1.txt"], ["v1.0_0.txt", "v1.0_1.txt"], {}),
        (["v1.jpg", "v1.txt", "v1.5.jpg", "v1.5.txt"], ["v1.txt", "v1.5.txt"], {}),
        (["Mr. A.jpg", "Mr. A.txt", "Mr. B.jpg", "Mr. B.txt"], ["mr. a.txt", "mr. b.txt"], {}),
        (["a.x.jpg", "a.x.txt", "a.y.jpg", "a.y.txt"], ["a.x.txt", "a.y.txt"], {}),
        (["a.jpg", "a.txt", "a.small.jpg", "a.small.txt"], ["a.txt", "a.small.txt"], {}),
        (["a.small.jpg", "a.small.txt", "a.jpg", "a.txt"], ["a.small.txt", "a.txt"], {}),
        (["a.jpg", "a.mask.png", "a.txt", "b.jpg", "b.txt"], ["a.txt", "b.txt"], {}),
        (["a.depth.png", "a.jpg", "a.mask.png", "a.txt"], ["a.txt"], {}),
        (["a.jpg", "a.txt"] * 3, ["a.txt"] * 3, {}),
        (["a.jpg", "a.jpg", "a.txt"], ["a.txt"], {"image without caption": 1}),
        (["a.JPG", "a.TXT", "b.Jpg", "b.txt"], ["a.txt", "b.txt"], {}),
        (["x/a.jpg", "x/a.txt", "y/a.jpg", "y/a.txt"], ["x/a.txt", "y/a.txt"], {}),
        (["./a.jpg", "./a.txt"], ["./a.txt"], {}),
        (["v1.2/a.jpg", "v1.2/a.txt", "v1.2/b.jpg", "v1.2/b.txt"], ["v1.2/a.txt", "v1.2/b.txt"], {}),
        (["a.jpg", "b.txt"], [], {"image without caption": 1, "caption without image": 1}),
        (["a.heic", "a.txt"], [], {"caption without an image of a known kind": 1}),
        (["a.npy", "README"], [], {"neither an image of a known kind nor a caption": 2}),
        ([".jpg", ".txt"], [".txt"], {}),
    ],
)
def test_which_members_form_a_sample(tmp_path, tiny_processor, names, captions, skipped):
    tar = tar_of(tmp_path / "0.tar", named(*names))
    assert read(tar, tiny_processor) == (captions, skipped)
    reader = CaptionReader([tar])
    for entry in reader.entries(tar):  # found again where a run goes on
        assert list(reader.entries(tar, entry.number, entry.offset))[0] == entry
        assert list(reader.fetch(tar, [(entry.number, entry.offset)])) == [entry]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_known_ending_is_read(tmp_path, tiny_processor, suffix):
    image = encoded(READ_BY_PILLOW.get(suffix, suffix.upper()))
    captions, skipped = read(write_tar(tmp_path / "0.tar", {f"0.{suffix}": image, "0.txt": b"a car"}), tiny_processor)
    assert captions == ["a car"] and not skipped


def test_files_that_systems_add_are_no_samples(tmp_path, tiny_processor):
    members = [("._.", b"x"), *named("a.jpg", "._a.jpg", "a.txt"), ("._a.txt", b"x"), (".DS_Store", b"x")]
    members += [*named("b.jpg"), ("__MACOSX/b.txt", b"x"), ("Thumbs.db", b"x"), *named("b.txt", "c._jpg", "c.txt")]
    tar = tar_of(tmp_path / "0.tar", members)
    captions, skipped = read(tar, tiny_processor)
    assert captions == ["a.txt", "b.txt"] and skipped == {"caption without an image of a known kind": 1}
    assert count_left_out(tar) == {"file that macOS or Windows has added": 6}


def linked(path: Path, links: list[tuple[str, str, bytes]]) -> Path:
    """A tar of a.jpg and a.txt, and of (name, where it leads, type) with captions."""
    with tarfile.open(path, "w") as tar:
        for name, data in [("x/a.jpg", encoded()), ("x/a.txt", b"a")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for number, (name, target, kind) in enumerate(links):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
            info = tarfile.TarInfo(f"{name.rpartition('.')[0]}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(str(number).encode()))
    return path


def test_links_are_read_within_the_tar_and_nowhere_else(tmp_path, tiny_processor):
    (tmp_path / "out.jpg").write_bytes(encoded())
    hard, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    links = [("b.jpg", "x/a.jpg", hard), ("x/c.jpg", "a.jpg", symbolic), ("y/d.jpg", "../x/c.jpg", symbolic)]
    links += [("e.jpg", "b.jpg", hard), ("f.jpg", "gone.jpg", hard), ("g.jpg", "g.jpg", symbolic)]
    links += [("h.jpg", str(tmp_path / "out.jpg"), symbolic), ("i.jpg", "../out.jpg", symbolic)]
    captions, skipped = read(linked(tmp_path / "0.tar", links), tiny_processor)
    assert captions == ["a", "0", "1", "2", "3"] and skipped == {"link to what is not in the tar": 4}


def test_members_that_are_no_files(tmp_path, tiny_processor):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("pipe.jpg", tarfile.FIFOTYPE), ("a", tarfile.DIRTYPE), ("dev", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name, data in named("a/b.jpg", "a/b.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert read(tmp_path / "0.tar", tiny_processor) == (["a/b.txt"], {})
    assert count_left_out(tmp_path / "0.tar") == {"member that is no file": 2}


def test_what_is_neither_image_nor_text_is_not_held_in_memory(tmp_path):
    tar = write_tar(tmp_path / "0.tar", {"0.jpg": encoded(), "0.npy": bytes(10**6), "0.txt": b"a"})
    (entry,) = CaptionReader([tar]).entries(tar)
    assert entry.payload["npy"] == b"" and len(entry.payload["jpg"]) > 99


@pytest.mark.parametrize("name", ["macos", "hardlinks", "dots_version", "ext_gif", "ext_avif", "duplicates"])
def test_the_given_tars(tiny_processor, name):
    assert read(fault(f"tars/{name}.tar"), tiny_processor) == (["a red thing"] * 6, {})
