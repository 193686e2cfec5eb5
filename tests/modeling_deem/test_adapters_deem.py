# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LoRA by peft alone, with the lists of the package."""

import re

import torch
from deem_fixtures import tiny_model

from modeling_deem import adapter_targets, modules_to_save
from modeling_deem.adapters_deem import DENOISER, ENCODER, LANGUAGE_MODEL


def test_lists_of_a_model_that_trains_whole() -> None:
    model = tiny_model()
    saved = modules_to_save(model)
    assert all(not name.startswith((LANGUAGE_MODEL, DENOISER, "image_decoder.vae")) for name in saved)
    assert {"model.vision_tower", "model.perceiver", "model.projector", "lm_head"} <= set(saved)
    assert not any(name.startswith(ENCODER) for name in modules_to_save(model, [LANGUAGE_MODEL, DENOISER, ENCODER]))
    assert all(parameter.requires_grad for parameter in model.model.language_model.parameters())  # left as it was
    pattern = re.compile(adapter_targets(model))
    linear = {
        name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and pattern.fullmatch(name)
    }
    assert linear and all(name.startswith(LANGUAGE_MODEL) for name in linear)
