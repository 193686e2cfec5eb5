# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every supported vision encoder, language model and denoiser in a tiny DEEM (docs/parts.md)."""

from typing import Any

import numpy as np
import pytest
import torch
from deem_fixtures import (
    IMAGE,
    SIDE,
    TEXT,
    VISION,
    positions_of,
    tensors_of,
    tiny_batch,
    tiny_model,
    wake,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Siglip2ImageProcessorPil

from modeling_deem import DeemForConditionalGeneration
from modeling_deem.text_deem import ATTENTION_OUTPUT
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
    assert set(TEXTS) == set(ATTENTION_OUTPUT)


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


@pytest.mark.parametrize("family", TEXTS)
def test_image_attention_stands_where_the_family_adds_self_attention(family: str) -> None:
    """The residual is computed from the stream after self-attention, and the stream receives it."""
    model = tiny_model(text_config=text_config(family), image_decoder_config=None)
    layer, block = model.model.language_model.layers[0], model.model.image_attention["0"]
    seen: dict[str, Any] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(entry=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        block.register_forward_hook(lambda module, args, output: seen.update(query=args[0], residual=output)),
        getattr(layer, ATTENTION_OUTPUT[family]).register_forward_hook(
            lambda module, args, output: seen.update(added=output[0] if isinstance(output, tuple) else output)
        ),
    ]
    with torch.no_grad():
        model(**tiny_batch("bttitit", targets=False))
    for handle in handles:
        handle.remove()
    assert seen["residual"].abs().max() > 1e-3
    attention = seen["query"] - seen["entry"]
    torch.testing.assert_close(seen["added"], attention + seen["residual"], rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("family", VISIONS)
def test_vision_families_survive_saving(family: str, tmp_path) -> None:
    model = tiny_model(vision_config=vision_config(family), image_decoder_config=None)
    model.save_pretrained(tmp_path)
    loaded = tensors_of(DeemForConditionalGeneration.from_pretrained(tmp_path))
    assert set(loaded) == set(tensors_of(model))
    for name, tensor in tensors_of(model).items():
        assert torch.equal(loaded[name], tensor), name


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
