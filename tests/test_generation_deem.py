# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawing again what was drawn before, drawing images that stand in the text, and writing and drawing in turns."""

import pytest
import torch
from deem_fixtures import BOS, EOS, IMAGE, SIDE, START, STRUCTURE, Q, tiny_batch, tiny_model
from diffusers import DDIMScheduler
from torch.nn import functional as F

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


# ---- given noise ----


def test_given_noise_equals_the_generators_own(model) -> None:
    batch = tiny_batch("bttit", "bt", targets=False)
    latents, step_noise = draws(2, seed=3)
    drawn = model.generate_images(**batch, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3))
    given = model.generate_images(**batch, num_inference_steps=STEPS, latents=latents, step_noise=step_noise)
    torch.testing.assert_close(given, drawn, rtol=0, atol=0)
    other = model.generate_images(**batch, num_inference_steps=STEPS, latents=latents, step_noise=step_noise.flip(0))
    assert not torch.allclose(other, drawn, atol=1e-4)


def test_given_noise_leaves_the_schedulers_module_as_it_was(model) -> None:
    from diffusers.schedulers import scheduling_ddpm

    draw = scheduling_ddpm.randn_tensor
    batch, (latents, step_noise) = tiny_batch("bt", targets=False), draws(1)
    model.generate_images(**batch, num_inference_steps=STEPS, latents=latents, step_noise=step_noise)
    with pytest.raises(RuntimeError):  # in the middle of a step
        model.generate_images(**batch, num_inference_steps=STEPS, latents=latents, step_noise=step_noise[..., :3])
    assert scheduling_ddpm.randn_tensor is draw


def test_step_noise_must_fit_the_steps(model) -> None:
    batch, (latents, step_noise) = tiny_batch("bt", targets=False), draws(1)
    with pytest.raises(ValueError, match="3 steps.*5"):
        model.generate_images(**batch, num_inference_steps=5, latents=latents, step_noise=step_noise)


def test_a_scheduler_that_adds_no_noise_does_not_look_at_it(model) -> None:
    batch, (latents, step_noise) = tiny_batch("bt", targets=False), draws(1)
    scheduler = DDIMScheduler.from_config(model.image_decoder.scheduler.config)
    options = {"num_inference_steps": STEPS, "latents": latents, "scheduler": scheduler}
    without = model.generate_images(**batch, **options)
    torch.testing.assert_close(model.generate_images(**batch, **options, step_noise=step_noise), without)


def test_squeezed_timesteps_are_the_published_ones(model) -> None:
    raw = torch.tensor([0, 1, 437, 871, 999])
    squeezed = model.image_decoder.squeeze_timesteps(raw, 200, 799)
    assert squeezed.tolist() == [round(500 + 0.6 * (t - 500)) for t in raw.tolist()]


# ---- images that stand in the text ----


def test_target_images_equal_prompts_cut_at_them(model) -> None:
    batch = tiny_batch("bttitie", "bitti", targets=False)
    latents, step_noise = draws(2)
    options = {"num_inference_steps": STEPS, "latents": latents, "step_noise": step_noise}
    drawn = model.generate_images(**batch, **options, target_images=torch.tensor([1, 3]))
    for row, image, target in ((0, 0, 0), (1, 2, 1)):
        ids = batch["input_ids"][row]
        starts = (ids == START).nonzero().flatten()
        cut = model.generate_images(
            ids[None, : starts[1] + 1],
            pixel_values=batch["pixel_values"][image : image + 1],
            num_inference_steps=STEPS,
            latents=latents[target : target + 1],
            step_noise=step_noise[:, target : target + 1],
        )
        torch.testing.assert_close(drawn[target : target + 1], cut, rtol=0, atol=1e-4)


def test_pixels_of_target_images_do_not_matter(model) -> None:
    batch, (latents, step_noise) = tiny_batch("bttiti", targets=False), draws(1)
    options = {"num_inference_steps": STEPS, "latents": latents, "step_noise": step_noise}
    target = torch.tensor([1])
    drawn = model.generate_images(**batch, **options, target_images=target)
    batch["pixel_values"][1] = 0.0
    torch.testing.assert_close(model.generate_images(**batch, **options, target_images=target), drawn)


