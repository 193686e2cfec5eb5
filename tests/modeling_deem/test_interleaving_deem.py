# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Writing and drawing in turns: one row equals single calls, a batch equals its rows, pieces come as they are made."""

import pytest
import torch
from deem_fixtures import BOS, EOS, IMAGE, SIDE, START, STRUCTURE, Q, rows_of, tiny_batch, tiny_model
from given_noise import GivenNoiseScheduler
from torch.nn import functional as F
from transformers import StoppingCriteria

from modeling_deem import DeemForConditionalGeneration
from processing import DeemImageProcessorPil

STEPS = 3


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def image_processor() -> DeemImageProcessorPil:
    return DeemImageProcessorPil(size=SIDE, target_size=SIDE)


def draws(pictures: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Initial latents and the noise of every step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pictures, 4, 8, 8)
    return torch.randn(shape, generator=generator), torch.randn(STEPS, *shape, generator=generator)


def options_of(image_processor, **options):
    defaults = {"num_inference_steps": STEPS, "max_new_tokens": 4, "do_sample": False, "suppress_tokens": STRUCTURE}
    return {"image_processor": image_processor, **defaults, **options}


def interleave(model, batch: dict, image_processor, **options):
    options = {"generator": torch.Generator().manual_seed(0), **options}
    return model.generate_interleaved(**batch, **options_of(image_processor, **options))


# ---- one row ----


def test_turns_equal_single_calls(model, image_processor) -> None:
    batch = tiny_batch("btit", targets=False)
    (first, first_noise), (second, second_noise) = draws(1, seed=1), draws(1, seed=2)
    output = interleave(
        model,
        batch,
        image_processor,
        max_pieces=4,
        draw_every_turn=True,
        stop_at_eos=False,
        latents=[[first, second]],
        scheduler=GivenNoiseScheduler.of(model.image_decoder.scheduler, first_noise, second_noise),
    )
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    text = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": STRUCTURE, "eos_token_id": [EOS, START]}
    for turn, (latents, noise) in enumerate(((first, first_noise), (second, second_noise))):
        written = model.generate(ids, pixel_values=pixels, **text)[0, ids.shape[1] :]
        written = written[written != EOS]
        assert output.pieces[0][2 * turn].tolist() == [*written.tolist(), START]
        ids = torch.cat([ids, output.pieces[0][2 * turn][None]], dim=1)
        scheduler = GivenNoiseScheduler.of(model.image_decoder.scheduler, noise)
        picture = model.generate_images(
            ids, pixel_values=pixels, num_inference_steps=STEPS, latents=latents, scheduler=scheduler
        )
        torch.testing.assert_close(output.pieces[0][2 * turn + 1], picture[0], rtol=0, atol=1e-5)
        as_bytes = (picture[0] * 255).round().to(torch.uint8).numpy()
        pixels = torch.cat([pixels, image_processor(images=[as_bytes], return_tensors="pt")["pixel_values"]])
        ids = F.pad(ids, (0, Q), value=IMAGE)
    assert output.input_ids.tolist() == ids.tolist()
    torch.testing.assert_close(output.pixel_values, pixels, rtol=0, atol=2 / 255 / 0.25)


def test_a_prompt_that_ends_in_start_of_image_is_drawn_first(model, image_processor) -> None:
    output = interleave(model, tiny_batch("btts", targets=False), image_processor, max_pieces=2)
    assert [piece.dim() for piece in output.pieces[0]] == [3, 1]
    assert output.pixel_values.shape == (1, 3, SIDE, SIDE)


def test_it_ends_at_eos_unless_told_otherwise(model, image_processor) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[EOS] += 1000.0
    batch = tiny_batch("btt", targets=False)
    output = interleave(model, batch, image_processor, max_pieces=3)
    assert [piece.tolist() for piece in output.pieces[0]] == [[]]
    assert output.input_ids.tolist() == batch["input_ids"].tolist()
    assert len(interleave(model, batch, image_processor, max_pieces=3, stop_at_eos=False).pieces[0]) == 3


