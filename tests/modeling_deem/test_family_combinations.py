# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Vision encoders, language models and denoisers of every family together in a tiny DEEM (docs/parts.md)."""

import itertools

import pytest
import torch
from deem_fixtures import (
    SIDE,
    STRUCTURE,
    tensors_of,
    tiny_batch,
    tiny_decoder_config,
    tiny_model,
)
from family_fixtures import (
    DIFFUSIONS,
    TEXTS,
    VISIONS,
    text_config,
    vision_config,
)

from modeling_deem import DeemForConditionalGeneration

# Every part occurs, and is tried thoroughly; every two parts meet once, in a forward.
COMBINATIONS = list(zip(VISIONS, TEXTS, itertools.cycle(DIFFUSIONS)))


def combine(vision: str, text: str, diffusion: str) -> DeemForConditionalGeneration:
    model = tiny_model(
        vision_config=vision_config(vision),
        text_config=text_config(text, tie_word_embeddings=len(text) % 2 == 0),
        image_decoder_config=tiny_decoder_config(**DIFFUSIONS[diffusion]),
    )
    with torch.no_grad():  # transformers of diffusion start with outputs of zero
        for parameter in model.image_decoder.denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module", params=COMBINATIONS, ids=" + ".join)
def combined(request) -> DeemForConditionalGeneration:
    return combine(*request.param)


@pytest.mark.parametrize("vision", VISIONS)
def test_every_two_parts_fit(vision: str) -> None:
    shift, batch = list(VISIONS).index(vision), tiny_batch("btitti")
    for number, text in enumerate(TEXTS):
        diffusion = list(DIFFUSIONS)[(shift + number) % len(DIFFUSIONS)]
        with torch.no_grad():
            outputs = combine(vision, text, diffusion)(**batch)
        losses = torch.stack([outputs.text_loss, outputs.image_loss, outputs.consistency_loss])
        assert losses.isfinite().all() and (losses > 0).all(), (text, diffusion)


def test_every_combination_learns(combined) -> None:
    combined.zero_grad()
    outputs = combined(**tiny_batch("btitti", "btitt"), generator=torch.Generator().manual_seed(0))
    losses = (outputs.text_loss, outputs.image_loss, outputs.consistency_loss)
    assert all(loss.isfinite() and loss > 0 for loss in losses)
    outputs.consistency_loss.backward(retain_graph=True)
    encoder = next(combined.model.vision_tower.encoder.parameters())
    assert encoder.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in combined.model.language_model.parameters())
    outputs.loss.backward()
    silent = {"image_decoder.null_condition"}  # needs a picture whose condition is dropped, in training
    for name, parameter in combined.named_parameters():
        if parameter.requires_grad and name not in silent:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    combined.zero_grad()


def test_every_combination_writes_the_same_with_and_without_cache(combined) -> None:
    batch = tiny_batch("bttititttttt", "btttt", "bitbtit", padding_side="left", targets=False)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": STRUCTURE}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    cached, full = (combined.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, full.sequences)
    for mine, other in zip(cached.logits, full.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_every_combination_draws(combined) -> None:
    batch = tiny_batch("btitts", "btts", padding_side="left", targets=False)
    pictures = combined.generate_images(**batch, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert pictures.shape == (2, 3, SIDE, SIDE) and pictures.isfinite().all() and pictures.std() > 1e-3
    redrawn = combined.reconstruct(batch["pixel_values"], num_inference_steps=2)
    assert redrawn.shape == (1, 3, SIDE, SIDE) and redrawn.isfinite().all()


def test_every_combination_survives_saving(combined, tmp_path) -> None:
    combined.save_pretrained(tmp_path)
    loaded = DeemForConditionalGeneration.from_pretrained(tmp_path)
    ours, theirs = tensors_of(combined), tensors_of(loaded)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    trainable = {name for name, parameter in combined.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
