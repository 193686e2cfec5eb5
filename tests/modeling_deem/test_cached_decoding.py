# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Decoding with a cache, by beams and in batches equals a full forward."""

import pytest
import torch
from deem_fixtures import (
    IMAGE,
    SIDE,
    STRUCTURE,
    Q,
    positions_of,
    rows_of,
    tiny_batch,
    tiny_model,
)
from transformers import DynamicCache

from modeling_deem import DeemForConditionalGeneration

RAGGED = ("bttitit", "btttt", "bitbtit", "bti")  # two images, none, two documents, one
SIDES = ("left", "right")
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def full_forward(
    model: DeemForConditionalGeneration, batch: dict[str, torch.Tensor], sequences: torch.Tensor
) -> torch.Tensor:
    """Logits of one uncached forward over whole sequences, each begun by a row of the batch.

    Positions are those of `generate`: 0 at padding, and new tokens count on from the last column, padded or not.
    """
    new = sequences.shape[1] - batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, new), value=1)
    positions = positions_of(batch["attention_mask"]) * batch["attention_mask"]
    positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, new + 1)], dim=1)
    with torch.no_grad():
        return model(
            input_ids=sequences,
            attention_mask=mask,
            position_ids=positions,
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).logits


def repeated(batch: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """Every row `times` times in a row, with its pictures."""
    counts = ((batch["input_ids"] == IMAGE).sum(1) // Q).tolist()
    groups = [group.repeat(times, 1, 1, 1) for group in batch["pixel_values"].split(counts)]
    rows = {name: batch[name].repeat_interleave(times, 0) for name in ("input_ids", "attention_mask")}
    return {**rows, "pixel_values": torch.cat(groups)}


@pytest.mark.parametrize("padding_side", SIDES)
def test_cached_steps_equal_a_full_forward(model, padding_side: str) -> None:
    batch = tiny_batch(*RAGGED, padding_side=padding_side, targets=False)
    new = torch.randint(3, 259, (len(RAGGED), NEW_TOKENS), generator=torch.Generator().manual_seed(1))
    sequences = torch.cat([batch["input_ids"], new], dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1)
    with torch.no_grad():
        expected = model(
            input_ids=sequences,
            attention_mask=mask,
            position_ids=positions_of(mask),  # real tokens count on over padding
            pixel_values=batch["pixel_values"],
            use_cache=False,
        ).logits
        mask = batch["attention_mask"]
        cache = DynamicCache(config=model.config.text_config)
        outputs = model(**batch, position_ids=positions_of(mask), use_cache=True, past_key_values=cache)
        logits = [outputs.logits]
        for step in (slice(0, 1), slice(1, 2), slice(2, NEW_TOKENS)):  # one, one, and four at once
            mask = torch.nn.functional.pad(mask, (0, new[:, step].shape[1]), value=1)
            outputs = model(
                input_ids=new[:, step],
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -new[:, step].shape[1] :],
                past_key_values=outputs.past_key_values,
                image_states=outputs.image_states,
            )
            logits.append(outputs.logits)
    real = torch.nn.functional.pad(batch["attention_mask"], (0, NEW_TOKENS), value=1).bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], rtol=0, atol=1e-5)


def test_greedy_generation_equals_a_full_forward(model) -> None:
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    outputs = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=STRUCTURE,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cached = torch.stack(outputs.logits, dim=1)  # [B, new, V]
    full = full_forward(model, batch, outputs.sequences)[:, -NEW_TOKENS - 1 : -1]
    torch.testing.assert_close(cached, full, rtol=0, atol=1e-5)
    uncached = model.generate(
        **batch,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=STRUCTURE,
        use_cache=False,
    )
    assert torch.equal(outputs.sequences, uncached)
    assert len({tuple(row.tolist()) for row in outputs.sequences[:, -NEW_TOKENS:]}) == len(RAGGED)  # no dead model


def test_beam_scores_equal_a_full_forward(model) -> None:
    beams = 3
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    outputs = model.generate(
        **batch,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        suppress_tokens=STRUCTURE,
        return_dict_in_generate=True,
        output_scores=True,
    )
    full = full_forward(model, repeated(batch, beams), outputs.sequences)[:, -NEW_TOKENS - 1 : -1]
    chosen = outputs.sequences[:, -NEW_TOKENS:]
    steps = full.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]  # [B * beams, new]
    got = model.compute_transition_scores(outputs.sequences, outputs.scores, outputs.beam_indices)
    torch.testing.assert_close(got, steps, rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.sequences_scores, steps.mean(1), rtol=0, atol=1e-5)
    assert len({tuple(row.tolist()) for row in chosen[:beams]}) == beams


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beam", "uncached"],
)
def test_generating_a_batch_equals_generating_its_rows(model, options: dict) -> None:
    batch = tiny_batch(*RAGGED, padding_side="left", targets=False)
    options = {**options, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "suppress_tokens": STRUCTURE}
    together = model.generate(**batch, **options)[:, -NEW_TOKENS:]
    alone = torch.cat([model.generate(**row, **options)[:, -NEW_TOKENS:] for row in rows_of(batch)])
    assert torch.equal(together, alone)


def test_generation_sees_region_masks(model) -> None:
    batch = tiny_batch("btit", "bti", padding_side="left", targets=False)
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[:, :, :16, :16] = 1
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(**batch, region_masks=masks, **options).logits[0]
    with torch.no_grad():
        expected = model(**batch, region_masks=masks, position_ids=positions_of(batch["attention_mask"])).logits[:, -1]
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(first, model.generate(**batch, **options).logits[0], atol=1e-4)
