# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a token may not see, and that a batch equals its rows."""

import pytest
import torch
from deem_fixtures import (
    BOS,
    START,
    positions_of,
    rows_of,
    tiny_batch,
    tiny_draws,
    tiny_model,
)

from modeling_deem import DeemForConditionalGeneration

RAGGED = ("bttitit", "btttt", "bitbtit", "bti")  # two images, none, two documents, one
SIDES = ("left", "right")


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def test_a_later_image_cannot_change_an_earlier_token(model) -> None:
    batch = tiny_batch("bttittitt", targets=False)
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1] += 1.0
    second = (batch["input_ids"][0] == START).nonzero()[1].item() + 1  # column of its first image token
    with torch.no_grad():
        before, after = model(**batch).logits[0], model(**changed).logits[0]
    assert torch.equal(before[:second], after[:second])
    assert (before[second:] - after[second:]).abs().amax(-1).min() > 1e-4  # every token from there on sees it


def test_images_of_another_document_are_not_seen() -> None:
    model = tiny_model()
    for layer in model.model.language_model.layers:  # packed documents share the self-attention; close that way
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    batch = tiny_batch("btittbtitt", "btit", targets=False)
    second_document = (batch["input_ids"][0] == BOS).nonzero()[1].item()
    with torch.no_grad():
        before = model(**batch).logits
        for image, changes in ((0, slice(3, second_document)), (1, slice(second_document + 3, None))):
            pixel_values = batch["pixel_values"].clone()
            pixel_values[image] += 1.0
            moved = (model(**{**batch, "pixel_values": pixel_values}).logits - before).abs().amax(-1) > 1e-5
            inside = torch.zeros_like(moved)
            inside[0, changes] = True
            assert not moved[~inside].any()
            assert moved[inside].any()


def test_visible_images_of_each_token(model) -> None:
    word = "titbiti"
    batch = tiny_batch(word, "bt", targets=False)
    with torch.no_grad():
        states = model.model(**batch, use_cache=True).image_states
    # t | s,iiii | t | b | s,iiii | t | s,iiii: an image is seen from its first image token to the next document's bos.
    seen = [[]] * 2 + [[0]] * 5 + [[]] * 2 + [[1]] * 6 + [[1, 2]] * 4
    got = [[k for k in range(3) if row[k]] for row in states.visible[0].tolist()]
    assert got[: len(seen)] == [list(entry) for entry in seen]
    assert not states.visible[1].any()
    assert states.index[0].tolist() == [0, 1, 2]


# ---- a batch equals its rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", SIDES)
def test_logits_of_a_batch_equal_those_of_its_rows(model, padding_side: str) -> None:
    batch = tiny_batch(*RAGGED, padding_side=padding_side, targets=False)
    with torch.no_grad():
        together = model(**batch, position_ids=positions_of(batch["attention_mask"])).logits
        for logits, mask, row in zip(together, batch["attention_mask"].bool(), rows_of(batch), strict=True):
            torch.testing.assert_close(logits[mask], model(**row).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_side", SIDES)
def test_losses_of_a_batch_are_the_means_of_its_rows(model, padding_side: str) -> None:
    words = ("btitti", "bttt", "bttibtit", "btti")
    batch = tiny_batch(*words, padding_side=padding_side)
    draws = {"consistency_draws": tiny_draws(5), "image_draws": tiny_draws(5, seed=1, image=True)}
    with torch.no_grad():
        together = model(**batch, **draws, position_ids=positions_of(batch["attention_mask"]))
        rows, first, sums = rows_of(batch), 0, dict.fromkeys(("text", "image", "consistency"), 0.0)
        for row in rows:
            count = len(row.get("pixel_values", ()))
            own = {
                name: {key: value[first : first + count] for key, value in drawn.items()}
                for name, drawn in draws.items()
                if count
            }
            alone = model(**row, **own)
            sums["text"] += alone.text_loss * (row["labels"][:, 1:] != -100).sum()
            sums["image"] += (alone.image_loss or 0.0) * count
            sums["consistency"] += (alone.consistency_loss or 0.0) * count
            first += count
    targets = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(together.text_loss, sums["text"] / targets, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.image_loss, sums["image"] / 5, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.consistency_loss, sums["consistency"] / 5, rtol=0, atol=1e-5)
