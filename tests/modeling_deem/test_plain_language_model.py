# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""With gates at zero a DEEM is exactly the library's own language model."""

import pytest
import torch
from deem_fixtures import (
    IMAGE,
    START,
    positions_of,
    tiny_batch,
    tiny_config,
    tiny_model,
    wake,
)
from transformers import AutoModelForCausalLM

from modeling_deem import DeemForConditionalGeneration

SIDES = ("left", "right")


def plain_language_model(model: DeemForConditionalGeneration) -> torch.nn.Module:
    """The library's own causal LM with the weights of `model`; its head has no bias."""
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    body = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    report = plain.load_state_dict({**body, "lm_head.weight": model.lm_head.weight}, strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    return plain


@pytest.mark.parametrize("padding_side", SIDES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_gates_at_zero_give_exactly_the_plain_language_model(family: str, padding_side: str) -> None:
    # The head's bias is DEEM's own (new tokens start at -5), so logits are compared without it; see the next test.
    model = tiny_model(open_gates=False, text_config={"model_type": family}, lm_head_bias=False)
    plain = plain_language_model(model)
    batch = tiny_batch("bttitit", "btttttte", "bti", padding_side=padding_side, targets=False)
    pixel_values = batch.pop("pixel_values")
    batch["position_ids"] = positions_of(batch["attention_mask"])
    with torch.no_grad():
        # Without images: ids in, logits out.
        text_only = {**batch, "input_ids": batch["input_ids"].where(batch["input_ids"] < START, 5)}
        assert torch.equal(model(**text_only).logits, plain(**text_only).logits)

        # With images: the plain model is given the same embeddings.
        embeddings = plain.get_input_embeddings()(batch["input_ids"])
        tokens = model.get_image_features(pixel_values).pooler_output.flatten(0, 1)
        embeddings[batch["input_ids"] == IMAGE] = tokens
        ours = model(**batch, pixel_values=pixel_values).logits
        ids = batch.pop("input_ids")
        assert torch.equal(ours, plain(**batch, inputs_embeds=embeddings).logits)

        # And the comparison can fail: an open gate changes real tokens.
        wake(model)
        assert not torch.allclose(model(ids, pixel_values, **batch).logits, ours, atol=1e-3)


def test_head_bias_is_all_that_separates_a_new_model_from_the_plain_language_model() -> None:
    model = tiny_model(open_gates=False)
    torch.nn.init.normal_(model.lm_head.bias)
    plain = plain_language_model(model)
    batch = tiny_batch("bttttt", "btt", targets=False)
    with torch.no_grad():
        ours, theirs = model(**batch, output_hidden_states=True), plain(**batch, output_hidden_states=True)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(ours.logits, theirs.logits + model.lm_head.bias, rtol=0, atol=1e-6)


def test_other_language_model_families_are_refused() -> None:
    with pytest.raises(ValueError, match="gpt2.*llama"):
        DeemForConditionalGeneration(tiny_config(text_config={"model_type": "gpt2", "n_embd": 32, "n_head": 4}))
