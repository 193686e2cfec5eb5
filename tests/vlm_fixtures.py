# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Vision-language models of transformers' own classes, made tiny and random, and batches of hand-made rows for them.

A row is a dict of `input_ids` and `labels` (lists) and of the image inputs of its images; `collate` joins rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

PAD, BOS, IMAGE, START, END, VOCABULARY, SIDE = 0, 1, 90, 91, 92, 96, 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "initializer_range": 0.1,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.1,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **VIT},
        "text_config": {"model_type": "llama", **TEXT},
        "vision_feature_layer": -1,
    },
    "llava_onevision": {
        "vision_config": {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_grid_pinpoints": PINPOINTS,
        "video_token_id": 93,
    },
    "qwen2_5_vl": {
        "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 16},
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "video_token_id": 93,
    },
    "qwen3_vl": {
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        "text_config": {**TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "video_token_id": 93,
    },
    "internvl": {
        "vision_config": {**VIT, "image_size": [SIDE, SIDE], "patch_size": [8, 8]},
        "text_config": {"model_type": "qwen2", **TEXT},
        "image_seq_length": 4,
    },
    "smolvlm": {"vision_config": VIT, "text_config": {"model_type": "llama", **TEXT}, "scale_factor": 2},
    "paligemma": {
        "vision_config": {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
        "text_config": {"model_type": "gemma", **TEXT},
        "projection_dim": 32,
    },
}
FAMILIES = tuple(CONFIGS)
QWEN = ("qwen2_5_vl", "qwen3_vl")


@dataclass
class TinyVlm:
    """A model, its family, and rows that it can read."""

    family: str
    model: PreTrainedModel

    def image(self, seed: int) -> dict[str, torch.Tensor]:
        """Image inputs of one image; every second one is larger, or of several tiles, where the family has such."""
        draw, large = torch.Generator().manual_seed(seed), seed % 2
        if self.family in QWEN:
            grid = torch.tensor([[1, 4, 8 if large else 4]])
            pixels = torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=draw)
            return {"pixel_values": pixels, "image_grid_thw": grid}
        if self.family == "llava_onevision":
            tiles = 3 if large else 5  # the whole image and its tiles
            size = torch.tensor([[32, 64]] if large else [[64, 64]])
            pixels = torch.zeros(1, 5, 3, SIDE, SIDE)
            pixels[0, :tiles] = torch.randn(tiles, 3, SIDE, SIDE, generator=draw)
            return {"pixel_values": pixels, "image_sizes": size}
        tiles = 2 if large and self.family in ("internvl", "smolvlm") else 1
        return {"pixel_values": torch.randn(tiles, 3, SIDE, SIDE, generator=draw)}

    def num_tokens(self, inputs: dict[str, torch.Tensor]) -> int:
        with torch.no_grad():
            given = self.batch_images([inputs])
            return sum(len(unit) for unit in self.model.get_image_features(**given, return_dict=True).pooler_output)

    def row(self, seed: int, with_image: bool = True) -> dict[str, Any]:
        """A text of 5 to 7 tokens behind an image, or alone."""
        draw = torch.Generator().manual_seed(1000 + seed)
        text = torch.randint(3, 80, (5 + seed % 3,), generator=draw).tolist()
        images = self.image(seed) if with_image else {}
        slots = [START, *[IMAGE] * self.num_tokens(images), END] if images else []
        labels = [-100] * (1 + len(slots)) + text
        return {"input_ids": [BOS, *slots, *text], "labels": labels, "images": images}

    def batch_images(self, images: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Image inputs of a batch, of those of each row; {} for a row of text alone."""
        given = [one for one in images if one]
        if not given:
            return {}
        if self.family != "smolvlm":
            return {name: torch.cat([one[name] for one in given]) for name in given[0]}
        pixels = torch.zeros(len(images), max(len(one["pixel_values"]) for one in given), 3, SIDE, SIDE)
        for row, one in enumerate(images):
            pixels[row, : len(one.get("pixel_values", []))] = one.get("pixel_values", 0.0)
        return {"pixel_values": pixels}

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The model's inputs of a batch, padded on the right."""
        longest = max(len(row["input_ids"]) for row in rows)

        def pad(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

        batch = {"input_ids": pad("input_ids", PAD), "labels": pad("labels", -100)}
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor([[len(r["input_ids"])] for r in rows])).long()
        if self.family == "paligemma":
            batch["token_type_ids"] = (batch["labels"] != -100).long()
        if self.family in QWEN:
            batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
        batch |= self.batch_images([row["images"] for row in rows])
        if any("target" in row and row["images"] for row in rows):
            batch["target_pixel_values"] = torch.stack([row["target"] for row in rows if row["images"]])
        return batch


def tiny_vlm(family: str, seed: int = 0) -> TinyVlm:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **CONFIGS[family], image_token_id=IMAGE, pad_token_id=PAD)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # LLaVA-OneVision's newline, Qwen's norms start at 0 or 1
        if parameter.dim() == 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return TinyVlm(family, model)


def count_calls(module: torch.nn.Module) -> list[int]:
    """A list that grows by one with each call of the module."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def vision_tower(model: PreTrainedModel) -> torch.nn.Module:
    body = model.model
    return next(getattr(body, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(body, name))


Rows = Callable[[int], dict[str, Any]]
