# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Region masks of the whole model."""

import pytest
import torch
from deem_fixtures import (
    SIDE,
    tiny_batch,
    tiny_draws,
    tiny_model,
)

from modeling_deem import DeemForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def test_whole_image_masks_equal_no_masks() -> None:
    for use_region_tokens in (False, True):
        model = tiny_model(use_region_tokens=use_region_tokens)
        batch = tiny_batch("btitti")
        draws = {"consistency_draws": tiny_draws(2), "image_draws": tiny_draws(2, image=True)}
        with torch.no_grad():
            without = model(**batch, **draws)
            whole = model(**batch, **draws, region_masks=torch.ones(2, 1, SIDE, SIDE))
        assert torch.equal(without.logits, whole.logits)
        assert without.consistency_loss == whole.consistency_loss and without.image_loss == whole.image_loss


def test_error_outside_the_region_counts_nothing(model) -> None:
    decoder = model.image_decoder
    batch = tiny_batch("bti")
    masks = torch.zeros(1, 1, SIDE, SIDE)
    masks[..., 16:48, 8:40] = 1  # latent rows 2-5 and columns 1-4
    outside = torch.ones(1, 1, 8, 8)
    outside[..., 2:6, 1:5] = 0
    draws = tiny_draws(1)
    # Other noise and other latents outside, such that the noisy latents, hence the prediction, stay as they are.
    share = decoder.scheduler.alphas_cumprod[draws["timesteps"]].view(-1, 1, 1, 1)
    change = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9)) * outside
    shifted = {
        **draws,
        "noise": draws["noise"] + change,
        "latents": draws["latents"] - change * ((1 - share) / share).sqrt(),
    }
    with torch.no_grad():
        images = model.get_image_features(batch["pixel_values"], masks)

        def loss(drawn: dict, region_masks: torch.Tensor | None) -> torch.Tensor:
            return decoder.consistency_loss(
                image_tokens=images.image_tokens,
                image_features=images.image_features,
                region_masks=region_masks,
                **drawn,
            )

        torch.testing.assert_close(loss(draws, masks), loss(shifted, masks), rtol=0, atol=1e-4)
        assert (loss(draws, None) - loss(shifted, None)).abs() > 0.1


def test_regions_reach_the_tokens_but_not_the_pyramid(model) -> None:
    batch = tiny_batch("bti")
    masks = torch.zeros(1, 1, SIDE, SIDE)
    masks[..., :32, :32] = 1
    with torch.no_grad():
        whole, region = (
            model.get_image_features(batch["pixel_values"]),
            model.get_image_features(batch["pixel_values"], masks),
        )
        grid = model.model.vision_tower(batch["pixel_values"], masks).grid_tokens
    assert not torch.allclose(whole.image_tokens, region.image_tokens, atol=1e-4)
    for one, other in zip(whole.image_features, region.image_features, strict=True):
        assert torch.equal(one, other)
    empty = torch.ones(4, 4, dtype=torch.bool)
    empty[:2, :2] = False
    bias = model.model.vision_tower.output_norm.bias  # what a layer norm gives for zeros
    torch.testing.assert_close(grid[0, 1:][empty.flatten()], bias.expand(12, -1))


@pytest.mark.parametrize(("resize", "survives"), [("bilinear", False), ("antialias", True)])
def test_a_region_of_one_pixel(resize: str, survives: bool) -> None:
    model = tiny_model(region_mask_resize=resize, image_decoder_config={"region_mask_resize": resize})
    batch = tiny_batch("btti")
    batch["region_masks"] = torch.zeros(1, 1, SIDE, SIDE)
    batch["region_masks"][..., 0, 0] = 1  # between the sampling points of every coarser map
    with torch.no_grad():
        loss = model(**batch, consistency_draws=tiny_draws(1)).consistency_loss
        grid = model.model.vision_tower(batch["pixel_values"], batch["region_masks"]).grid_tokens[0, 1:]
    assert (loss > 0) == survives and loss.isfinite()
    bias = model.model.vision_tower.output_norm.bias
    kept = ((grid - bias).abs().amax(-1) > 1e-6).sum()
    assert kept == (1 if survives else 0)
