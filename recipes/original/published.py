# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The published model: its sizes, its training stages and the paper's figures."""

from dataclasses import dataclass, field
from typing import Any

from recipes.training.parameter_groups import OLD_ROWS

# ConvNeXt-B-CLIP, Vicuna-7B-v1.5 with 6 new tokens, SD-2.1-base; all else are the defaults of `DeemConfig`: 77 tokens,
# 12-layer perceiver, image attention in every 4th layer.
OFFICIAL_7B: dict[str, Any] = {
    "vision_config": {
        "model_type": "convnext",
        "depths": [3, 3, 27, 3],
        "hidden_sizes": [128, 256, 512, 1024],
        "layer_norm_eps": 1e-6,
        "image_size": 256,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32006,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "image_decoder_config": {},
}
SIZES = {"official-7b": OFFICIAL_7B}
CLIP_WIDTH = 640  # of ConvNeXt-B-CLIP's joint space; its projection head is an MLP of twice that width


@dataclass
class TrainingStage:
    """A training stage of the paper.

    Attributes:
        name: number and purpose.
        freeze: parts that do not train, named as in the recipes.
        paper: trained parameters according to the paper.
        changes: fields of the configuration that differ from the first stage's.
    """

    name: str
    freeze: list[str]
    paper: str
    changes: dict[str, Any] = field(default_factory=dict)


STAGES = [
    TrainingStage("1 alignment", ["model.language_model", "image_decoder.denoiser", "image_decoder.vae"], "494.9 M"),
    TrainingStage(
        "2 image-text SFT",
        ["model.vision_tower.encoder", "image_decoder.denoiser", "image_decoder.vae", OLD_ROWS],
        "about 7 B",
    ),
    TrainingStage(
        "3 mask-text SFT",
        ["model.vision_tower.encoder", OLD_ROWS],
        "about 7 B",
        {"use_region_tokens": True, "image_decoder_config": None},
    ),
]
