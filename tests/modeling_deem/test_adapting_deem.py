# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Adapting to the images at hand: the error falls, and the model is afterwards what it was before."""

from typing import Any

import pytest
import torch
from deem_fixtures import SIDE, tiny_model
from torch import nn
from vlm_fixtures import tiny_vlm

from modeling_deem import DeemFeedback

pytestmark = pytest.mark.usefixtures("one_thread")


def everything(model: nn.Module) -> list[Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(name, one.detach().clone(), one.requires_grad, one.grad) for name, one in named]
    return [tensors, [module.training for module in model.modules()]]


def same(before: list[Any], after: list[Any]) -> bool:
    pairs = zip(before[0], after[0], strict=True)
    return before[1] == after[1] and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] and a[3] is b[3] for a, b in pairs
    )


def test_a_deem_learns_from_its_images_and_forgets() -> None:
    model = tiny_model().train()
    model.model.language_model.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    targets = pixels.clamp(-1, 1)
    latents = model.image_decoder.encode(targets, torch.Generator().manual_seed(2))
    draws = {"noise": torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))}
    draws["timesteps"] = torch.tensor([300, 600])

    def error(one: nn.Module) -> float:
        with torch.no_grad():
            return float(one.consistency_loss(pixels, targets, generator=torch.Generator().manual_seed(2), **draws))

    before, start = everything(model), error(model)
    with model.adapted_to(pixels, targets, steps=20, learning_rate=3e-3) as adapted:
        assert error(adapted) < start and not adapted.training
    assert same(before, everything(model)) and error(model) == start
    with pytest.raises(RuntimeError, match="in the midst"):
        with model.adapted_to(pixels, targets, steps=1, learning_rate=1e-2):
            raise RuntimeError("in the midst")
    assert same(before, everything(model))
    with pytest.raises(ValueError, match="lie in"):  # in the first step
        with model.adapted_to(pixels, 5 * targets):
            pass
    assert same(before, everything(model))
    with pytest.raises(ValueError, match="names no parameter"):
        with model.adapted_to(pixels, targets, parameters="vision"):
            pass


def test_another_model_learns_from_its_images_and_forgets() -> None:
    vlm = tiny_vlm("qwen2_5_vl")
    model, batch = vlm.model, vlm.collate([vlm.row(0), vlm.row(1)])
    torch.manual_seed(0)
    feedback = DeemFeedback.from_scratch(
        model, image_size=32, width=32, num_layers=1, connector="linear", connector_std=0.3
    )
    inputs = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    targets = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before, logits = everything(model), model(**batch).logits
    with feedback.adapted_to(model, inputs, targets, steps=2, learning_rate=1e-2, parameters="visual") as adapted:
        assert not torch.equal(adapted(**batch).logits, logits)
    assert same(before, everything(model)) and torch.equal(model(**batch).logits, logits)
    assert all(one.grad is None for one in feedback.parameters())  # it learns nothing from that
    weight = model.model.visual.merger.mlp[0].weight
    model.model.visual.merger.mlp[0].weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized, sharded or offloaded"):
        with feedback.adapted_to(model, inputs, targets, parameters="visual"):
            pass
