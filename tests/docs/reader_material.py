# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the pages take for given, made tiny: a DEEM, a LLaVA, a CLIP and three parts, each in the folder that they name."""

from pathlib import Path

import torch
from conftest import build_tokenizer
from deem_fixtures import SIDE, Q, tiny_model
from family_fixtures import OLD_VOCABULARY, save_diffusion, save_text, text_config, vision_config
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
)

from processing import DeemProcessor
from recipes.training.small_vlm import compose_small_vlm


def save_clip(folder: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": OLD_VOCABULARY, "max_position_embeddings": 64}
    text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def save_material(folder: Path) -> None:
    """Write `deem`, `vision`, `text`, `diffusion`, `vlm` and `clip` into a folder, as `save_pretrained` does."""
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder / "deem")
    images = ConvNextImageProcessorPil(size={"shortest_edge": SIDE})
    DeemProcessor.from_parts(images, build_tokenizer(), Q, SIDE).save_pretrained(folder / "deem")
    AutoModel.from_config(vision_config("siglip_vision_model")).save_pretrained(folder / "vision")
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "vision")
    save_text(folder / "text", **text_config("qwen3", vocab_size=OLD_VOCABULARY))
    save_diffusion(folder / "diffusion")
    model, processor = compose_small_vlm(folder / "text", width=32, num_layers=1)
    model.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    save_clip(folder / "clip")
