# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The whole model without image decoder, and given bad input."""

import pytest
import torch
from deem_fixtures import (
    BOS,
    IMAGE,
    PAD,
    SIDE,
    START,
    STRUCTURE,
    Q,
    tiny_batch,
    tiny_model,
)

from modeling_deem import DeemForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def test_a_model_that_only_writes() -> None:
    model = tiny_model(image_decoder_config=None)
    batch = tiny_batch("btitti", "bt")
    targets = batch.pop("target_pixel_values")
    outputs = model(**batch)
    assert torch.equal(outputs.loss, outputs.text_loss)
    inputs = tiny_batch("btitti", "bt", padding_side="left", targets=False)
    assert model.generate(**inputs, max_new_tokens=2, suppress_tokens=STRUCTURE).shape[0] == 2
    for call in (
        lambda: model.generate_images(**inputs),
        lambda: model.reconstruct(inputs["pixel_values"]),
        lambda: model.consistency_loss(inputs["pixel_values"], targets),
        lambda: model(**batch, target_pixel_values=targets),
    ):
        with pytest.raises(ValueError, match="no image decoder"):
            call()


def test_bad_input_is_refused_with_the_numbers(model) -> None:
    batch = tiny_batch("btitti", "bti")
    with pytest.raises(ValueError, match="^Image features and image tokens do not match.*12.*8"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:2]})
    with pytest.raises(ValueError, match="^Image features and image tokens do not match"):
        fewer = {
            **tiny_batch("btitti", "bti", padding_side="left", targets=False),
            "pixel_values": batch["pixel_values"][:2],
        }
        model.generate(**fewer, max_new_tokens=1)
    with pytest.raises(ValueError, match="2 target images for 3 images"):
        model(**{**batch, "target_pixel_values": batch["target_pixel_values"][:2]})
    with pytest.raises(ValueError, match="32, 32.*64, 64"):
        model(**batch, region_masks=torch.ones(3, 1, 32, 32))
    with pytest.raises(ValueError, match="[12] .*3 "):
        model(**batch, region_masks=torch.ones(1, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    with pytest.raises(ValueError, match="not both"):
        model(**batch, mm_encoder_outputs={"image": model.get_image_features(batch["pixel_values"])})
    with pytest.raises(ValueError, match="8 images in one sequence.*holds 7"):
        model(**tiny_batch("b" + "ti" * 8, targets=False))


def test_images_without_their_start_of_image_token_cannot_be_drawn(model) -> None:
    batch = tiny_batch("btitti")
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != START, 7)
    with pytest.raises(ValueError, match="2 images, but 0 start-of-image tokens"):
        model(**batch)


def test_image_tokens_without_images(model) -> None:
    """A forward reads them as plain tokens, as transformers' tests demand; nothing is generated from them."""
    batch = tiny_batch("btit", targets=False)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="^Image features and image tokens do not match, tokens: 4, features: 0"):
        model.generate(**batch, max_new_tokens=2)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    start = batch["input_ids"] == START
    embeds[start] += model.model.start_of_image[0]
    nowhere = torch.zeros_like(start)
    states = model.model.get_image_states(None, nowhere, nowhere)
    plain = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], image_states=states
    ).last_hidden_state
    assert torch.equal(model(**batch).logits, model.lm_head(plain))


def test_pad_token_of_the_fixtures_is_the_models(model) -> None:
    config = model.config
    assert (config.pad_token_id, config.bos_token_id) == (PAD, BOS)
    assert (config.start_of_image_token_id, config.image_token_id, config.num_image_tokens) == (START, IMAGE, Q)


def change(name: str, how) -> tuple[str, dict]:
    batch = tiny_batch("btitti", "btit")
    return name, {**batch, name: how(batch[name])}


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        change("input_ids", lambda ids: ids.tolist()),
        change("input_ids", lambda ids: ids[0]),
        change("input_ids", lambda ids: ids.float()),
        change("labels", lambda labels: labels[:, 1:]),
        change("labels", lambda labels: labels.bool()),
        change("attention_mask", lambda mask: mask[:, :3]),
        change("attention_mask", lambda mask: "all"),
        change("attention_mask", lambda mask: {"a": 1}),
        change("pixel_values", lambda pixels: pixels[0]),
        change("pixel_values", lambda pixels: pixels[:, :1]),
        change("pixel_values", lambda pixels: pixels[..., :32]),
        change("pixel_values", lambda pixels: pixels.to(torch.uint8)),
        change("target_pixel_values", lambda pixels: pixels[0]),
        change("target_pixel_values", lambda pixels: "images"),
    ],
    ids=range(14),
)
def test_what_is_no_batch_is_refused_by_name(model, name: str, batch: dict) -> None:
    with pytest.raises(ValueError, match=f"^{name} (is|has|have)"):
        model(**batch)
