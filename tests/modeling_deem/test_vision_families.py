# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every supported vision encoder in a tiny DEEM (docs/parts.md)."""

import numpy as np
import pytest
import torch
from deem_fixtures import (
    SIDE,
    tiny_batch,
    tiny_model,
)
from family_fixtures import VISIONS, vision_config
from transformers import (
    AutoConfig,
    Siglip2ImageProcessorPil,
)

from modeling_deem.vision_deem import PLAIN_ENCODERS, STAGED_ENCODERS, pyramid_sides


def test_every_vision_family_is_tried() -> None:
    assert set(VISIONS) == {*STAGED_ENCODERS, *PLAIN_ENCODERS}


@pytest.mark.parametrize("family", VISIONS)
def test_pyramid_of_every_vision_family(family: str) -> None:
    config = vision_config(family)
    model = tiny_model(vision_config=config, image_decoder_config=None)
    tower = model.model.vision_tower
    pixel_values = tiny_batch("btiti", targets=False)["pixel_values"]
    sides = pyramid_sides(config, SIDE)
    assert sides == ([20, 10, 5, 2] if family == "siglip2_vision_model" else [16, 8, 4, 2])
    with torch.no_grad():
        vision = tower(pixel_values)
        assert [tuple(level.shape) for level in vision.image_features] == [(2, 32, side, side) for side in sides]
        assert vision.grid_tokens.shape == (2, 1 + sides[2] ** 2, 32)

        # Each cell is of its own place: brightening the lower right corner leaves the upper left corner of the finest
        # stage maps alone (attention of plain ViTs is global, so there the change must only be larger below).
        brighter = pixel_values.clone()
        brighter[:, :, SIDE // 2 :, SIDE // 2 :] += 3
        change = (tower(brighter).image_features[0] - vision.image_features[0]).abs().mean(1)
        half = sides[0] // 2
        assert change[:, half:, half:].mean() > 1.2 * change[:, :half, :half].mean()

        states = tower(pixel_values, output_hidden_states=True).hidden_states
    assert vision.hidden_states is None and len(states) > 1


@pytest.mark.parametrize("family", VISIONS)
def test_the_consistency_loss_reaches_every_trainable_tensor_of_the_encoder(family: str) -> None:
    model = tiny_model(vision_config=vision_config(family))
    batch = tiny_batch("btiti")
    model.consistency_loss(batch["pixel_values"], batch["target_pixel_values"]).backward()
    for name, parameter in model.model.vision_tower.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert name.endswith("mask_token")


@pytest.mark.parametrize("family", ["clip_vision_model", "dinov2", "siglip_vision_model", "swin", "resnet"])
def test_pictures_of_another_size_than_the_encoder_was_trained_on(family: str) -> None:
    model = tiny_model(vision_config=vision_config(family), image_decoder_config=None)
    with torch.no_grad():
        larger = model.model.vision_tower(torch.randn(1, 3, 96, 96))
    assert [level.shape[-1] for level in larger.image_features] == [24, 12, 6, 3]
    assert larger.grid_tokens.isfinite().all()


def test_siglip2_sees_the_patches_of_its_own_image_processor() -> None:
    model = tiny_model(vision_config=vision_config("siglip2_vision_model"), image_decoder_config=None)
    picture = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    inputs = Siglip2ImageProcessorPil(patch_size=12, max_num_patches=25)(picture, return_tensors="pt")
    ours = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = model.model.vision_tower.encoder(**inputs).last_hidden_state
        seen = model.model.vision_tower(ours).last_hidden_state
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_an_encoder_without_pooled_vector_lends_the_mean_of_its_patches() -> None:
    tower = tiny_model(
        vision_config=vision_config("siglip_vision_model"), image_decoder_config=None
    ).model.vision_tower
    with torch.no_grad():
        _, pooled, outputs = tower.encode(torch.randn(2, 3, SIDE, SIDE))
    assert outputs.pooler_output is None
    assert torch.equal(pooled, outputs.last_hidden_state.mean(1))


def test_other_vision_families_are_refused() -> None:
    with pytest.raises(ValueError, match="'vit'.*convnext.*dinov2"):
        tiny_model(vision_config=AutoConfig.for_model("vit"), image_decoder_config=None)
    with pytest.raises(ValueError, match=r"\[8, 16\].*needs 4"):
        config = AutoConfig.for_model("resnet", hidden_sizes=[8, 16], depths=[1, 1])
        tiny_model(vision_config=config, image_decoder_config=None)
