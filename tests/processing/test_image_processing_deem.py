# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Both sizes, crop geometry, region masks and the kinds of images users bring."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from processing import DeemImageProcessor, DeemImageProcessorPil
from processing.image_processing_pil_deem import covering_size, halving_sizes

SIZES = {"size": {"height": 32, "width": 32}, "target_size": {"height": 64, "width": 64}}


def make_image(height: int, width: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def normalized(image: Image.Image, processor: DeemImageProcessorPil) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[
        :, None, None
    ]


def test_squash_gives_both_sizes_each_normalized_once() -> None:
    processor, image = DeemImageProcessorPil(**SIZES), make_image(50, 70)
    batch = processor(image, return_targets=True, return_tensors="pt")
    assert set(batch) == {"pixel_values", "target_pixel_values"}
    torch.testing.assert_close(
        batch["pixel_values"][0], normalized(image.resize((32, 32), Image.Resampling.BICUBIC), processor)
    )
    target = torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(batch["target_pixel_values"][0], target, atol=1e-6, rtol=0)
    assert batch["pixel_values"].dtype == batch["target_pixel_values"].dtype == torch.float32
    assert "target_pixel_values" not in processor(image)


@pytest.mark.parametrize("height, width", [(50, 70), (64, 64), (65, 64), (131, 200), (517, 300), (20, 31)])
def test_center_crop_is_the_released_rule(height: int, width: int) -> None:
    def released(image: Image.Image, side: int) -> Image.Image:
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    processor, image = DeemImageProcessorPil(do_center_crop=True, **SIZES), make_image(height, width)
    batch = processor(image, return_targets=True, return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"][0], normalized(released(image, 32), processor))
    target = torch.from_numpy(np.array(released(image, 64))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(batch["target_pixel_values"][0], target, atol=1e-6, rtol=0)


def test_sizes_on_the_way() -> None:
    assert halving_sizes(131, 200, 32) == [(65, 100), (32, 50)]
    assert halving_sizes(63, 200, 32) == []
    assert covering_size(50, 70, 32) == (32, 45)


def test_mask_is_resized_with_nearest_like_torch() -> None:
    mask = np.random.default_rng(0).random((50, 70)) > 0.5
    batch = DeemImageProcessorPil(**SIZES)(make_image(50, 70), region_masks=mask, return_tensors="pt")
    expected = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=(32, 32))
    torch.testing.assert_close(batch["region_masks"], expected, atol=0, rtol=0)


def test_mask_vectors(shared_file) -> None:
    for case in shared_file("vectors/masks.json")["coco_cases"]:
        mask = np.array(case["expected"], dtype=np.uint8)
        for name, expected in case.items():
            if name.startswith("resized_nearest_"):
                height, width = (int(side) for side in name.removeprefix("resized_nearest_").split("x"))
                processor = DeemImageProcessorPil(size={"height": height, "width": width})
                resized = processor(make_image(*mask.shape), region_masks=[mask])["region_masks"][0]
                assert resized[0].tolist() == expected, (case["name"], name)


@pytest.mark.parametrize("height, width", [(70, 50), (200, 131), (64, 300)])
def test_mask_follows_the_crop_of_its_image(height: int, width: int) -> None:
    # An image that is its own mask: white inside the region, black outside.
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 3 : height // 2, width // 3 : width // 2] = 1
    image = Image.fromarray(mask * 255).convert("RGB")
    processor = DeemImageProcessorPil(do_center_crop=True, image_mean=[0.0] * 3, image_std=[1.0] * 3, **SIZES)
    batch = processor(image, region_masks=Image.fromarray(mask * 255), return_tensors="pt")
    differing = (batch["pixel_values"][:, :1] > 0.5).float() != batch["region_masks"]
    inside = batch["region_masks"].sum()
    assert inside > 0
    assert differing.sum() <= 4 * inside.sqrt()  # no more than the region's outline


def test_masks_only_where_given_and_ones_for_whole_images() -> None:
    processor, images = DeemImageProcessorPil(**SIZES), [make_image(40, 40), make_image(30, 50)]
    assert "region_masks" not in processor(images, region_masks=[None, None])
    batch = processor(images, region_masks=[None, np.zeros((30, 50))], return_tensors="pt")
    assert batch["region_masks"].shape == (2, 1, 32, 32) and batch["region_masks"].dtype == torch.float32
    assert batch["region_masks"][0].min() == 1 and batch["region_masks"][1].max() == 0
    nested = processor([images], region_masks=[[None, torch.ones(30, 50, dtype=torch.bool)]], return_tensors="pt")
    assert nested["region_masks"].min() == 1


def test_wrong_masks_are_refused_with_the_numbers() -> None:
    processor = DeemImageProcessorPil(**SIZES)
    with pytest.raises(ValueError, match="Region mask 0 is 50 x 70 but its image is 70 x 50"):
        processor(make_image(70, 50), region_masks=np.ones((50, 70)))
    with pytest.raises(ValueError, match="2 region masks for 1 images"):
        processor(make_image(70, 50), region_masks=[None, None])


def test_all_kinds_of_input_give_the_same() -> None:
    processor, image = DeemImageProcessorPil(**SIZES), make_image(50, 70)
    array = np.array(image)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    inputs = [
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        torch.from_numpy(array.transpose(2, 0, 1)),
        [image],
        [[image]],
        array[None],
    ]
    for one in inputs:
        torch.testing.assert_close(processor(one, return_tensors="pt")["pixel_values"], expected, atol=0, rtol=0)
    floats = processor(array.astype(np.float32) / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(floats, expected, atol=0.02, rtol=0)


def test_every_mode_becomes_rgb() -> None:
    processor = DeemImageProcessorPil(image_mean=[0.0] * 3, image_std=[1.0] * 3, **SIZES)
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    for image in (red, red.convert("RGBA"), red.convert("P"), red.convert("CMYK")):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        assert pixels[0, 0].min() > 0.95 and pixels[0, 1:].max() < 0.05, image.mode
    see_through = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert processor(see_through, return_tensors="pt")["pixel_values"].min() == 1  # on white
    gray = np.full((40, 40), 51, dtype=np.uint8)
    for image in (Image.fromarray(gray), gray, torch.from_numpy(gray), [gray], gray[None], gray[..., None]):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(pixels, torch.full((1, 3, 32, 32), 0.2))


def test_exif_rotation_is_applied(tmp_path) -> None:
    upright = Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 40, 0).repeat(20, 1)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left: rotate clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    processor = DeemImageProcessorPil(**SIZES)
    expected = processor(upright, return_tensors="pt")["pixel_values"]
    for image in (Image.open(tmp_path / "turned.png"), str(tmp_path / "turned.png"), tmp_path / "turned.png"):
        torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], expected)


