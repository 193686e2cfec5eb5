# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the error of redrawing says of each image: against loops written from the definition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from deem_fixtures import SIDE, tiny_model
from family_fixtures import DIFFUSIONS
from test_feedback_deem import SCRATCH
from vlm_fixtures import tiny_vlm

from modeling_deem import DeemFeedback, DeemForConditionalGeneration, DeemImageError
from modeling_deem.image_states_deem import own_features
from modeling_deem.scheduling_deem import add_noise

pytestmark = pytest.mark.usefixtures("one_thread")
TIMESTEPS, NUM_NOISE, COUNT = [100, 900], 2, 3


def pixels(count: int = COUNT, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(count, 3, side, side, generator=draw)
    return given, torch.rand(count, 3, side, side, generator=draw) * 2 - 1


def one_error(decoder: Any, latent: torch.Tensor, condition: torch.Tensor, states: Any, noise: torch.Tensor, t: int):
    """Squared error (c, s, s) of one image at one timestep under one noise."""
    noisy, target, time = add_noise(decoder.scheduler, latent[None], noise[None], torch.tensor([t]))
    return (decoder.denoise(noisy, time, condition, states) - target)[0].square()


@torch.no_grad()
def written_out(model: DeemForConditionalGeneration, given: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    """The definition as a loop over images, tokens left out, timesteps and noises."""
    decoder = model.image_decoder
    encoded = decoder.vae.encode(targets)
    latents = encoded.latent if "latent" in encoded else encoded.latent_dist.mean
    latents = (latents - decoder.latent_shift) * decoder.vae.config.scaling_factor
    noise = torch.randn(NUM_NOISE, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    maps, of_timesteps, without = [], [], []
    for index, latent in enumerate(latents):
        images = model.get_image_features(given[index : index + 1], return_dict=True)
        states = own_features(images.image_features) if decoder.feature_fusion is not None else None
        tokens = decoder.token_projector(images.image_tokens)

        def errors(condition: torch.Tensor, latent: Any = latent, states: Any = states) -> torch.Tensor:
            rows = [
                torch.stack([one_error(decoder, latent, condition, states, one, t) for one in noise])
                for t in TIMESTEPS
            ]
            return torch.stack(rows)  # [T, K, c, s, s]

        whole = errors(tokens)
        maps.append(whole.mean((0, 1, 2)))
        of_timesteps.append(whole.mean((1, 2, 3, 4)))
        left_out = [torch.cat([tokens[:, :j], tokens[:, j + 1 :]], 1) for j in range(tokens.shape[1])]
        without.append(torch.stack([errors(one).mean() - whole.mean() for one in left_out]))
    return {
        "image_errors": torch.stack(of_timesteps).mean(1),
        "error_maps": torch.stack(maps),
        "timestep_errors": torch.stack(of_timesteps),
        "token_errors": torch.stack(without),
    }


def close(found: DeemImageError, expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", ["unet", "unet, v", "sd3", "sana", "pixart"])
def test_equals_a_loop_written_from_the_definition(kind: str) -> None:
    parts = {**DIFFUSIONS[kind]}
    model = tiny_model(image_decoder_config=parts)
    given, targets = pixels()
    options = {"timesteps": TIMESTEPS, "num_noise": NUM_NOISE, "per_token": True}
    model.train()
    found = model.image_error(given, targets, **options, batch_size=5)
    assert all(module.training for module in model.modules() if module is not model.image_decoder.vae)
    model.eval()
    expected = written_out(model, given, targets)
    close(found, expected)
    assert expected["token_errors"].abs().max() > 1e-4  # tokens are heard
    assert found.timesteps.tolist() == TIMESTEPS and found.token_mask is None
    # in any batch the same, again the same, another seed another noise
    for size in (1, 2, 64):
        close(model.image_error(given, targets, **options, batch_size=size), expected)
    alone = [model.image_error(given[i : i + 1], targets[i : i + 1], **options) for i in range(COUNT)]
    close(found, {"image_errors": torch.cat([one.image_errors for one in alone])})
    again, other = (model.image_error(given, targets, seed=seed) for seed in (0, 1))
    assert torch.equal(again.image_errors, model.image_error(given, targets).image_errors)
    assert not torch.equal(again.image_errors, other.image_errors)
    drawn = model.image_error(given, targets, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn.image_errors, other.image_errors) and len(drawn.timesteps) == 4
    assert 200 <= drawn.timesteps.min() and drawn.timesteps.max() <= 799
    assert not any(value.requires_grad for value in drawn.values())


def test_the_mean_is_the_consistency_loss_within_regions_too() -> None:
    model = tiny_model()
    given, targets = pixels()
    regions = torch.zeros(COUNT, 1, SIDE, SIDE)
    regions[:, :, 16:40, 8:48] = 1
    latents = model.image_decoder.encode(targets, noise=torch.zeros(()))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(COUNT, -1, -1, -1)
    for masks in (None, regions):
        images = model.get_image_features(given, masks, return_dict=True)
        draws = {"noise": noise, "timesteps": torch.full((COUNT,), 300)}
        seen = (images.image_tokens, images.image_features, masks)
        loss = model.image_decoder.consistency_loss(latents, *seen, **draws)
        found = model.image_error(given, targets, masks, timesteps=[300])
        torch.testing.assert_close(found.image_errors.mean(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert found.error_maps[:, :2].abs().max() == 0 and found.error_maps[:, 2:5, 1:6].min() > 0


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("connector", ["linear", "perceiver"])
def test_of_another_model(family: str, connector: str) -> None:
    vlm = tiny_vlm(family)
    torch.manual_seed(0)
    feedback = DeemFeedback.from_scratch(vlm.model, **SCRATCH, connector=connector, connector_std=0.5).eval()
    rows = [vlm.row(seed) for seed in range(COUNT)]  # of Qwen: 4, 8 and 4 tokens
    _, targets = pixels(side=32)

    def seen(rows: list[dict[str, Any]]) -> Any:
        given = {name: vlm.collate(rows)[name] for name in rows[0]["images"]}
        with torch.no_grad():
            return vlm.model.get_image_features(**given, return_dict=True)

    options = {"timesteps": TIMESTEPS, "num_noise": NUM_NOISE, "per_token": True}
    found = feedback.image_error(seen(rows), targets, **options, batch_size=5)
    noise = torch.randn(NUM_NOISE, 192, 4, 4, generator=torch.Generator().manual_seed(0))
    for index in range(COUNT):
        images, target = seen(rows[index : index + 1]), targets[index : index + 1]
        tokens = images.pooler_output[0]

        def error(tokens: torch.Tensor, images: Any = images, target: Any = target) -> torch.Tensor:
            given = replace(images, pooler_output=[tokens])
            losses = [
                feedback(given, target, noise=one[None], timesteps=torch.tensor([t])).loss
                for t in TIMESTEPS
                for one in noise
            ]
            return torch.stack(losses).mean().detach()

        whole = error(tokens)
        left_out = [error(torch.cat([tokens[:j], tokens[j + 1 :]])) - whole for j in range(len(tokens))]
        torch.testing.assert_close(found.image_errors[index], whole, rtol=1e-4, atol=1e-5)
        length = len(tokens)
        torch.testing.assert_close(found.token_errors[index, :length], torch.stack(left_out), rtol=1e-3, atol=1e-5)
        assert not found.token_errors[index, length:].any()
        if family == "qwen2_5_vl":
            assert found.token_mask[index].sum() == length
    assert found.error_maps.shape == (COUNT, 4, 4) and found.timestep_errors.shape == (COUNT, 2)


def test_bad_input_is_said_in_words() -> None:
    model, (given, targets) = tiny_model(), pixels()
    for wrong in ([1000], [-1], [0.5], [], 500, [True]):
        with pytest.raises(ValueError, match="whole numbers from 0, least noise, to 999"):
            model.image_error(given, targets, timesteps=wrong)
    for name in ("num_noise", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            model.image_error(given, targets, **{name: 0})
    with pytest.raises(ValueError, match="2 target images for 3 images"):
        model.image_error(given, targets[:2])
    with pytest.raises(ValueError, match="0 target images for 0 images"):
        model.image_error(given[:0], targets[:0])
    with pytest.raises(ValueError, match="lie in .*expected the same images in"):
        model.image_error(given, 3 * targets)
    with pytest.raises(ValueError, match="apart from the encoder's input"):
        model.image_error(targets, targets)
    with pytest.raises(ValueError, match="has no image decoder"):
        tiny_model(image_decoder_config=None).image_error(given, targets)
    vlm = tiny_vlm("llava")
    feedback = DeemFeedback.from_scratch(vlm.model, **SCRATCH, tokens="global")
    images = vlm.model.get_image_features(vlm.collate([vlm.row(0)])["pixel_values"], return_dict=True)
    _, small = pixels(1, side=32)
    assert feedback.image_error(images, small).image_errors.shape == (1,)
    with pytest.raises(ValueError, match="one token"):
        feedback.image_error(images, small, per_token=True)
    with pytest.raises(ValueError, match="expected .N, 3, 32, 32."):
        feedback.image_error(images, targets[:1])
    with pytest.raises(ValueError, match="whole numbers"):
        feedback.image_error(images, small, timesteps=[1000])
