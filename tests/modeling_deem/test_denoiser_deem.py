# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The UNet with fusion: with fusion at zero it is the library's own UNet, bit for bit."""

import copy

import pytest
import torch
from deem_fixtures import UNET_OF_THREE_LEVELS as UNET
from deem_fixtures import VAE, Q, tiny_decoder_config
from diffusers import AutoencoderKL, UNet2DConditionModel

from modeling_deem import DeemImageDecoder, DeemImageDecoderConfig
from modeling_deem.denoiser_deem import DeemUNet2DConditionModel, build_denoiser
from modeling_deem.image_states_deem import no_features, own_features

VARIANTS = {
    "plain": {},
    "two layers per block": {"layers_per_block": 2},
    "layers by level": {"layers_per_block": [1, 2, 1]},
    "convolutional projections": {"use_linear_projection": False},
    "heads by level": {"attention_head_dim": [2, 4, 4]},
    "larger sample": {"sample_size": 16},
}


def decoder(seed: int = 0, **denoiser) -> DeemImageDecoder:
    torch.manual_seed(seed)
    fields = tiny_decoder_config(denoiser={**copy.deepcopy(UNET), **denoiser})
    config = DeemImageDecoderConfig(**fields, token_size=24, context_size=32, feature_size=32)
    config.perceiver_config.encoder_hidden_size = 32
    return DeemImageDecoder(config).eval()


def plain_unet(model: DeemImageDecoder) -> UNet2DConditionModel:
    plain = UNet2DConditionModel.from_config(model.config.denoiser).eval()
    plain.load_state_dict(model.denoiser.state_dict(), strict=True)
    return plain


def inputs(side: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(count, 4, side, side, generator=generator)
    return sample, torch.tensor([0, 500, 999])[:count], torch.randn(count, Q, 32, generator=generator)


def pyramid(count: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(count, 32, side, side, generator=generator) for side in (16, 8, 4, 2))


def wake_fusion(model: DeemImageDecoder) -> None:
    for name, parameter in model.feature_fusion.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_fusion_it_is_exactly_the_plain_unet(variant: str) -> None:
    model = decoder(**VARIANTS[variant])
    sample, timesteps, condition = inputs(model.config.latent_side)
    with torch.no_grad():
        expected = plain_unet(model)(sample, timesteps, condition).sample
        assert expected.abs().max() > 1e-3
        assert torch.equal(model.denoiser(sample, timesteps, condition), expected)
        states = own_features(pyramid())
        assert torch.equal(model.denoise(sample, timesteps, condition, states), expected)
        no_images = no_features(3, like=sample.new_zeros(32))
        assert torch.equal(model.denoise(sample, timesteps, condition, no_images), expected)


def test_without_fusion_odd_and_other_sizes_are_the_plain_unets() -> None:
    model = decoder()
    for side in (12, 7):
        sample, timesteps, condition = inputs(side)
        with torch.no_grad():
            expected = plain_unet(model)(sample, timesteps, condition).sample
            assert torch.equal(model.denoiser(sample, timesteps, condition), expected)
            assert torch.equal(model.denoise(sample, timesteps, condition, own_features(pyramid())), expected)


def test_gradients_without_fusion_are_the_plain_unets() -> None:
    model = decoder().train()
    plain = plain_unet(model).train()
    sample, timesteps, condition = inputs(8)
    plain(sample, timesteps, condition).sample.square().sum().backward()
    model.denoise(sample, timesteps, condition, own_features(pyramid())).square().sum().backward()
    for (name, ours), theirs in zip(model.denoiser.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_every_fusion_block_is_heard() -> None:
    model = decoder()
    sample, timesteps, condition = inputs(8)
    states = own_features(pyramid())
    blocks = [*model.feature_fusion.skip_blocks, model.feature_fusion.mid_block]
    assert len(blocks) == 7
    with torch.no_grad():
        silent = model.denoise(sample, timesteps, condition, states)
        for block in blocks:
            torch.nn.init.normal_(block.conv.weight, std=0.3)
            assert not torch.allclose(model.denoise(sample, timesteps, condition, states), silent, atol=1e-4)
            torch.nn.init.zeros_(block.conv.weight)
        assert torch.equal(model.denoise(sample, timesteps, condition, states), silent)


def test_each_image_sees_its_own_features_only() -> None:
    model = decoder()
    wake_fusion(model)
    sample, timesteps, condition = inputs(8)
    features = pyramid()
    changed = tuple(level.clone() for level in features)
    for level in changed:
        level[1] = level[1].flip(0)  # other channels; a shift of all would not pass the norm
    with torch.no_grad():
        before = model.denoise(sample, timesteps, condition, own_features(features))
        after = model.denoise(sample, timesteps, condition, own_features(changed))
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1], atol=1e-4)


