# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every supported language model in a tiny DEEM (docs/parts.md)."""

from typing import Any

import pytest
import torch
from deem_fixtures import (
    IMAGE,
    positions_of,
    tiny_batch,
    tiny_model,
    wake,
)
from family_fixtures import (
    TEXTS,
    plain_language_model,
    text_config,
)

from modeling_deem.text_deem import LAYERS


def test_every_text_family_is_tried() -> None:
    assert set(TEXTS) == set(LAYERS)


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied head"])
@pytest.mark.parametrize("family", TEXTS)
def test_gates_at_zero_give_exactly_the_plain_language_model(family: str, tied: bool) -> None:
    model = tiny_model(
        open_gates=False,
        text_config=text_config(family, tie_word_embeddings=tied),
        image_decoder_config=None,
        lm_head_bias=False,
    )
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    plain = plain_language_model(model)
    batch = tiny_batch("bttititttttt", "bttttttte", "bti", padding_side="left", targets=False)
    pixel_values, ids = batch.pop("pixel_values"), batch.pop("input_ids")
    batch["position_ids"] = positions_of(batch["attention_mask"])
    with torch.no_grad():
        embeddings = plain.get_input_embeddings()(ids)
        embeddings[ids == IMAGE] = model.get_image_features(pixel_values).pooler_output.flatten(0, 1)
        ours = model(ids, pixel_values, **batch, output_hidden_states=True)
        theirs = plain(**batch, inputs_embeds=embeddings, output_hidden_states=True)
        assert torch.equal(ours.logits, theirs.logits)
        for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert torch.equal(mine, other)

        # And the comparison can fail: an open gate changes real tokens.
        wake(model)
        assert not torch.allclose(model(ids, pixel_values, **batch).logits, ours.logits, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "changes"), [*((name, {}) for name in TEXTS), ("gpt_neox", {"use_parallel_residual": False})]
)
def test_image_attention_stands_where_the_family_adds_self_attention(family: str, changes: dict) -> None:
    """The residual is computed from the stream after self-attention, and the stream receives it."""
    model = tiny_model(text_config=text_config(family, **changes), image_decoder_config=None)
    layer, block = model.model.language_model.layers[0], model.model.image_attention["0"]
    seen: dict[str, Any] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(entry=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        block.register_forward_hook(lambda module, args, output: seen.update(query=args[0], residual=output)),
    ]
    with_images = layer.with_images

    def watched(hidden_states, attended, image_states):
        seen.update(stream=hidden_states, attended=attended, added=with_images(hidden_states, attended, image_states))
        return seen["added"]

    layer.with_images = watched
    reading = []
    layer.mlp.register_forward_pre_hook(lambda module, args: reading.append(args[0]))
    with torch.no_grad():
        model(**tiny_batch("bttitit", targets=False))
        for handle in handles:
            handle.remove()
        query, attended, added, residual = (seen[name].clone() for name in ("query", "attended", "added", "residual"))
        block.gate.zero_()
        model(**tiny_batch("bttitit", targets=False))
    assert residual.abs().max() > 1e-3
    # The MLP of the same layer reads it, except where it runs beside self-attention.
    beside = getattr(model.config.text_config, "use_parallel_residual", False)
    assert torch.allclose(*reading, rtol=0, atol=1e-4) == beside
    assert torch.equal(seen["stream"], seen["entry"])
    torch.testing.assert_close(query, seen["entry"] + attended, rtol=0, atol=1e-5)
    torch.testing.assert_close(added, attended + residual, rtol=0, atol=1e-5)


def test_a_language_model_that_caps_its_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="final_logit_softcapping = 30"):
        tiny_model(text_config=text_config("gemma3_text", final_logit_softcapping=30.0))
