# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Photos with an EXIF orientation: regions and boxes lie where they were drawn, everything else is upright."""

import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import fault, read_source, texts
from PIL import ExifTags, Image, ImageOps

from processing import DeemDataCollator
from recipes.data.readers.images import open_image
from recipes.data.sources import DataArguments, build_dataset

WIDTH, HEIGHT, BOX = 96, 64, (24, 8, 56, 40)  # of the stored pixels; the box is red
POLYGON = [24, 8, 56, 8, 56, 40, 24, 40]


def write_photo(path: Path, orientation: int, form: str = "JPEG") -> Path:
    """A green photo with a red box, stored turned in one of the eight ways."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (0, 200, 0))
    image.paste((200, 0, 0), BOX)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, form, exif=exif)
    return path


def write_regions(folder: Path) -> Path:
    about = {"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}
    region = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [POLYGON]}
    rows = {"images": [about], "annotations": [region], "categories": [{"id": 1, "name": "box"}]}
    (folder / "instances_train.json").write_text(json.dumps(rows))
    return folder / "instances_train.json"


def write_osprey(folder: Path) -> Path:
    row = {"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT, "description": ["a box"]}
    (folder / "osprey.json").write_text(json.dumps([{**row, "annotation": [{"segmentation": [POLYGON]}]}]))
    return folder / "osprey.json"


def write_vcr(folder: Path) -> Path:
    corners = [[x, y] for x, y in zip(POLYGON[::2], POLYGON[1::2], strict=True)]
    (folder / "a.json").write_text(json.dumps({"boxes": [[*BOX, 1.0]], "segms": [[corners]]}))
    row = {"objects": ["box"], "img_fn": "a.jpg", "metadata_fn": "a.json"}
    said = {f"{name}_orig": "1 is red." for name in ("question", "answer", "rationale")}
    (folder / "vcr.jsonl").write_text(json.dumps(row | said) + "\n")
    return folder / "vcr.jsonl"


def write_vg(folder: Path) -> Path:
    region = {"region_id": 1, "image_id": "a", "x": 24, "y": 8, "width": 32, "height": 32, "phrase": "a box"}
    (folder / "region_descriptions.json").write_text(json.dumps([{"id": "a", "regions": [region]}]))
    return folder / "region_descriptions.json"


def write_refcoco(folder: Path) -> Path:
    ref = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": [{"raw": "a box"}]}
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref]))
    image = {"id": 1, "width": WIDTH, "height": HEIGHT}
    rows = {"images": [image], "annotations": [{"id": 1, "bbox": [24, 8, 32, 32]}]}
    (folder / "instances.json").write_text(json.dumps(rows))
    (folder / "a.jpg").rename(folder / "COCO_train2014_000000000001.jpg")
    return folder / "refs(unc).p"


def red(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W) -> (H, W) bool."""
    return pixels[0] > pixels[1]


def check(sample: dict, processor) -> None:
    """What is marked is red as the model sees it; a box in words ends where the red does."""
    batch = DeemDataCollator(processor)([sample])
    if "region_masks" not in batch:
        answer = texts(sample)[1]
        assert "<box>" in answer
        numbers = answer.replace("(", " ").replace(")", " ").replace(",", " ").replace("<", " ").split()
        said = [int(number) for number in numbers if number.isdigit()]
        pixels = red(np.asarray(sample["images"][0]).transpose(2, 0, 1).astype(int))
        rows, columns = np.nonzero(pixels)
        height, width = pixels.shape
        found = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
        assert np.allclose(np.array(said) / 999, found, atol=0.02)
        seen = batch["pixel_values"][0].numpy()
        plain = processor.image_processor([Image.fromarray(np.asarray(sample["images"][0]))], return_tensors="np")
        assert np.abs(plain["pixel_values"][0] - seen).max() < 1e-5  # not turned behind the words
        return
    for pixels, mask in zip(batch["pixel_values"][1:].numpy(), batch["region_masks"][1:, 0].numpy(), strict=True):
        assert mask.any() and (red(pixels) == mask.astype(bool)).mean() > 0.97


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("write", [write_regions, write_osprey, write_vcr, write_vg, write_refcoco])
def test_regions_of_turned_photos_lie_where_they_were_drawn(tmp_path, tiny_processor, write, orientation):
    write_photo(tmp_path / "a.jpg", orientation)
    data = write(tmp_path)
    for epoch in range(4):  # mirrored or not, the box or the phrase asked for
        (sample,), skipped = read_source(data, tiny_processor, epoch=epoch)
        assert not skipped
        check(sample, tiny_processor)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_whatever_the_file_is(tmp_path, tiny_processor, form, orientation):
    write_photo(tmp_path / "a.jpg", orientation, form)
    (sample,), skipped = read_source(write_regions(tmp_path), tiny_processor)
    assert not skipped
    check(sample, tiny_processor)


@pytest.mark.parametrize("name", ["exif_phone_3_jpg", "exif_phone_6_jpg", "exif_png_6_png"])
def test_the_given_regions(tiny_processor, name):
    data = fault(f"coco/{name}")
    samples, skipped = read_source(data, tiny_processor)
    stored = np.asarray(Image.open(data / "train2017" / "000000000001.jpg").convert("RGB"))
    assert len(samples) == 6 and not skipped
    for sample in samples:
        assert sample["region_masks"][1].shape == stored.shape[:2]
        plain = tiny_processor.image_processor([Image.fromarray(stored)], return_tensors="np")["pixel_values"]
        batch = DeemDataCollator(tiny_processor)([sample])
        assert np.abs(batch["pixel_values"][1].numpy() - plain[0]).max() < 1e-5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_captions_of_turned_photos_show_them_upright(tmp_path, tiny_processor, orientation, flip):
    photo = write_photo(tmp_path / "0.jpg", orientation)
    (tmp_path / "0.txt").write_text("a box")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("0.jpg", "0.txt"):
            tar.add(tmp_path / name, arcname=name)
    data = DataArguments(data=[str(tmp_path / "0.tar")], pack_length=0, random_flip=flip)
    stream = iter(build_dataset(data, tiny_processor, 1, 0)[0])
    upright = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    forms = [upright, ImageOps.mirror(upright)] if flip else [upright]
    expected = tiny_processor.image_processor(forms, return_tensors="np")["pixel_values"]
    for _ in range(4):
        seen = DeemDataCollator(tiny_processor)([next(stream)])["pixel_values"][0].numpy()
        assert min(np.abs(one - seen).max() for one in expected) < 1e-5


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_costs_no_image(tmp_path, tiny_processor, form, exif):
    Image.new("RGB", (96, 64), (0, 200, 0)).save(tmp_path / "a.jpg", form, exif=exif)
    for as_stored in (False, True):
        opened = open_image(tmp_path / "a.jpg", "a.jpg", as_stored)
        assert opened.size == (96, 64)
        for image in (opened, opened.copy()):
            assert tiny_processor.image_processor([image], return_tensors="np")["pixel_values"].shape[0] == 1