def test_features_outside_the_region_are_not_seen() -> None:
    model = decoder()
    wake_fusion(model)
    sample, timesteps, condition = inputs(8)
    features, masks = pyramid(), torch.zeros(3, 1, 64, 64)
    masks[..., :32, :] = 1
    changed = []
    for level in features:
        changed.append(level.clone())
        changed[-1][:, :, level.shape[-1] // 2 :] *= torch.linspace(-1, 1, 32)[:, None, None]
    with torch.no_grad():
        before, after, whole = (
            model.denoise(sample, timesteps, condition, own_features(*given))
            for given in ((features, masks), (tuple(changed), masks), (features,))
        )
    assert torch.equal(before, after)
    assert not torch.allclose(before, whole, atol=1e-4)


def test_values_kept_over_the_steps_give_the_same() -> None:
    model = decoder()
    wake_fusion(model)
    sample, timesteps, condition = inputs(8)
    states = own_features(pyramid())
    with torch.no_grad():
        expected = model.denoise(sample, timesteps, condition, states)
        states.kept_values, states.kept_tables = {}, {}
        for _ in range(2):
            torch.testing.assert_close(model.denoise(sample, timesteps, condition, states), expected)
    assert set(states.kept_values) == set(map(str, range(7)))


def test_block_sides_follow_the_unet() -> None:
    fusion = decoder(layers_per_block=2).feature_fusion
    assert [(block.channels, block.side) for block in fusion.skip_blocks] == [
        *[(16, 8)] * 3,
        (16, 4),
        *[(32, 4)] * 2,
        (32, 2),
        *[(32, 2)] * 2,
    ]
    assert (fusion.mid_block.channels, fusion.mid_block.side) == (32, 2)
    assert all(not block.synchronizer.null_value.requires_grad for block in fusion.skip_blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet1DModel"}, "UNet1DModel.*SD3Transformer2DModel.*UNet2DConditionModel"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
            "addition_embed_type",
        ),
        ({"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ({"center_input_sample": True}, "centered samples"),
        ({"mid_block_type": None}, "mid block"),
    ],
)
def test_denoisers_that_need_more_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_denoiser({**UNET, **changes})


def test_diffusers_parts_start_as_diffusers_starts_them() -> None:
    """Constants are equal, random tensors equally wide; transformers alone would start all of them at N(0, 0.02)."""
    ours = decoder(seed=3)
    unet, vae = UNet2DConditionModel.from_config(UNET), AutoencoderKL.from_config(VAE)
    for part, place in ((unet, ours.denoiser), (vae, ours.vae)):
        for (name, theirs), mine in zip(part.named_parameters(), place.parameters(), strict=True):
            if theirs.unique().numel() == 1:
                assert torch.equal(theirs, mine), name
            elif theirs.numel() > 200:
                assert 0.75 < mine.std() / theirs.std() < 1.33 and mine.mean().abs() < 0.2 * mine.std(), name


def test_supported_denoiser_is_diffusers_own_class() -> None:
    denoiser = build_denoiser(UNET)
    assert isinstance(denoiser, UNet2DConditionModel) and type(denoiser) is DeemUNet2DConditionModel