def test_it_draws_where_the_model_asks_for_it(image_processor) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[START] += 1000.0
    batch = tiny_batch("btt", targets=False)
    output = interleave(model, batch, image_processor, max_pieces=2, suppress_tokens=[IMAGE])
    assert output.pieces[0][0].tolist() == [START]
    assert output.pieces[0][1].shape == (3, SIDE, SIDE)
    assert output.input_ids[0, -Q:].tolist() == [IMAGE] * Q


# ---- a batch ----


def eager_to_draw() -> DeemForConditionalGeneration:
    """A model that often begins a picture or ends, so that rows differ in their pieces."""
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.lm_head.bias[START] += 3.0
        model.lm_head.bias[EOS] += 2.2
    return model


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + row) for row in range(count)]


def assert_same_pieces(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert [piece.dim() for piece in ours] == [piece.dim() for piece in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one.dim() == 1:
            assert one.tolist() == other.tolist()
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_equals_its_rows(image_processor, padding_side: str) -> None:
    """Four rows with 1, 0, 2 and 0 images, one of which begins with a picture; words and pictures drawn by chance."""
    model = eager_to_draw()
    batch = tiny_batch("btti", "bts", "bitti", "bttttttt", padding_side=padding_side, targets=False)
    options = options_of(
        image_processor, do_sample=True, temperature=1.5, max_pieces=6, suppress_tokens=[0, BOS, IMAGE]
    )
    together = model.generate_interleaved(**batch, **options, generator=generators(4))
    kinds = ["".join("tp"[piece.dim() == 3] for piece in pieces) for pieces in together.pieces]
    assert len(set(kinds)) >= 3 and any("tp" in kind for kind in kinds), kinds  # rows do differ
    for row, single in enumerate(rows_of(batch)):
        alone = model.generate_interleaved(**single, **options, generator=[generators(4)[row]])
        assert_same_pieces(together.pieces[row], alone.pieces[0])
        length = int(together.attention_mask[row].sum())
        assert together.input_ids[row, -length:].tolist() == alone.input_ids[0].tolist()
    assert len(together.pixel_values) == 3 + sum(kind.count("p") for kind in kinds)
    again = model.generate_interleaved(**batch, **options, generator=generators(4))
    for row in range(4):
        assert_same_pieces(again.pieces[row], together.pieces[row])


def test_given_noise_per_row(model, image_processor) -> None:
    batch = tiny_batch("bits", "bts", padding_side="left", targets=False)
    latents, step_noise = draws(2, seed=5)
    given = {
        "latents": [[latents[:1]], [latents[1:]]],
        "scheduler": GivenNoiseScheduler.of(model.image_decoder.scheduler, step_noise),
    }
    output = interleave(model, batch, image_processor, max_pieces=1, **given)
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    options = {
        "latents": latents,
        "scheduler": GivenNoiseScheduler.of(model.image_decoder.scheduler, step_noise),
        "num_inference_steps": STEPS,
    }
    drawn = model.generate_images(ids, mask, pixels, **options)
    for row in range(2):
        torch.testing.assert_close(output.pieces[row][0], drawn[row], rtol=0, atol=1e-5)


def test_pieces_come_as_they_are_made(model, image_processor) -> None:
    batch = tiny_batch("btt", "bts", padding_side="left", targets=False)
    options = options_of(image_processor, max_pieces=2, generator=generators(2), draw_every_turn=True)
    stream = model.stream_interleaved(**batch, **options)
    came = [(row, piece.dim()) for row, piece in stream]
    assert came == [(1, 3), (0, 1), (1, 1), (0, 3)]
    whole = model.generate_interleaved(**batch, **{**options, "generator": generators(2)})
    assert [[piece.dim() for piece in pieces] for pieces in whole.pieces] == [[1, 3], [3, 1]]


def test_a_drawn_picture_is_read_normalized(model, image_processor) -> None:
    output = interleave(model, tiny_batch("bts", targets=False), image_processor, max_pieces=1)
    picture = (output.pieces[0][0] * 255).round() / 255
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (image_processor.image_mean, image_processor.image_std)
    )
    torch.testing.assert_close(output.pixel_values[0], (picture - mean) / std, rtol=0, atol=1e-5)


def test_regions_are_seen_and_drawn_images_whole(model, image_processor) -> None:
    batch = tiny_batch("bti", "bts", padding_side="left", targets=False)
    masks = torch.zeros(1, 1, SIDE, SIDE)
    masks[..., :32] = 1
    options = {"max_pieces": 2, "draw_every_turn": True, "stop_at_eos": False}
    output = interleave(model, batch, image_processor, region_masks=masks, generator=generators(2), **options)
    assert torch.equal(output.region_masks[0], masks[0]) and (output.region_masks[1:] == 1).all()
    assert len(output.region_masks) == len(output.pixel_values) == 3
    alone = {name: value[:1] for name, value in batch.items()}
    first = interleave(model, alone, image_processor, region_masks=masks, generator=generators(2)[:1], **options)
    torch.testing.assert_close(first.pieces[0][1], output.pieces[0][1], rtol=0, atol=1e-5)
    unseen = interleave(model, alone, image_processor, generator=generators(2)[:1], **options)
    assert (unseen.pieces[0][1] - first.pieces[0][1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="2 region masks for 1 images"):
        interleave(model, alone, image_processor, region_masks=torch.ones(2, 1, SIDE, SIDE))


def test_tokens_and_steps_are_watched_as_they_come(model, image_processor) -> None:
    words, steps = [], []

    class Watching(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            words.append(input_ids[0].tolist())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    batch = tiny_batch("btit", targets=False)
    output = interleave(
        model,
        batch,
        image_processor,
        max_pieces=2,
        draw_every_turn=True,
        stop_at_eos=False,
        generator=generators(1),
        stopping_criteria=[Watching()],
        callback_on_step_end=lambda step, timestep, latents: steps.append((step, int(timestep), latents)),
    )
    length = batch["input_ids"].shape[1]
    written = [token for token in words[-1][length:] if token not in (EOS, START)]
    assert written == output.pieces[0][0][:-1].tolist() and len(words) >= len(written)
    assert [step for step, _, _ in steps] == list(range(STEPS)) and steps[0][1] > steps[-1][1]
    preview = model.image_decoder.decode(steps[-1][2])[0]
    torch.testing.assert_close(preview, output.pieces[0][1], rtol=0, atol=1e-5)  # no noise is left at the last step


def test_what_does_not_fit_is_refused(model, image_processor) -> None:
    batch = tiny_batch("bti", "bt", padding_side="left", targets=False)
    for options, message in (
        ({"generator": generators(3)}, "generator has 3 entries for 2 rows"),
        ({"latents": [[]]}, "latents has 1 entries for 2 rows"),
        ({"max_length": 30}, "no max_length"),
        ({"num_return_sequences": 2}, "no num_return_sequences"),
        ({"do_sample": True, "num_beams": 2}, "leave out num_beams"),
    ):
        with pytest.raises(ValueError, match=message):
            interleave(model, batch, image_processor, **options)
    with pytest.raises(ValueError, match=r"1 images.*hold \[0, 0\]"):
        interleave(model, {**batch, "input_ids": batch["input_ids"].clamp(max=200)}, image_processor)


@pytest.mark.parametrize("option", [{"eos_token_id": 2}, {"return_dict_in_generate": True}, {"stop_strings": ["a"]}])
def test_options_that_texts_within_cannot_have_are_refused(model, image_processor, option: dict) -> None:
    with pytest.raises(ValueError, match=f"takes no {next(iter(option))}"):
        interleave(model, tiny_batch("btt", targets=False), image_processor, max_pieces=1, **option)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"scheduler": "DDIMScheduler"}, "make_scheduler"),
        ({"generator": [torch.Generator()] * 2}, "2 entries in generator for 3 images"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "2 entries in latents for 3 images"),
    ],
)
def test_drawing_options_that_do_not_fit_are_refused(model, options: dict, message: str) -> None:
    batch = tiny_batch("bt", "btt", "bttt", padding_side="left", targets=False)
    with pytest.raises(ValueError, match=message):
        model.generate_images(**batch, **{"num_inference_steps": 1, **options})
