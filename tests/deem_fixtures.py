# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The real model classes made tiny, and ragged batches for them. Ids fit the processor of conftest.

A row of a batch is written as a word, one letter per piece: `b` bos, `e` eos, `t` a random text token, `i` an image
(start-of-image token and Q image tokens), `s` a start-of-image token alone.
"""

import copy
from typing import Any

import torch

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from processing import make_labels

PAD, BOS, EOS, START, IMAGE, VOCABULARY = 0, 1, 2, 259, 260, 265
Q = 4
SIDE = 64
# Tokens that an untrained model must not write, since they are structure rather than text.
STRUCTURE = [PAD, BOS, START, IMAGE]

VISION = {
    "model_type": "convnext",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 24],
    "image_size": SIDE,
    "layer_scale_init_value": 0.5,
    "initializer_range": 0.1,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "use_linear_projection": True,
}
UNET_OF_THREE_LEVELS = UNET | {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8, 8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": SIDE,
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


def tiny_decoder_config(**changes: Any) -> dict[str, Any]:
    """Fields of a tiny `DeemImageDecoderConfig`: 64-pixel pictures, 8x8 latents, two UNet levels."""
    fields = {
        "denoiser": UNET,
        "vae": VAE,
        "scheduler": SCHEDULER,
        "feature_sides": [16, 8, 4, 2],
        "fusion_size": 32,
        "fusion_heads": 4,
        "fusion_points": 2,
        "fusion_max_images": 4,
        "num_inference_steps": 3,
        "perceiver_config": {
            "num_queries": Q,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "qk_norm": False,
            "initializer_range": 0.1,
        },
    }
    return copy.deepcopy(fields | changes)


def tiny_config(**changes: Any) -> DeemConfig:
    """A tiny `DeemConfig`; dicts in `changes` named like a sub-config are merged into it, all else replaces."""
    fields = {
        "vision_config": VISION,
        "text_config": TEXT,
        "perceiver_config": {
            "num_queries": Q,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "initializer_range": 0.1,
        },
        "image_decoder_config": tiny_decoder_config(),
        "image_token_id": IMAGE,
        "start_of_image_token_id": START,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "feature_size": 32,
        "position_grid_side": 4,
        "image_attention_interval": 2,
        "image_attention_sides": [8, 4, 2],
        "image_attention_base_side": 4,
        "image_attention_heads": 4,
        "image_attention_points": 2,
        "image_attention_max_images": 8,
        "initializer_range": 0.1,
    }
    for name, value in changes.items():
        merged = name.endswith("_config") and isinstance(value, dict)
        fields[name] = {**fields[name], **value} if merged else value
    return DeemConfig(**copy.deepcopy(fields))


@torch.no_grad()
def wake(model: torch.nn.Module, seed: int = 0, size: float = 0.1) -> None:
    """Perturb every trainable tensor of DEEM's own that starts at zero or near it, so that no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "denoiser" in name:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gate"):
            parameter.copy_(1.0 + size * noise)
        elif parameter.abs().max() == 0 or name.endswith(("projector.weight", "sampling_offsets.weight")):
            parameter.copy_(size * noise)


def tiny_model(seed: int = 0, open_gates: bool = True, **changes: Any) -> DeemForConditionalGeneration:
    """A tiny DEEM in evaluation mode; as initialized, or with every path audible (`open_gates`)."""
    torch.manual_seed(seed)
    model = DeemForConditionalGeneration(tiny_config(**changes)).eval()
    if open_gates:
        wake(model, seed)
    return model


def tiny_ids(word: str, generator: torch.Generator) -> list[int]:
    """Token ids of one row; see the module."""
    pieces = {"b": [BOS], "e": [EOS], "s": [START], "i": [START] + [IMAGE] * Q}
    ids = []
    for letter in word:
        ids += pieces[letter] if letter in pieces else [int(torch.randint(3, 259, (1,), generator=generator))]
    return ids


def tiny_batch(*words: str, padding_side: str = "right", seed: int = 0, targets: bool = True) -> dict[str, Any]:
    """A batch by the contract of `DeemDataCollator` for rows such as "bttitie", random pictures included."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tiny_ids(word, generator) for word in words]
    length = max(map(len, rows))
    left = padding_side == "left"
    padding = [[0] * (length - len(row)) for row in rows]
    join = (lambda row, pad: pad + row) if left else (lambda row, pad: row + pad)
    input_ids = torch.tensor([join(row, [PAD] * len(pad)) for row, pad in zip(rows, padding, strict=True)])
    mask = torch.tensor([join([1] * len(row), pad) for row, pad in zip(rows, padding, strict=True)])
    batch = {"input_ids": input_ids, "attention_mask": mask}
    count = "".join(words).count("i")
    if count:
        batch["pixel_values"] = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    if targets:
        batch["labels"] = make_labels(
            input_ids, mask, bos_token_id=BOS, image_token_id=IMAGE, start_of_image_token_id=START, pad_token_id=PAD
        )
        if count:
            batch["target_pixel_values"] = torch.rand(count, 3, SIDE, SIDE, generator=generator) * 2 - 1
    return batch


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row of a batch as a batch of its own: no padding, its own pictures, keys without pictures absent."""
    singles, first = [], 0
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        keep = mask.bool()
        count = int((ids == IMAGE).sum()) // Q
        single = {"input_ids": ids[keep][None], "attention_mask": mask[keep][None]}
        if "labels" in batch:
            single["labels"] = batch["labels"][len(singles)][keep][None]
        for key in ("pixel_values", "target_pixel_values", "region_masks"):
            if count and key in batch:
                single[key] = batch[key][first : first + count]
        singles.append(single)
        first += count
    return singles


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position of each token among the tokens of its row, so that padding on the left shifts nothing."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def tiny_draws(count: int, seed: int = 0, image: bool = False) -> dict[str, torch.Tensor]:
    """Noise, timesteps and latents of a diffusion loss over `count` pictures; `image` adds drop_condition."""
    generator = torch.Generator().manual_seed(seed)
    draws = {
        "latents": torch.randn(count, 4, 8, 8, generator=generator),
        "noise": torch.randn(count, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(200, 800, (count,), generator=generator),
    }
    if image:
        draws["drop_condition"] = torch.zeros(count, dtype=torch.bool)
    return draws


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and every buffer, non-persistent ones included, by name."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
