# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The original's hyper-parameters -> configurations of this package and of transformers."""

import re
from typing import Any

import torch
from transformers import ConvNextConfig

from modeling_deem import DeemConfig


def deem_config(
    source: dict[str, Any], position_grid_side: int = 16, use_region_tokens: bool = False, **overrides: Any
) -> DeemConfig:
    """Return our configuration of the original's hyper-parameters.

    Args:
        source: `image_size`, `spatial_shapes` (sides of the maps that the language model sees), `image_embed_dim`,
            `convnext` (depths, dims, drop_path), `llm` (LLaMA fields), `txt_vocab_size`, `special_token_dict`,
            `cross_attention_frequency`, `perceiver`; for the diffusion part `perceiver_dec`, `unet`, `vae`,
            `scheduler`, `mmfsnet_attn_dim`, `uncond_prob` (without `unet` the model gets no image decoder);
            `loss_*_weight`.
        position_grid_side: side of the stored position table.
        use_region_tokens: the `mask_align` variant.
        overrides: further fields of `DeemConfig`; a dict for `image_decoder_config` is merged.
    """
    convnext, llm, tokens = source["convnext"], source["llm"], source["special_token_dict"]
    grids = [source["image_size"] // stride for stride in (4, 8, 16, 32)]
    decoder = decoder_config(source) | overrides.pop("image_decoder_config", {})
    return DeemConfig(
        vision_config={
            "model_type": "convnext",
            "depths": convnext["depths"],
            "hidden_sizes": convnext["dims"],
            "drop_path_rate": convnext.get("drop_path", 0.0),
            "layer_norm_eps": 1e-6,
            "image_size": source["image_size"],
        },
        text_config={
            "model_type": "llama",
            **{key: value for key, value in llm.items() if key not in ("vocab_size", "pad_token_id")},
            "vocab_size": source["txt_vocab_size"],
        },
        perceiver_config=perceiver_config(source["perceiver"]),
        image_decoder_config=decoder or None,
        image_token_id=tokens["image_token_id"],
        start_of_image_token_id=tokens["soi_token_id"],
        bos_token_id=tokens["bos_token_id"],
        eos_token_id=tokens["eos_token_id"],
        pad_token_id=tokens["pad_token_id"],
        feature_size=source["image_embed_dim"],
        position_grid_side=position_grid_side,
        use_region_tokens=use_region_tokens,
        image_attention_interval=source["cross_attention_frequency"],
        image_attention_levels=[level for level, side in enumerate(grids) if side in source["spatial_shapes"]],
        image_attention_sides=source["spatial_shapes"],
        text_loss_weight=source.get("loss_txt_weight", 1.0),
        image_loss_weight=source.get("loss_img_weight", 5.0),
        consistency_loss_weight=source.get("loss_sniffer_weight", 5.0),
        **overrides,
    )


def config_of_weights(source: dict[str, Any], weights: dict[str, torch.Tensor], **overrides: Any) -> DeemConfig:
    """Return `deem_config` with what only the weights tell: the position table's side, and if there are region tokens."""
    table = weights.get("visual_tokenizer.pos_embed")
    side = 16 if table is None else round((table.shape[0] - 1) ** 0.5)
    region = any(name.startswith("visual_tokenizer.feature_extractor.") for name in weights)
    return deem_config(source, position_grid_side=side, use_region_tokens=region, **overrides)


def decoder_config(source: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of our image decoder's configuration; none for a model without one."""
    if not source.get("unet"):
        return {}
    scheduler = {key: value for key, value in source["scheduler"].items() if not key.startswith("_")}
    return {
        "denoiser": {**source["unet"], "_class_name": "UNet2DConditionModel"},
        "vae": {**source["vae"], "_class_name": "AutoencoderKL"},
        # The original loads the pipeline's scheduler file, whatever its class, into DDPM.
        "scheduler": {"timestep_spacing": "leading", **scheduler, "_class_name": "DDPMScheduler"},
        "perceiver_config": perceiver_config(source["perceiver_dec"]),
        "fusion_size": source["mmfsnet_attn_dim"],
        "condition_dropout": source.get("uncond_prob", 0.1),
    }


def perceiver_config(source: dict[str, Any]) -> dict[str, Any]:
    """Return our perceiver configuration of a Q-Former's hyper-parameters; what is left out has BLIP-2's defaults."""
    return {
        "num_queries": source["num_queries"],
        "hidden_size": source["hidden_size"],
        "encoder_hidden_size": source["encoder_hidden_size"],
        "num_hidden_layers": source["num_hidden_layers"],
        "num_attention_heads": source["num_attention_heads"],
        "intermediate_size": source.get("intermediate_size", 3072),
        "cross_attention_frequency": source["cross_attention_frequency"],
        "qk_norm": source.get("qk_normalization", False),
        "hidden_dropout_prob": source.get("hidden_dropout_prob", 0.1),
        "attention_probs_dropout_prob": source.get("attention_probs_dropout_prob", 0.1),
    }


def convnext_config(weights: dict[str, torch.Tensor], image_size: int) -> ConvNextConfig:
    """Return the encoder's configuration, read off the shapes of an open_clip state dict.

    Raises:
        ValueError: if the weights hold no ConvNeXt.
    """
    blocks = [re.match(r"visual\.trunk\.stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight$", name) for name in weights]
    sizes = {(int(m[1]), int(m[2])): weights[m[0]].shape[0] for m in blocks if m}
    if not sizes:
        raise ValueError(
            "The weights have no 'visual.trunk.stages.*.blocks.*.conv_dw.weight': expected the state dict of an "
            "open_clip model with a timm ConvNeXt trunk."
        )
    stages = range(max(stage for stage, _ in sizes) + 1)
    return ConvNextConfig(
        depths=[sum(place[0] == stage for place in sizes) for stage in stages],
        hidden_sizes=[sizes[stage, 0] for stage in stages],
        num_stages=len(stages),
        layer_norm_eps=1e-6,
        image_size=image_size,
    )
