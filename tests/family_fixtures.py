# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every supported vision encoder, language model and denoiser, made tiny (docs/parts.md)."""

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from deem_fixtures import (
    SCHEDULER,
    SIDE,
    TEXT,
    UNET,
    VAE,
    VISION,
)
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
)

from modeling_deem import DeemForConditionalGeneration

OLD_VOCABULARY = 259  # of a language model before it becomes a part

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


def save_text(folder: str | Path, vocabulary: int = OLD_VOCABULARY, **changes: Any) -> None:
    """A random language model with its tokenizer, as a part."""
    config = AutoConfig.for_model(**{**TEXT, "vocab_size": vocabulary, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def save_diffusion(folder: str | Path) -> None:
    """A random Stable Diffusion pipeline, as a part."""
    text = CLIPTextConfig(
        vocab_size=OLD_VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    StableDiffusionPipeline(
        AutoencoderKL.from_config({**VAE, "scaling_factor": 0.7}),
        CLIPTextModel(text),
        build_tokenizer(),
        UNet2DConditionModel.from_config(UNET),
        # As Stable Diffusion ships it: a sampler's config, of which training takes the noise schedule.
        PNDMScheduler.from_config({**SCHEDULER, "_class_name": "PNDMScheduler"}),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
