# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A tiny DEEM and a tiny LLaVA as checkpoints, made once; what they write is noise, and always the same."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from deem_fixtures import tiny_model
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    ConvNextImageProcessorPil,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from processing import DeemProcessor
from recipes import evaluate

CHAT = (
    "{% for message in messages %}USER: {% for item in message.content %}"
    "{% if item.type == 'image' %}<image>\n{% else %}{{ item.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def checkpoint(kind: str) -> Path:
    """Folder of the checkpoint "deem" or "llava"."""
    folder = Path(tempfile.mkdtemp(prefix=kind))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"deem": _deem, "llava": _llava}[kind](folder)


@cache
def two_towers(kind: str) -> Path:
    """Folder of a tiny two-tower model, "clip" or "siglip"."""
    folder = Path(tempfile.mkdtemp(prefix=kind))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer, size = build_tokenizer(), {"height": 32, "width": 32}
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "projection_dim": 8}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = sizes | {"image_size": 32, "patch_size": 16, "projection_dim": 8}
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        images, both = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size), CLIPProcessor
    else:
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=vision))
        images, both = SiglipImageProcessorPil(size=size), SiglipProcessor
    for name, weight in model.named_parameters():  # small towers tell nothing apart with small weights
        if weight.ndim > 1 and "position" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.eval().save_pretrained(folder)
    both(images, tokenizer).save_pretrained(folder)
    return folder


def run(model: Path, out: Path, data: Path, *names: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Evaluate, with short answers."""
    options = {"max_new_tokens": 3, "batch_size": 8} | options
    arguments = evaluate.EvaluateArguments(
        model=str(model), out=str(out), benchmarks=list(names), data=[str(data)], **options
    )
    return evaluate.main(arguments)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of a benchmark's predictions."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _deem(folder: Path) -> Path:
    tiny_model(text_config={"max_position_embeddings": 1024}, image_decoder_config=None).save_pretrained(folder)
    encoder_side = ConvNextImageProcessorPil(size={"shortest_edge": 64})
    DeemProcessor.from_parts(
        encoder_side, build_tokenizer(), num_image_tokens=4, target_size=64, grounding_tokens=True
    ).save_pretrained(folder)
    return folder


def _llava(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder
