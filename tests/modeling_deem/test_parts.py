# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every supported vision encoder, language model and denoiser in a tiny DEEM (docs/parts.md)."""

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import build_tokenizer
from deem_fixtures import (
    IMAGE,
    SCHEDULER,
    SIDE,
    STRUCTURE,
    TEXT,
    VAE,
    VISION,
    Q,
    positions_of,
    tensors_of,
    tiny_batch,
    tiny_decoder_config,
    tiny_model,
    wake,
)
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    Siglip2ImageProcessorPil,
    T5Config,
    T5EncoderModel,
    ViTImageProcessorPil,
)

from modeling_deem import DeemForConditionalGeneration, DeemImageDecoder, DeemImageDecoderConfig, drawn_size
from modeling_deem.configuration_deem import DENOISERS
from modeling_deem.image_states_deem import own_features
from modeling_deem.scheduling_deem import add_noise
from modeling_deem.text_deem import LAYERS
from modeling_deem.vision_deem import PLAIN_ENCODERS, STAGED_ENCODERS, pyramid_sides

# What a family's tiny config has besides TEXT.
TEXTS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
}
# Every vision encoder at 64 pixels; a plain ViT's grid is 4x4, or 5x5 where patches are of 12 pixels.
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 16,
    "initializer_range": 0.1,
}
VISIONS: dict[str, dict[str, Any]] = {
    "convnext": {},
    "convnextv2": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24], "image_size": SIDE},
    "dinov3_convnext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24], "image_size": SIDE},
    "resnet": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24], "embedding_size": 8, "layer_type": "basic"},
    "swin": {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, "image_size": SIDE},
    "clip_vision_model": VIT,
    "dinov2": {**VIT, "mlp_ratio": 2, "image_size": 80},
    "dinov2_with_registers": {**VIT, "mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": {**VIT, "num_register_tokens": 2},
    "siglip2_vision_model": {**VIT, "patch_size": 12, "num_patches": 16},
    "siglip_vision_model": {**VIT, "vision_use_head": False},
}

# Every denoiser with the VAE and the scheduler of its pipeline: 64-pixel pictures, 8x8 latents.
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
SANA = {
    "_class_name": "SanaTransformer2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 32,
    "timestep_scale": 0.5,
}
DC_VAE = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 4,
    "encoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "decoder_block_types": ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [4, 4, 8, 8],
    "decoder_block_out_channels": [4, 4, 8, 8],
    "encoder_layers_per_block": [1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5]],
    "attention_head_dim": 4,
    "downsample_block_type": "conv",
    "scaling_factor": 0.41,
}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "caption_channels": 32,
    "norm_num_groups": 4,
    "use_additional_conditions": False,
}
DIFFUSIONS: dict[str, dict[str, Any]] = {
    "unet": {},
    "unet, v": {"scheduler": {**SCHEDULER, "prediction_type": "v_prediction"}},
    "sd3": {
        "denoiser": SD3,
        "vae": {**VAE, "latent_channels": 16, "scaling_factor": 1.5, "shift_factor": 0.06},
        "scheduler": FLOW,
    },
    "sana": {"denoiser": SANA, "vae": DC_VAE, "scheduler": FLOW},
    "pixart": {"denoiser": PIXART},
    "pixart, told the size": {"denoiser": {**PIXART, "use_additional_conditions": True}},
}


def vision_config(family: str, **changes: Any) -> PreTrainedConfig:
    fields = {**VISION, **changes} if family == "convnext" else {**VISIONS[family], **changes}
    return AutoConfig.for_model(**{**fields, "model_type": family})


def text_config(family: str, **changes: Any) -> dict[str, Any]:
    return {**TEXT, **TEXTS[family], "model_type": family, **changes}


