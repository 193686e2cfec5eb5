# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What an image is drawn from, and how the whole model draws."""

import pytest
import torch
from deem_fixtures import (
    BOS,
    SIDE,
    positions_of,
    rows_of,
    tiny_batch,
    tiny_draws,
    tiny_model,
)
from diffusers import DDIMScheduler

from modeling_deem import DeemForConditionalGeneration

SIDES = ("left", "right")


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    """Shared by the tests that leave it as it is."""
    return tiny_model(seed=5)


def image_context(model, batch: dict[str, torch.Tensor], **extra):
    with torch.no_grad():
        outputs = model.model(**batch)
        return model.get_image_context(
            outputs.last_hidden_state, batch["input_ids"], batch["attention_mask"], outputs.image_output, **extra
        )


def seen_images(states) -> list[list[int]]:
    """Which images each drawn image sees, oldest first."""
    pairs = zip(states.index.tolist(), states.visible.tolist(), strict=True)
    return [[image for image, visible in zip(*pair, strict=True) if visible] for pair in pairs]


@pytest.mark.parametrize("padding_side", SIDES)
@pytest.mark.parametrize(
    ("previous", "expected"),
    [
        (1, [[], [0], [1], [], [3], [], [], [6]]),
        (2, [[], [0], [0, 1], [], [3], [], [], [6]]),
        (3, [[], [0], [0, 1], [], [3], [], [], [6]]),
    ],
)
def test_previous_images_end_at_row_and_document(padding_side: str, previous: int, expected: list) -> None:
    model = tiny_model(image_decoder_config={"num_previous_images": previous})
    batch = tiny_batch("btititibtiti", "bi", "btbitit", padding_side=padding_side, targets=False)
    _, _, states = image_context(model, batch)
    assert seen_images(states) == expected


def test_two_previous_images_change_the_loss() -> None:
    batch = tiny_batch("btititi")
    losses = []
    for previous in (1, 2):
        model = tiny_model(image_decoder_config={"num_previous_images": previous})
        with torch.no_grad():
            losses.append(model(**batch, image_draws=tiny_draws(3, image=True)).image_loss)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("padding_side", SIDES)
def test_context_runs_from_start_of_image_back_to_the_document(model, padding_side: str) -> None:
    batch = tiny_batch("btbtti", "bttttttit", "ti", padding_side=padding_side, targets=False)
    batch["position_ids"] = positions_of(batch["attention_mask"])
    contexts, mask, _ = image_context(model, batch)
    with torch.no_grad():
        hidden_states = model.model(**batch).last_hidden_state
    for row, (drawn_from, start) in enumerate(((4, 2), (8, 0), (2, 0))):  # bos t t s | bos 6t s | t s
        assert mask[row].tolist() == [k < drawn_from for k in range(mask.shape[1])]
        tokens = hidden_states[row][batch["attention_mask"][row].bool()]
        assert torch.equal(contexts[row, :drawn_from], tokens[start : start + drawn_from].flip(0))
        assert not contexts[row, drawn_from:].any()


def test_given_document_starts_are_used(model) -> None:
    batch = tiny_batch("btitbtti", "btti")
    draws = {"image_draws": tiny_draws(3, image=True), "consistency_loss_weight": 0.0}
    found = torch.tensor([0, 8, 0])
    with torch.no_grad():
        without = model(**batch, **draws).image_loss
        assert model(**batch, **draws, document_starts=found).image_loss == without
        assert model(**batch, **draws, document_starts=torch.zeros_like(found)).image_loss != without
    _, mask, states = image_context(model, {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")},
                                    document_starts=torch.zeros_like(found))  # fmt: skip
    assert seen_images(states) == [[], [0], []]
    assert mask.sum(1).tolist() == [3, 12, 4]


@pytest.mark.parametrize("words", [("btitti", "bti", "bttt"), ("tti", "i")], ids=["with bos", "without bos"])
def test_padding_side_does_not_change_the_losses(model, words: tuple[str, ...]) -> None:
    losses = []
    for side in SIDES:
        batch = tiny_batch(*words, padding_side=side)
        count = len(batch["pixel_values"])
        with torch.no_grad():
            if BOS not in batch["input_ids"]:  # a first token that is trained follows padding, or nothing
                batch["labels"][batch["attention_mask"].cumsum(1) == 1] = -100
            losses.append(
                model(
                    **batch,
                    position_ids=positions_of(batch["attention_mask"]),
                    consistency_draws=tiny_draws(count),
                    image_draws=tiny_draws(count, image=True),
                )
            )
    for name in ("text_loss", "image_loss", "consistency_loss"):
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=0, atol=1e-5)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


