# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which parameters learn from which loss."""

import pytest
import torch
from deem_fixtures import (
    SIDE,
    tensors_of,
    tiny_batch,
    tiny_draws,
    tiny_model,
)

from modeling_deem import DeemForConditionalGeneration

# Which parts each loss reaches, by prefix. What stands under no prefix of a loss must not move under it.
VISION = ("model.vision_tower.", "model.perceiver.")
LANGUAGE = ("model.projector.", "model.language_model.", "model.image_attention.", "model.start_of_image")
DIFFUSION = ("image_decoder.denoiser.", "image_decoder.feature_fusion.")
BELONGS = {
    "text": (*VISION, *LANGUAGE, "lm_head."),
    "consistency": (*VISION, *DIFFUSION, "image_decoder.token_projector."),
    "image": (
        *VISION,
        *LANGUAGE,
        *DIFFUSION,
        "image_decoder.context_projector.",
        "image_decoder.perceiver.",
        "image_decoder.null_condition",
    ),
}
# The finest level of the pyramid is read by the image decoder alone (image_attention_levels are 1, 2 and 3).
EXCEPT = {"text": ("model.vision_tower.level_projections.0.",), "consistency": (), "image": ()}
# A shift common to all keys leaves a softmax as it is: these gradients are zero but for rounding.
SHIFTS = ("key_norm.bias", "image_decoder.perceiver.layers.0.self_attention.key.bias")
SHIFTS = (*SHIFTS, "image_decoder.perceiver.layers.0.cross_attention.key.bias")


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


@pytest.mark.parametrize("loss", ["text", "image", "consistency"])
def test_every_trainable_parameter_moves_and_no_other(loss: str) -> None:
    model = tiny_model(open_gates=False).train()
    batch = tiny_batch("btittite", "btitti")
    draws = {"drop_condition": torch.tensor([False, True, False, False])}  # the null condition needs its turn
    weights = {f"{name}_loss_weight": float(name == loss) for name in BELONGS}
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        model(**batch, **weights, image_draws=draws, generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = tensors_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in trainable if name.startswith(BELONGS[loss]) and not name.startswith(EXCEPT[loss])}
    assert moved - expected == set()
    assert {name for name in expected - moved if not name.endswith(SHIFTS)} == set()


def test_what_is_frozen(model) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name in frozen:
        assert name.startswith("image_decoder.vae.") or (
            name.startswith("image_decoder.feature_fusion.") and name.endswith("null_value")
        )
    assert sum(name.endswith("null_value") for name in frozen) == 5  # four skips and the middle
    assert all(name in frozen for name, _ in model.named_parameters() if name.startswith("image_decoder.vae."))
    assert model.model.image_attention["0"].synchronizer.null_value.requires_grad


def test_consistency_gradient_reaches_the_encoder_through_the_tokens_alone() -> None:
    model = tiny_model(image_decoder_config={"consistency_condition": "tokens"})
    batch = tiny_batch("bti")
    model.consistency_loss(batch["pixel_values"], batch["target_pixel_values"]).backward()
    assert model.model.vision_tower.encoder.embeddings.patch_embeddings.weight.grad.abs().max() > 0
    assert model.image_decoder.token_projector.weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_callers_tensors_are_unchanged_after_a_step(training: bool) -> None:
    model = tiny_model().train(training)
    batch = tiny_batch("btittit", "bti", padding_side="left")
    batch |= {
        "region_masks": torch.ones(3, 1, SIDE, SIDE),
        "document_starts": torch.tensor([0, 0, 9]),
        "image_loss_mask": torch.tensor([True, False, True]),
    }
    batch["region_masks"][:, :, :, :24] = 0
    draws = {"consistency_draws": tiny_draws(3), "image_draws": tiny_draws(3, image=True)}
    given = {**batch, **{f"{a}.{b}": value for a, drawn in draws.items() for b, value in drawn.items()}}
    copies = {name: value.clone() for name, value in given.items()}
    keys = set(batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(**batch, **draws).loss.backward()
    optimizer.step()
    assert set(batch) == keys
    for name, value in given.items():
        assert torch.equal(value, copies[name]), name
        assert not value.requires_grad and value.grad is None, name