def plain_language_model(model: DeemForConditionalGeneration) -> torch.nn.Module:
    """The library's own causal language model with the weights of `model`, whose head must be without bias."""
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    plain.base_model.load_state_dict(model.model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    return plain


# ---- language models -------------------------------------------------------------------------------------------------


def test_every_text_family_is_tried() -> None:
    assert set(TEXTS) == set(LAYERS)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize("family", TEXTS)
def test_gates_at_zero_give_exactly_the_plain_language_model(family: str, tied: bool) -> None:
    model = tiny_model(
        open_gates=False,
        text_config=text_config(family, tie_word_embeddings=tied),
        image_decoder_config=None,
        lm_head_bias=False,
    )
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    plain = plain_language_model(model)
    batch = tiny_batch("bttititttttt", "bttttttte", "bti", padding_side="left", targets=False)
    pixel_values, ids = batch.pop("pixel_values"), batch.pop("input_ids")
    batch["position_ids"] = positions_of(batch["attention_mask"])
    with torch.no_grad():
        embeddings = plain.get_input_embeddings()(ids)
        embeddings[ids == IMAGE] = model.get_image_features(pixel_values).pooler_output.flatten(0, 1)
        ours = model(ids, pixel_values, **batch, output_hidden_states=True)
        theirs = plain(**batch, inputs_embeds=embeddings, output_hidden_states=True)
        assert torch.equal(ours.logits, theirs.logits)
        for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert torch.equal(mine, other)

        # And the comparison can fail: an open gate changes real tokens.
        wake(model)
        assert not torch.allclose(model(ids, pixel_values, **batch).logits, ours.logits, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes"), [*((name, {}) for name in TEXTS), ("gpt_neox", {"use_parallel_residual": False})]
)
def test_image_attention_stands_where_the_family_adds_self_attention(family: str, changes: dict) -> None:
    """The residual is computed from the stream after self-attention, and the stream receives it."""
    model = tiny_model(text_config=text_config(family, **changes), image_decoder_config=None)
    layer, block = model.model.language_model.layers[0], model.model.image_attention["0"]
    seen: dict[str, Any] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(entry=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        block.register_forward_hook(lambda module, args, output: seen.update(query=args[0], residual=output)),
    ]
    with_images = layer.with_images

    def watched(hidden_states, attended, image_states):
        seen.update(stream=hidden_states, attended=attended, added=with_images(hidden_states, attended, image_states))
        return seen["added"]

    layer.with_images = watched
    reading = []
    layer.mlp.register_forward_pre_hook(lambda module, args: reading.append(args[0]))
    with torch.no_grad():
        model(**tiny_batch("bttitit", targets=False))
        for handle in handles:
            handle.remove()
        query, attended, added, residual = (seen[name].clone() for name in ("query", "attended", "added", "residual"))
        block.gate.zero_()
        model(**tiny_batch("bttitit", targets=False))
    assert residual.abs().max() > 1e-3
    # The MLP of the same layer reads it, except where it runs beside self-attention.
    beside = getattr(model.config.text_config, "use_parallel_residual", False)
    assert torch.allclose(*reading, rtol=0, atol=1e-4) == beside
    assert torch.equal(seen["stream"], seen["entry"])
    torch.testing.assert_close(query, seen["entry"] + attended, rtol=0, atol=1e-5)
    torch.testing.assert_close(added, attended + residual, rtol=0, atol=1e-5)


def test_a_language_model_that_caps_its_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="final_logit_softcapping = 30"):
        tiny_model(text_config=text_config("gemma3_text", final_logit_softcapping=30.0))


# ---- vision encoders -------------------------------------------------------------------------------------------------


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


# ---- denoisers -------------------------------------------------------------------------------------------------------


def image_decoder(name: str, seed: int = 0, **changes: Any) -> DeemImageDecoder:
    torch.manual_seed(seed)
    fields = tiny_decoder_config(**{**DIFFUSIONS[name], **changes})
    config = DeemImageDecoderConfig(**fields, token_size=24, context_size=32, feature_size=32)
    config.perceiver_config.encoder_hidden_size = 32
    decoder = DeemImageDecoder(config).eval()
    wake(decoder, seed)
    with torch.no_grad():  # transformers of diffusion start with outputs of zero
        for parameter in decoder.denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return decoder


def test_every_denoiser_is_tried() -> None:
    tried = {fields.get("denoiser", {}).get("_class_name", "UNet2DConditionModel") for fields in DIFFUSIONS.values()}
    assert tried == set(DENOISERS)