@pytest.mark.parametrize(
    "words",
    [("bttitit", "btt", "bitbti"), ("bttts", "btitis", "bs"), ("btts", "btit", "bitbtis"), ("btt", "bttttt")],
    ids=["appended", "given", "mixed", "text only"],
)
def test_generated_pictures_do_not_depend_on_padding_or_neighbors(model, words: tuple[str, ...]) -> None:
    left, right = (
        model.generate_images(**tiny_batch(*words, padding_side=side, targets=False), generator=generators(len(words)))
        for side in SIDES
    )
    assert left.shape == (len(words), 3, SIDE, SIDE) and left.min() >= 0 and left.max() <= 1
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    batch = tiny_batch(*words, targets=False)
    for index, row in enumerate(rows_of(batch)):
        alone = model.generate_images(**row, generator=generators(1, index))
        torch.testing.assert_close(left[index : index + 1], alone, rtol=0, atol=1e-5)


def test_generated_pictures_depend_on_text_images_and_guidance(model) -> None:
    batch = tiny_batch("bttit", targets=False)

    def draw(**changes) -> torch.Tensor:
        return model.generate_images(**{**batch, **changes}, generator=generators(1))

    first = draw()
    assert torch.equal(first, draw())
    other_text = batch["input_ids"].clone()
    other_text[0, 1] = 77
    for changes in (
        {"input_ids": other_text},
        {"pixel_values": batch["pixel_values"] + 1},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 2},
        {"scheduler": DDIMScheduler.from_config(model.config.image_decoder_config.scheduler)},
        {"latents": torch.ones(1, 4, 8, 8)},
        {"region_masks": torch.nn.functional.pad(torch.ones(1, 1, 16, 16), (0, 48, 0, 48))},
    ):
        assert not torch.allclose(first, draw(**changes), atol=1e-5), changes.keys()
    assert torch.equal(first, draw())  # nothing of that stayed behind


def test_schedulers_are_left_as_they_were(model) -> None:
    own = model.image_decoder.scheduler
    given = DDIMScheduler.from_config(model.config.image_decoder_config.scheduler)
    for scheduler in (None, given):
        model.generate_images(**tiny_batch("btt", targets=False), scheduler=scheduler)
    for scheduler in (own, given):
        assert scheduler.num_inference_steps is None and len(scheduler.timesteps) == 1000
    assert model.image_decoder.scheduler is own


def test_guidance_is_the_published_mixture(model) -> None:
    decoder = model.image_decoder
    contexts, mask, states = image_context(model, tiny_batch("bttit", "bti", targets=False))
    with torch.no_grad():
        condition = decoder.condition_from_context(contexts, mask)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        scheduler = DDIMScheduler.from_config(model.config.image_decoder_config.scheduler)
        got = decoder.sample(condition, states, 1, 2.5, latents=latents, scheduler=scheduler)
        scheduler.set_timesteps(1)
        step = scheduler.timesteps[0]
        times = step.expand(2)
        without = decoder.denoise(latents, times, decoder.null_condition.expand_as(condition), states)
        within = decoder.denoise(latents, times, condition, states)
        prediction = without + 2.5 * (within - without)
        expected = decoder.decode(scheduler.step(prediction, step, latents).prev_sample)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_reconstructions_are_reproducible_and_independent(model) -> None:
    pixel_values = tiny_batch("btititi", targets=False)["pixel_values"]
    together = model.reconstruct(pixel_values, generator=generators(3))
    assert together.shape == (3, 3, SIDE, SIDE) and together.min() >= 0 and together.max() <= 1
    assert torch.equal(together, model.reconstruct(pixel_values, generator=generators(3)))
    assert not torch.allclose(together, model.reconstruct(pixel_values, generator=generators(3, 9)), atol=1e-4)
    for index in range(3):
        alone = model.reconstruct(pixel_values[index : index + 1], generator=generators(1, index))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)
    one = [model.reconstruct(pixel_values, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*one)
    masks = torch.zeros(3, 1, SIDE, SIDE)
    masks[..., :32, :32] = 1
    assert not torch.allclose(together, model.reconstruct(pixel_values, masks, generator=generators(3)), atol=1e-5)


def test_drawing_leaves_the_global_random_state_alone(model) -> None:
    batch = tiny_batch("bti", targets=False)
    state = torch.get_rng_state()
    model.generate_images(**batch, generator=torch.Generator().manual_seed(0))
    model.reconstruct(batch["pixel_values"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(**tiny_batch("bti"), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