def test_unreadable_files_are_named(tmp_path) -> None:
    processor = DeemImageProcessorPil(**SIZES)
    (tmp_path / "nonsense.jpg").write_bytes(b"no image")
    make_image(40, 40).save(tmp_path / "whole.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-400])
    for name in ("nonsense.jpg", "broken.jpg", "missing.jpg"):
        with pytest.raises(ValueError, match=f"Could not read the image .*{name}"):
            processor([make_image(9, 9), str(tmp_path / name)])
    with pytest.raises(ValueError, match="Could not read the image .*broken.jpg"):
        processor(Image.open(tmp_path / "broken.jpg"))


def test_save_and_load(tmp_path) -> None:
    first = DeemImageProcessorPil(do_center_crop=True, image_mean=[0.1, 0.2, 0.3], **SIZES)
    saved = json.loads(open(first.save_pretrained(tmp_path)[0]).read())
    assert saved["image_processor_type"] == "DeemImageProcessor"
    assert saved["size"] == SIZES["size"] and saved["target_size"] == SIZES["target_size"]
    assert "region_masks" not in saved
    for cls in (DeemImageProcessorPil, AutoImageProcessor):
        second = cls.from_pretrained(tmp_path)
        assert isinstance(second, (DeemImageProcessorPil, DeemImageProcessor))  # torchvision's where it is installed
        assert second.to_dict() == first.to_dict()
    assert DeemImageProcessorPil(size=32).size == SIZES["size"]
    assert DeemImageProcessorPil.from_pretrained(tmp_path, target_size=128).target_size["height"] == 128


def test_ordinary_arguments_are_honored() -> None:
    processor, image = DeemImageProcessorPil(**SIZES), make_image(50, 70)
    assert processor(image, do_rescale=True, rescale_factor=-1.0, return_tensors="pt")["pixel_values"].mean() <= 0
    raw = processor(image, do_rescale=False, do_normalize=False, do_resize=False, return_tensors="np")["pixel_values"]
    assert (raw[0] == np.array(image).transpose(2, 0, 1)).all()
    assert processor(image, size={"height": 16, "width": 24}, return_tensors="pt")["pixel_values"].shape[-2:] == (
        16,
        24,
    )
    assert processor([image, image], return_tensors="pt").to(torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a height and a width"):
        DeemImageProcessorPil(size={"shortest_edge": 32})
    with pytest.raises(ValueError, match="needs a height and a width"):
        DeemImageProcessorPil(size=-3)
    with pytest.raises(ValueError, match="square"):
        DeemImageProcessorPil(size={"height": 32, "width": 64}, do_center_crop=True)(make_image(50, 70))
    with pytest.raises(ValueError, match="Leave `crop_size` out"):
        DeemImageProcessorPil(crop_size=100, **SIZES)


def test_input_stays_unchanged() -> None:
    array, mask = np.array(make_image(50, 70)), np.ones((50, 70))
    before = array.copy(), mask.copy()
    DeemImageProcessorPil(**SIZES)(array, region_masks=mask, return_targets=True)
    assert (array == before[0]).all() and (mask == before[1]).all()


def test_torchvision_backend_agrees_with_pil() -> None:
    pytest.importorskip("torchvision", reason="the torchvision backend needs torchvision")
    images = [
        make_image(50, 70).resize((300, 517), Image.Resampling.BICUBIC),
        make_image(131, 200),
        make_image(131, 200, seed=1),
    ]
    masks = [None, np.eye(131, 200), np.ones((131, 200))]
    for do_center_crop in (False, True):
        arguments = {"do_center_crop": do_center_crop, "return_targets": True, **SIZES}
        by_pil = DeemImageProcessorPil(**arguments)(images, region_masks=masks, return_tensors="pt")
        by_tensor = DeemImageProcessor(**arguments)(images, region_masks=masks, return_tensors="pt")
        for name, expected in by_pil.items():
            torch.testing.assert_close(by_tensor[name], expected, atol=2 / 255 / 0.26, rtol=0)  # two gray levels


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_looked_up_values_are_those_of_the_arithmetic(do_rescale, do_normalize):
    processor, settings = DeemImageProcessorPil(), (1 / 255, do_normalize, (0.48, 0.45, 0.4), (0.26, 0.27, 0.28))
    image = np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    expected = processor.rescale(image, settings[0]) if do_rescale else image
    expected = processor.normalize(expected, *settings[2:]) if do_normalize else expected
    (got,) = processor.rescale_and_normalize([image], do_rescale, *settings)
    assert got.dtype == expected.dtype and np.array_equal(got, expected)