def test_document_starts_of_pictures_can_be_given(model) -> None:
    batch, (latents, step_noise) = tiny_batch("btttebtt", targets=False), draws(1)
    options = {"num_inference_steps": STEPS, "latents": latents, "step_noise": step_noise}
    default = model.generate_images(**batch, **options)
    latest = int((batch["input_ids"][0] == BOS).nonzero()[-1])
    torch.testing.assert_close(
        model.generate_images(**batch, **options, document_starts=torch.tensor([latest])), default
    )
    whole = model.generate_images(**batch, **options, document_starts=torch.tensor([0]))
    assert not torch.allclose(whole, default, atol=1e-4)


# ---- writing and drawing in turns ----


def interleave(model, batch: dict, image_processor, **options):
    options = {"num_inference_steps": STEPS, "max_new_tokens": 4, "do_sample": False, **options}
    structure = {"suppress_tokens": STRUCTURE, "generator": torch.Generator().manual_seed(0)}
    return model.generate_interleaved(
        batch["input_ids"], batch.get("pixel_values"), image_processor=image_processor, **{**structure, **options}
    )


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
        latents=[first, second],
        step_noise=[first_noise, second_noise],
    )
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    text = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": STRUCTURE, "eos_token_id": [EOS, START]}
    for turn, (latents, noise) in enumerate(((first, first_noise), (second, second_noise))):
        written = model.generate(ids, pixel_values=pixels, **text)[0, ids.shape[1] :]
        written = written[written != EOS]
        assert output.pieces[2 * turn].tolist() == [*written.tolist(), START]
        ids = torch.cat([ids, output.pieces[2 * turn][None]], dim=1)
        picture = model.generate_images(
            ids, pixel_values=pixels, num_inference_steps=STEPS, latents=latents, step_noise=noise
        )
        torch.testing.assert_close(output.pieces[2 * turn + 1], picture[0], rtol=0, atol=1e-5)
        as_bytes = (picture[0] * 255).round().to(torch.uint8).numpy()
        pixels = torch.cat([pixels, image_processor(images=[as_bytes], return_tensors="pt")["pixel_values"]])
        ids = F.pad(ids, (0, Q), value=IMAGE)
    assert output.input_ids.tolist() == ids.tolist()
    torch.testing.assert_close(output.pixel_values, pixels, rtol=0, atol=2 / 255 / 0.25)


def test_a_prompt_that_ends_in_start_of_image_is_drawn_first(model, image_processor) -> None:
    output = interleave(model, tiny_batch("btts", targets=False), image_processor, max_pieces=2)
    assert [piece.dim() for piece in output.pieces] == [3, 1]
    assert output.pixel_values.shape == (1, 3, SIDE, SIDE)


def test_it_ends_at_eos_unless_told_otherwise(model, image_processor) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[EOS] += 1000.0
    batch = tiny_batch("btt", targets=False)
    output = interleave(model, batch, image_processor, max_pieces=3)
    assert [piece.tolist() for piece in output.pieces] == [[]]
    assert output.input_ids.tolist() == batch["input_ids"].tolist()
    assert len(interleave(model, batch, image_processor, max_pieces=3, stop_at_eos=False).pieces) == 3


def test_it_draws_where_the_model_asks_for_it(image_processor) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.bias[START] += 1000.0
    batch = tiny_batch("btt", targets=False)
    output = interleave(model, batch, image_processor, max_pieces=2, suppress_tokens=[IMAGE])
    assert output.pieces[0].tolist() == [START]
    assert output.pieces[1].shape == (3, SIDE, SIDE)
    assert output.input_ids[0, -Q:].tolist() == [IMAGE] * Q


def test_one_row_at_a_time(model, image_processor) -> None:
    with pytest.raises(ValueError, match="one row at a time, got 2"):
        interleave(model, tiny_batch("bt", "bt", targets=False), image_processor)
