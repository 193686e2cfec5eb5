# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A small LLaVA of transformers' own class for the synthetic world: a plain ViT from scratch and the small language model."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    ViTImageProcessorPil,
)

PATCH = 8
TEMPLATE = (
    "{% for turn in messages %}{% if turn['role'] == 'user' %}USER: {% for item in turn['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% generation %}{% for item in turn['content'] %}{{ item['text'] }}{% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def compose_small_vlm(
    text: str | Path, size: int = 64, width: int = 128, num_layers: int = 4
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return a LLaVA of a language model with its tokenizer (a folder) and of a random vision encoder, with its processor.

    Args:
        size: side of the images in pixels.
        width, num_layers: of the encoder; an image becomes (size / 8) squared tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    language_model = AutoModelForCausalLM.from_pretrained(text)
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 32,
        image_size=size,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(size // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.base_model.state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    half, square = [0.5, 0.5, 0.5], {"height": size, "width": size}
    images = ViTImageProcessorPil(size=square, image_mean=half, image_std=half, do_convert_rgb=True)
    shape = {"patch_size": PATCH, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    processor = LlavaProcessor(images, tokenizer, **shape, image_token="<image>", chat_template=TEMPLATE)
    return model.to(torch.float32), processor