def losses_of(decoder: DeemImageDecoder, seed: int = 0) -> list[torch.Tensor]:
    """Both losses of two pictures; the second image of a row, after the first."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    tokens, contexts = torch.randn(2, Q, 24, generator=generator), torch.randn(2, 7, 32, generator=generator)
    features = tuple(torch.randn(2, 32, side, side, generator=generator) for side in (16, 8, 4, 2))
    latents = decoder.encode(pictures, generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    image = decoder.image_loss(contexts, mask, own_features(features), latents, generator=generator)
    consistency = decoder.consistency_loss(latents, tokens, features, generator=generator)
    return [image, consistency]


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_trainable_parameter_of_every_denoiser_moves(name: str) -> None:
    decoder = image_decoder(name).train()
    before = {key: parameter.detach().clone() for key, parameter in decoder.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in range(2):
        losses = losses_of(decoder, step)
        assert all(loss.isfinite() and loss > 0 for loss in losses)
        sum(losses).backward()
    optimizer.step()
    for key, parameter in decoder.named_parameters():
        # The null condition needs a dropped picture, which chance may not bring; see test_losses_deem.
        if key != "null_condition":
            assert torch.equal(parameter, before[key]) == (not parameter.requires_grad), key
    assert not any(parameter.requires_grad for parameter in decoder.vae.parameters())


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_denoiser_draws_and_survives_saving(name: str, tmp_path) -> None:
    decoder = image_decoder(name)
    condition = torch.randn(2, Q, 32, generator=torch.Generator().manual_seed(0))

    def draw(decoder: DeemImageDecoder) -> torch.Tensor:
        return decoder.sample(condition, decoder.no_features(2), generator=torch.Generator().manual_seed(1))

    pictures = draw(decoder)
    assert pictures.shape == (2, 3, SIDE, SIDE) and pictures.isfinite().all()
    assert decoder.config.target_size == SIDE
    assert pictures.std() > 1e-3 and not torch.allclose(pictures[0], pictures[1], atol=1e-3)
    decoder.save_pretrained(tmp_path)
    loaded = DeemImageDecoder.from_pretrained(tmp_path)
    ours, theirs = tensors_of(decoder), tensors_of(loaded)
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    torch.testing.assert_close(draw(loaded), pictures, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_other_schedulers_draw_nearly_the_same_in_many_steps(name: str) -> None:
    decoder = image_decoder(name)
    condition = torch.randn(1, Q, 32, generator=torch.Generator().manual_seed(0))
    flow = "Flow" in type(decoder.scheduler).__name__
    latents = torch.randn(1, decoder.denoiser.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    names = (
        ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
        if flow
        else ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler")
    )
    pictures = [
        decoder.sample(
            condition,
            decoder.no_features(1),
            num_inference_steps=40,
            guidance_scale=1.0,
            latents=latents,
            scheduler=decoder.make_scheduler(other),
        )
        for other in names
    ]
    for picture in pictures[1:]:
        assert (picture - pictures[0]).abs().mean() < 0.05 * pictures[0].std()
    refused = "DDIMScheduler" if flow else "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(ValueError, match=f"No scheduler '{refused}'.*{names[1]}"):
        decoder.make_scheduler(refused)
    with pytest.raises(ValueError, match="make_scheduler"):
        decoder.sample(condition, decoder.no_features(1), scheduler=getattr(diffusers, refused)())


class PerfectDenoiser(torch.nn.Module):
    """The best denoiser of a world that holds one picture: it predicts what the scheduler asks for exactly."""

    dtype = torch.float32

    def __init__(self, decoder: DeemImageDecoder, picture: torch.Tensor):
        super().__init__()
        self.config, self.picture, self.scheduler = decoder.denoiser.config, picture, decoder.scheduler

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, condition: torch.Tensor, **extra) -> torch.Tensor:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            return (sample - self.picture) / (timestep / 1000).view(-1, 1, 1, 1)
        share = self.scheduler.alphas_cumprod[timestep.long()].view(-1, 1, 1, 1)
        noise = (sample - share.sqrt() * self.picture) / (1 - share).sqrt()
        if self.scheduler.config.prediction_type == "epsilon":
            return noise
        return share.sqrt() * noise - (1 - share).sqrt() * self.picture


@pytest.mark.parametrize("name", ["unet", "unet, v", "sd3"])
def test_a_perfect_denoiser_has_no_loss_and_draws_its_picture_by_every_scheduler(name: str) -> None:
    decoder = image_decoder(name)
    picture = decoder.encode(torch.rand(1, 3, SIDE, SIDE) * 2 - 1)
    decoder.denoiser = PerfectDenoiser(decoder, picture)
    condition = torch.zeros(1, Q, 32)
    noise, times = torch.randn(4, *picture.shape[1:]), torch.tensor([0, 300, 600, 999])
    with torch.no_grad():
        latents, states = picture.expand(4, -1, -1, -1), decoder.no_features(4)
        errors = decoder.error_map(latents, condition.expand(4, -1, -1), states, times, noise)
    assert errors.max() < 1e-3
    flow = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    denoising = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", *flow[1:])
    for scheduler in flow if name == "sd3" else denoising:
        drawn = decoder.sample(
            condition,
            decoder.no_features(1),
            num_inference_steps=20,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            scheduler=decoder.make_scheduler(scheduler),
        )
        # Solvers of flow matching round their timesteps to integers.
        assert (drawn - decoder.decode(picture)).abs().mean() < 1e-3, scheduler


def test_flow_matching_is_that_of_diffusers() -> None:
    decoder = image_decoder("sd3")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = torch.randn(2, 3, 16, 8, 8)[:2].unbind(1)[:2]
    noisy, target, times = add_noise(decoder.scheduler, latents, noise, torch.tensor([0, 600]))
    expected = scheduler.timesteps.flip(0)[[0, 600]]
    assert torch.equal(times, expected)
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, expected, noise))
    assert torch.equal(target, noise - latents)
    # One step from there along the exact target ends in the picture.
    share = times.view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noisy - share * target, latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_latents_are_those_of_the_pipeline(name: str) -> None:
    """Scaled as the pipelines of diffusers do, and back."""
    decoder = image_decoder(name)
    pictures = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    with torch.no_grad():
        encoded = decoder.vae.encode(pictures)
        plain = encoded.latent if "latent" in encoded else encoded.latent_dist.mean
        ours = decoder.encode(pictures, noise=torch.zeros_like(plain))
        config = decoder.vae.config
        shift = {"sd3": 0.06}.get(name, 0.0)
        torch.testing.assert_close(ours, (plain - shift) * config.scaling_factor)
        expected = (decoder.vae.decode(plain).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoder.decode(ours), expected, rtol=0, atol=1e-5)


def test_denoisers_get_what_their_pipelines_give_them() -> None:
    """The calls of the pipelines of diffusers, written out."""
    sample, condition = torch.randn(2, 4, 8, 8), torch.randn(2, Q, 32)
    times = torch.tensor([10.0, 900.0])
    with torch.no_grad():
        decoder = image_decoder("sana")
        plain = SanaTransformer2DModel.from_config(SANA).eval()
        plain.load_state_dict(decoder.denoiser.state_dict())
        ours = decoder.denoise(sample, times, condition, decoder.no_features(2))
        assert torch.equal(ours, plain(sample, condition, times * 0.5).sample)

        decoder = image_decoder("pixart, told the size")
        plain = PixArtTransformer2DModel.from_config(decoder.config.denoiser).eval()
        plain.load_state_dict(decoder.denoiser.state_dict())
        size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
        ours = decoder.denoise(sample, times, condition, decoder.no_features(2))
        assert torch.equal(ours, plain(sample, condition, times, size).sample.chunk(2, dim=1)[0])

        decoder = image_decoder("sd3")
        plain = SD3Transformer2DModel.from_config(SD3).eval()
        plain.load_state_dict(decoder.denoiser.state_dict())
        sample = torch.randn(2, 16, 8, 8)
        pooled = decoder.pooled_projector(condition.mean(1))
        assert pooled.std() > 0.1
        ours = decoder.denoise(sample, times, condition, decoder.no_features(2))
        assert torch.equal(ours, plain(sample, condition, pooled, times).sample)


def save_pipeline(name: str, folder) -> None:
    """A pipeline as diffusers saves it, with its text encoders, for the denoisers of DIFFUSIONS."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 16
    end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = end
    size = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    t5 = T5EncoderModel(T5Config(**size)).eval()
    fields = tiny_decoder_config(**DIFFUSIONS[name])
    denoiser = image_decoder(name).denoiser
    parts = {
        "transformer": getattr(diffusers, fields["denoiser"]["_class_name"]).from_config(denoiser.config),
        "vae": getattr(diffusers, fields["vae"]["_class_name"]).from_config(fields["vae"]),
    }
    parts["transformer"].load_state_dict(denoiser.state_dict())
    if name == "sd3":
        clip = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=12,
            eos_token_id=tokenizer.eos_token_id,
        )
        clips = {f"text_encoder{n}": CLIPTextModelWithProjection(clip).eval() for n in ("", "_2")}
        tokenizers = {f"tokenizer{n}": tokenizer for n in ("", "_2", "_3")}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = StableDiffusion3Pipeline(**parts, **clips, **tokenizers, text_encoder_3=t5, scheduler=scheduler)
    elif name == "sana":
        gemma = AutoModel.from_config(AutoConfig.for_model(**text_config("gemma", model_type="gemma2"))).eval()
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        pipeline = SanaPipeline(**parts, text_encoder=gemma, tokenizer=tokenizer, scheduler=scheduler)
    else:
        scheduler = DPMSolverMultistepScheduler(beta_start=0.0002, beta_end=0.03)
        pipeline = PixArtSigmaPipeline(**parts, text_encoder=t5, tokenizer=tokenizer, scheduler=scheduler)
    pipeline.save_pretrained(folder / "diffusion")


@pytest.mark.parametrize("name", ["sd3", "sana", "pixart, told the size"])
def test_pipelines_bring_their_denoiser_and_their_empty_prompt(name: str, tmp_path) -> None:
    save_pipeline(name, tmp_path)
    AutoModel.from_config(vision_config("dinov2")).save_pretrained(tmp_path / "vision")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path / "vision")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**text_config("qwen3"))).save_pretrained(tmp_path / "text")
    build_tokenizer().save_pretrained(tmp_path / "text")
    model = DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(
        *(str(tmp_path / part) for part in ("vision", "text", "diffusion")),
        num_image_tokens=Q,
        feature_size=32,
        image_attention_heads=4,
        perceiver_config={"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1},
    )
    decoder = model.image_decoder
    assert drawn_size(str(tmp_path / "diffusion")) == decoder.config.target_size == SIDE
    if name == "pixart, told the size":
        assert isinstance(decoder.scheduler, DDPMScheduler)
        assert (decoder.scheduler.config.beta_end, decoder.scheduler.config.clip_sample) == (0.03, False)
    else:
        assert isinstance(decoder.scheduler, FlowMatchEulerDiscreteScheduler)
        assert decoder.scheduler.config.shift == 3.0

    # Without condition it denoises as the pipeline without prompt; Stable Diffusion 3 reads more tokens than we have.
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "diffusion")
    channels = decoder.denoiser.config.in_channels
    sample, times = torch.randn(2, channels, 8, 8), torch.tensor([10.0, 900.0])
    with torch.no_grad():
        null = decoder.null_condition.expand(2, -1, -1)
        ours = decoder.denoise(sample, times, null, decoder.no_features(2))
        if name == "sd3":
            tokens, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
            assert torch.equal(decoder.null_condition, tokens[:, :Q])
            tokens = tokens[:, :Q].repeat(2, 1, 1)
            theirs = pipeline.transformer(sample, tokens, pooled.repeat(2, 1), times).sample
        else:
            tokens, mask, _, _ = pipeline.encode_prompt("", num_images_per_prompt=2)
            assert mask[0].sum() == 1 and tokens.shape[1] == 300
            extra = {"encoder_attention_mask": mask}
            if name == "sana":
                times = times * 0.5
            else:
                size = {"resolution": torch.tensor([[64.0, 64.0]] * 2), "aspect_ratio": torch.ones(2, 1)}
                extra["added_cond_kwargs"] = size
            theirs = pipeline.transformer(sample, tokens, timestep=times, **extra).sample[:, :channels]
    assert ours.std() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_a_denoiser_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="'tokens\\+features'.*SanaTransformer2DModel"):
        image_decoder("sana", consistency_condition="tokens+features")
    assert image_decoder("sana").config.consistency_condition == "tokens"
    with pytest.raises(ValueError, match="16 channels.*takes 4"):
        image_decoder("pixart", vae={**VAE, "latent_channels": 16})
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        image_decoder("sd3", scheduler={**FLOW, "use_dynamic_shifting": True}).scheduler  # noqa: B018
    with pytest.raises(ValueError, match="'sample' is not supported"):
        image_decoder("unet", scheduler={**SCHEDULER, "prediction_type": "sample"}).scheduler  # noqa: B018
    with pytest.raises(ValueError, match="must give caption_channels"):
        image_decoder("pixart", denoiser={**PIXART, "caption_channels": None})
    with pytest.raises(ValueError, match="guidance_embeds"):
        image_decoder("sana", denoiser={**SANA, "guidance_embeds": True})


