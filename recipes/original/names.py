# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Tables of the original's names of tensors: what they are here, which are not used, which values change.

`rename` and `convert_value` also translate gradients, for comparisons with the original.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_deem.vision_deem import sincos_positions_2d

Rules = list[tuple[str, str | Callable[[re.Match], str]]]

# ---- names: (regex, replacement), each applied to the whole name, in this order -------------------------------------

TRUNK: Rules = [  # timm ConvNeXt -> transformers ConvNextModel
    (r"stem\.0\.", "embeddings.patch_embeddings."),
    (r"stem\.1\.", "embeddings.layernorm."),
    (r"stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"(layers\.\d+)\.conv_dw\.", r"\1.dwconv."),
    (r"(layers\.\d+)\.norm\.", r"\1.layernorm."),
    (r"(layers\.\d+)\.mlp\.fc([12])\.", r"\1.pwconv\2."),
    (r"(layers\.\d+)\.gamma$", r"\1.layer_scale_parameter"),
    (r"\bhead\.norm\.", "layernorm."),
]
QFORMER: Rules = [
    (r"perceiver_resampler\.", "perceiver."),
    (r"blip2qformer\.layernorm\.", "norm."),
    (r"blip2qformer\.encoder\.layer\.", "layers."),
    (r"(layers\.\d+)\.attention\.", r"\1.self_attention."),
    (r"(layers\.\d+)\.crossattention\.", r"\1.cross_attention."),
    (r"_attention\.attention\.", "_attention."),
    (r"\.([qk])_norm\.", lambda match: {"q": ".query_norm.", "k": ".key_norm."}[match[1]]),
    (r"(layers\.\d+)\.intermediate_query\.dense\.", r"\1.intermediate."),
    (r"(layers\.\d+(?:\.\w+_attention)?)\.output(?:_query)?\.LayerNorm\.", r"\1.output_norm."),
    (r"(layers\.\d+(?:\.\w+_attention)?)\.output(?:_query)?\.dense\.", r"\1.output."),
]
MMFS: Rules = [
    (r"\bdynamic_offset_mask\.", "query_projection."),
    (r"\bquery_relpos\.weight$", "image_positions"),
    (r"\bvalue_proj\.", "value_projection."),
    (r"\boutput_proj\.", "output_projection."),
    (r"\bignore_token$", "null_value"),
]
OFFICIAL: Rules = [
    # vision
    (r"^visual_tokenizer\.sniffer\.vision_model\.visual\.trunk\.", "model.vision_tower.encoder."),
    (r"^visual_tokenizer\.sniffer\.vision_model\.adapter_cls\.", "model.vision_tower.pooled_projection."),
    (
        r"^visual_tokenizer\.sniffer\.vision_model\.adapter_c([2-5])\.",
        lambda match: f"model.vision_tower.level_projections.{int(match[1]) - 2}.",
    ),
    (r"^visual_tokenizer\.pos_proj\.", "model.vision_tower.position_projection."),
    (r"^visual_tokenizer\.pos_ln\.", "model.vision_tower.position_norm."),
    (r"^visual_tokenizer\.post_ln\.", "model.vision_tower.output_norm."),
    (
        r"^visual_tokenizer\.feature_extractor\.mask_feat_linear\.",
        "model.vision_tower.region_tokens.level_projection.",
    ),
    (
        r"^visual_tokenizer\.feature_extractor\.mask_linear\.layers\.(\d)\.",
        lambda match: f"model.vision_tower.region_tokens.shape_projection.{2 * int(match[1])}.",
    ),
    (r"^visual_tokenizer\.(?=perceiver_resampler\.)", "model."),
    (r"^visual_tokenizer\.proj_t\.", "model.projector."),
    # language
    (r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.attn\.", r"model.image_attention.\1.synchronizer."),
    (r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.norm1\.", r"model.image_attention.\1.query_norm."),
    (r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.norm2\.", r"model.image_attention.\1.feature_norm."),
    (r"^mm_decoder\.layers\.(\d+)\.llama_cross_attn\.gate$", r"model.image_attention.\1.gate"),
    (r"^mm_decoder\.", "model.language_model."),
    (r"^soi_token$", "model.start_of_image"),
    (r"^text_decoder\.head\.", "lm_head."),
    (r"^text_decoder\.head_new\.", "lm_head."),  # added to the last rows, see `convert`
    # diffusion
    (r"^visual_tokenizer\.proj_i\.", "image_decoder.token_projector."),
    (r"^visual_tokenizer\.encoder\.unet\.", "image_decoder.denoiser."),
    (r"^visual_tokenizer\.encoder\.vae\.", "image_decoder.vae."),
    (r"^visual_tokenizer\.encoder\.mmfs_module\.mmfs_down_blocks\.", "image_decoder.feature_fusion.skip_blocks."),
    (r"^visual_tokenizer\.encoder\.mmfs_module\.mmfs_mid_block\.", "image_decoder.feature_fusion.mid_block."),
    (r"^(image_decoder\.feature_fusion\..*)\.mmfs\.", r"\1.synchronizer."),
    (r"^(image_decoder\.feature_fusion\..*)\.feat_norm\.", r"\1.feature_norm."),
    (r"^context_feat_proj\.", "image_decoder.context_projector."),
    (r"^(?:image_decoder|visual_tokenizer)\.neg_prompt_embeds$", "image_decoder.null_condition"),
]
OFFICIAL = OFFICIAL + TRUNK + QFORMER + MMFS
OPEN_CLIP: Rules = [(r"^visual\.trunk\.", ""), *TRUNK]
MM_INTERLEAVED: Rules = [
    # Assumed from the family's structure, not checked against a checkpoint: the diffusion side belongs to the image
    # decoder, the visual tokenizer has one projection, and an open_clip trunk may come as --extra.
    (r"^image_decoder\.decoder\.(unet|vae|mmfs_module)\.", r"visual_tokenizer.encoder.\1."),
    (r"^image_decoder\.decoder\.neg_prompt_embeds$", "image_decoder.neg_prompt_embeds"),
    (r"^visual_tokenizer\.proj\.", "visual_tokenizer.proj_t."),
    (r"^visual\.trunk\.", "visual_tokenizer.sniffer.vision_model.visual.trunk."),
    *OFFICIAL,
]
RULES = {"official": OFFICIAL, "open_clip": OPEN_CLIP, "mm_interleaved": MM_INTERLEAVED}

# ---- names without a counterpart, with the reason ---------------------------------------------------------------------

_CLIP_HEAD = "projection into CLIP's joint space, which DEEM's forward does not use"
_CLIP_TEXT_NAMES = r"^(text|transformer|token_embedding|ln_final)\.|^(positional_embedding|text_projection|logit_(scale|bias)|attn_mask)$"
_CLIP_TEXT = "CLIP's text tower and temperature; only the vision trunk is used"
UNUSED: dict[str, list[tuple[str, str]]] = {
    "official": [(r"^visual_tokenizer\.sniffer\.vision_model\.visual\.head\.", _CLIP_HEAD)],
    "open_clip": [
        (r"^visual\.head\.", _CLIP_HEAD),
        (_CLIP_TEXT_NAMES, _CLIP_TEXT),
    ],
    "mm_interleaved": [
        (r"^visual\.head\.", _CLIP_HEAD),
        (_CLIP_TEXT_NAMES, _CLIP_TEXT),
        (r"^visual_tokenizer\.encoder\.(?!unet|vae|mmfs_module)", "CLIP ViT-L with adapter has no counterpart here"),
    ],
}
# Of a config without diffusion part (the original's third stage) also these:
UNUSED_WITHOUT_DIFFUSION = [
    (
        r"^image_decoder\.|^context_feat_proj\.|neg_prompt_embeds$|^visual_tokenizer\.(proj_i|encoder)\.",
        "the config has no diffusion part",
    )
]
FRESH: dict[str, list[tuple[str, str]]] = {
    "official": [],
    "open_clip": [],
    "mm_interleaved": [
        (r"^image_decoder\.token_projector\.", "the parent has no consistency loss"),
        (r"^model\.vision_tower\.(?!encoder\.)", "joins the new vision encoder to the model"),
        (r"^model\.vision_tower\.encoder\.", "no ConvNeXt was given as --extra"),
    ],
}

# ---- values -----------------------------------------------------------------------------------------------------------


def drop_unused_points(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Drop the last of each K + 1 rows, which the original discards: (G * (K + 1), ...) -> (G * K, ...)."""
    groups = tensor.shape[0] - shape[0]
    if groups <= 0 or tensor.shape[0] % groups:
        return tensor  # not of that layout: the shape check names it
    return tensor.unflatten(0, (groups, -1))[:, :-1].flatten(0, 1)


VALUES: list[tuple[str, Callable[[torch.Tensor, torch.Size], torch.Tensor]]] = [
    (r"\battention_weights\.(weight|bias)$", drop_unused_points),
    (r"\bignore_token$", lambda tensor, shape: tensor.flatten()),  # (1, 1, 1, V) -> (V,)
]
HEAD, HEAD_NEW = re.compile(r"^text_decoder\.head\."), re.compile(r"^text_decoder\.head_new\.")  # the last rows' sum


def grid_table(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sin-cos table that the model computes for a stored one, (s*s, c), or (1 + s*s, c) with a zero row first."""
    rows = tensor.shape[0]
    side = round(rows**0.5)
    table = sincos_positions_2d(side, tensor.shape[1])
    return torch.cat([table.new_zeros(rows - side * side, tensor.shape[1]), table])


def clip_statistics(values: tuple[float, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that gives CLIP's mean or standard deviation, (1, 3, 1, 1), for any stored tensor."""
    return lambda tensor: torch.tensor(values).view(1, 3, 1, 1)


def rotary_frequencies(tensor: torch.Tensor) -> torch.Tensor:
    """Return the inverse frequencies of rotary embeddings, as many as are stored."""
    return 10000.0 ** -(torch.arange(len(tensor), dtype=torch.float64) / len(tensor)).float()


RECOMPUTED: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    (r"\bpos_embed$", grid_table),
    (r"^visual_tokenizer\.clip_mean$", clip_statistics(OPENAI_CLIP_MEAN)),
    (r"^visual_tokenizer\.clip_std$", clip_statistics(OPENAI_CLIP_STD)),
    (r"\.rotary_emb\.inv_freq$", rotary_frequencies),
]


def rename(name: str, rules: Rules) -> str:
    """Return the name that a source name gets here; neither need exist."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def convert_value(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return the tensor (or its gradient) of a source name in our layout, where the target has `shape`."""
    for pattern, function in VALUES:
        if re.search(pattern, name):
            tensor = function(tensor, shape)
    return tensor


def find(name: str, table: Iterable[tuple[str, Any]]) -> Any | None:
    """Return the entry of the first pattern that occurs in `name`, or None."""
    return next((entry for pattern, entry in table if re.search(pattern, name)), None)
