# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawing again what was drawn before, and drawing images that stand in the text."""

import pytest
import torch
from deem_fixtures import BOS, START, tiny_batch, tiny_model
from given_noise import GivenNoiseScheduler

from modeling_deem import DeemForConditionalGeneration

STEPS = 3


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    return tiny_model()


def draws(pictures: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial latents and the noise of every step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pictures, 4, 8, 8)
    return torch.randn(shape, generator=generator), torch.randn(STEPS, *shape, generator=generator)


def given_noise(model: DeemForConditionalGeneration, latents: torch.Tensor, noise: torch.Tensor) -> dict:
    """Options that repeat drawings."""
    scheduler = GivenNoiseScheduler.of(model.image_decoder.scheduler, noise)
    return {"num_inference_steps": STEPS, "latents": latents, "scheduler": scheduler}


# ---- given noise ----


def test_given_noise_equals_the_generators_own(model) -> None:
    batch = tiny_batch("bttit", "bt", targets=False)
    latents, step_noise = draws(2, seed=3)
    drawn = model.generate_images(**batch, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3))
    given = model.generate_images(**batch, **given_noise(model, latents, step_noise))
    torch.testing.assert_close(given, drawn, rtol=0, atol=0)
    other = model.generate_images(**batch, **given_noise(model, latents, step_noise.flip(0)))
    assert not torch.allclose(other, drawn, atol=1e-4)


def test_squeezed_timesteps_are_the_published_ones(model) -> None:
    raw = torch.tensor([0, 1, 437, 871, 999])
    squeezed = model.image_decoder.squeeze_timesteps(raw, 200, 799)
    assert squeezed.tolist() == [round(500 + 0.6 * (t - 500)) for t in raw.tolist()]


# ---- images that stand in the text ----


def test_target_images_equal_prompts_cut_at_them(model) -> None:
    batch = tiny_batch("bttitie", "bitti", targets=False)
    latents, step_noise = draws(2)
    drawn = model.generate_images(
        **batch, **given_noise(model, latents, step_noise), target_images=torch.tensor([1, 3])
    )
    for row, image, target in ((0, 0, 0), (1, 2, 1)):
        ids = batch["input_ids"][row]
        starts = (ids == START).nonzero().flatten()
        cut = model.generate_images(
            ids[None, : starts[1] + 1],
            pixel_values=batch["pixel_values"][image : image + 1],
            **given_noise(model, latents[target : target + 1], step_noise[:, target : target + 1]),
        )
        torch.testing.assert_close(drawn[target : target + 1], cut, rtol=0, atol=1e-4)


def test_pixels_of_target_images_do_not_matter(model) -> None:
    batch, (latents, step_noise) = tiny_batch("bttiti", targets=False), draws(1)
    target = torch.tensor([1])
    drawn = model.generate_images(**batch, **given_noise(model, latents, step_noise), target_images=target)
    batch["pixel_values"][1] = 0.0
    torch.testing.assert_close(
        model.generate_images(**batch, **given_noise(model, latents, step_noise), target_images=target), drawn
    )


def test_document_starts_of_pictures_can_be_given(model) -> None:
    batch, (latents, step_noise) = tiny_batch("btttebtt", targets=False), draws(1)
    default = model.generate_images(**batch, **given_noise(model, latents, step_noise))
    latest = int((batch["input_ids"][0] == BOS).nonzero()[-1])
    torch.testing.assert_close(
        model.generate_images(
            **batch, **given_noise(model, latents, step_noise), document_starts=torch.tensor([latest])
        ),
        default,
    )
    whole = model.generate_images(
        **batch, **given_noise(model, latents, step_noise), document_starts=torch.tensor([0])
    )
    assert not torch.allclose(whole, default, atol=1e-4)