# ---- whole models ----------------------------------------------------------------------------------------------------

# Every part occurs, and is tried thoroughly; every two parts meet once, in a forward.
COMBINATIONS = list(zip(VISIONS, TEXTS, itertools.cycle(DIFFUSIONS)))


def combine(vision: str, text: str, diffusion: str) -> DeemForConditionalGeneration:
    model = tiny_model(
        vision_config=vision_config(vision),
        text_config=text_config(text, tie_word_embeddings=len(text) % 2 == 0),
        image_decoder_config=tiny_decoder_config(**DIFFUSIONS[diffusion]),
    )
    with torch.no_grad():  # transformers of diffusion start with outputs of zero
        for parameter in model.image_decoder.denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module", params=COMBINATIONS, ids=" + ".join)
def combined(request) -> DeemForConditionalGeneration:
    return combine(*request.param)


@pytest.mark.parametrize("vision", VISIONS)
def test_every_two_parts_fit(vision: str) -> None:
    shift, batch = list(VISIONS).index(vision), tiny_batch("btitti")
    for number, text in enumerate(TEXTS):
        diffusion = list(DIFFUSIONS)[(shift + number) % len(DIFFUSIONS)]
        with torch.no_grad():
            outputs = combine(vision, text, diffusion)(**batch)
        losses = torch.stack([outputs.text_loss, outputs.image_loss, outputs.consistency_loss])
        assert losses.isfinite().all() and (losses > 0).all(), (text, diffusion)


def test_every_combination_learns(combined) -> None:
    combined.zero_grad()
    outputs = combined(**tiny_batch("btitti", "btitt"), generator=torch.Generator().manual_seed(0))
    losses = (outputs.text_loss, outputs.image_loss, outputs.consistency_loss)
    assert all(loss.isfinite() and loss > 0 for loss in losses)
    outputs.consistency_loss.backward(retain_graph=True)
    encoder = next(combined.model.vision_tower.encoder.parameters())
    assert encoder.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in combined.model.language_model.parameters())
    outputs.loss.backward()
    silent = {"image_decoder.null_condition"}  # needs a picture whose condition is dropped, in training
    for name, parameter in combined.named_parameters():
        if parameter.requires_grad and name not in silent:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    combined.zero_grad()


def test_every_combination_writes_the_same_with_and_without_cache(combined) -> None:
    batch = tiny_batch("bttititttttt", "btttt", "bitbtit", padding_side="left", targets=False)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": STRUCTURE}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, full = (combined.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, full.sequences)
    for mine, other in zip(cached.logits, full.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_every_combination_draws(combined) -> None:
    batch = tiny_batch("btitts", "btts", padding_side="left", targets=False)
    pictures = combined.generate_images(**batch, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert pictures.shape == (2, 3, SIDE, SIDE) and pictures.isfinite().all() and pictures.std() > 1e-3
    redrawn = combined.reconstruct(batch["pixel_values"], num_inference_steps=2)
    assert redrawn.shape == (1, 3, SIDE, SIDE) and redrawn.isfinite().all()


def test_every_combination_survives_saving(combined, tmp_path) -> None:
    combined.save_pretrained(tmp_path)
    loaded = DeemForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = tensors_of(combined), tensors_of(loaded)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    trainable = {name for name, parameter in combined.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
