# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The three tasks of a trained model: text, drawn images and reconstructions, for batches of any size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin


def make_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image | str]],
    region_masks: Sequence[Sequence[Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the model's inputs for a batch of prompts, padded on the left, on the model's device.

    Args:
        prompts: B texts with one placeholder per image.
        images: B rows of images, PIL or file names.
        region_masks: B rows of masks (H, W), one per image; None for a whole image.
    """
    flat = [image for row in images for image in row]
    regions = {} if region_masks is None else {"region_masks": [mask for row in region_masks for mask in row]}
    inputs = processor(
        text=list(prompts), images=flat or None, return_tensors="pt", padding=True, padding_side="left", **regions
    )
    return {name: value.to(model.device) for name, value in inputs.items()}


def make_generators(model: PreTrainedModel, seed: int | Sequence[int], number: int) -> list[torch.Generator]:
    """Return one source of noise per image, so that no image depends on those it shares a batch with.

    Args:
        seed: of the first, from which the others count on; or one of each.
    """
    seeds = range(seed, seed + number) if isinstance(seed, int) else seed
    return [torch.Generator(model.device).manual_seed(one) for one in seeds]


@contextmanager
def adapting(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | str],
    steps: int,
    learning_rate: float,
    seed: int = 0,
) -> Iterator[PreTrainedModel]:
    """Let a model's vision tower learn from redrawing these images, as long as the context lasts; with 0 steps it does not.

    Prints how far the error of redrawing falls, with the same noise before and after.

    Args:
        images: PIL or file names.
        learning_rate: of each step.
        seed: of the noise that the steps are taken on.
    """
    if not steps:
        yield model
        return
    inputs = processor.image_processor(list(images), return_targets=True, return_tensors="pt").to(model.device)
    given = (inputs["pixel_values"], inputs["target_pixel_values"])
    before = model.image_error(*given, seed=seed).image_errors
    (generator,) = make_generators(model, seed, 1)
    with model.adapted_to(*given, steps, learning_rate, generator=generator) as adapted:
        after = model.image_error(*given, seed=seed).image_errors
        print(f"{steps} steps on these images: error of redrawing {before.mean():.5f} -> {after.mean():.5f}")
        yield adapted


def batches(size: int, *columns: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Yield batches of at most `size` rows from columns of equal length."""
    for start in range(0, len(columns[0]), size):
        yield tuple(column[start : start + size] for column in columns)


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image | str]],
    batch_size: int = 50,
    region_masks: Sequence[Sequence[Any]] | None = None,
    **generation_options: Any,
) -> list[str]:
    """Continue each prompt with text.

    Args:
        prompts: B texts with one placeholder per image.
        images: B rows of images, PIL or file names.
        region_masks: B rows of masks (H, W), one per image; None for a whole image.
        batch_size: prompts at a time.
        generation_options: any options of `model.generate`, such as `max_new_tokens` and `num_beams`.

    Returns:
        B continuations, without the prompt and without special tokens.
    """
    texts = []
    masks = [None] * len(prompts) if region_masks is None else region_masks
    for prompt_batch, image_batch, mask_batch in batches(batch_size, prompts, images, masks):
        given = None if region_masks is None else mask_batch
        inputs = make_inputs(model, processor, prompt_batch, image_batch, given)
        tokens = model.generate(**inputs, **generation_options)[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


@torch.inference_mode()
def draw_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image | str]],
    seed: int = 0,
    batch_size: int = 50,
    **sampling_options: Any,
) -> list[Image.Image]:
    """Draw one image after each prompt.

    Args:
        prompts: B texts with one placeholder per image.
        images: B rows of images (PIL or file names), the context.
        seed: of the noise.
        batch_size: images at a time.
        sampling_options: options of `model.generate_images`: `num_inference_steps`, `guidance_scale`, `scheduler`.

    Returns:
        B images of the side that the model draws.
    """
    generators = make_generators(model, seed, len(prompts))
    drawn = []
    for prompt_batch, image_batch, generator in batches(batch_size, prompts, images, generators):
        inputs = make_inputs(model, processor, prompt_batch, image_batch)
        drawn += to_pil(model.generate_images(**inputs, generator=generator, **sampling_options))
    return drawn


@torch.inference_mode()
def redraw_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | str],
    seed: int | Sequence[int] = 0,
    batch_size: int = 50,
    region_masks: Sequence[Any] | None = None,
    **sampling_options: Any,
) -> list[Image.Image]:
    """Draw each image again from its own image tokens and features: what the encoder sees.

    Args:
        images: N images, PIL or file names.
        seed: of the first image's noise, from which the others count on; or one of each.
        region_masks: N masks (H, W), or None for a whole image.
        batch_size: images at a time.
        sampling_options: options of `model.reconstruct`: `num_inference_steps`, `guidance_scale`, `scheduler`.

    Returns:
        N images of the side that the model draws.
    """
    generators = make_generators(model, seed, len(images))
    drawn = []
    masks = [None] * len(images) if region_masks is None else region_masks
    for image_batch, generator, mask_batch in batches(batch_size, images, generators, masks):
        regions = {} if region_masks is None else {"region_masks": list(mask_batch)}
        inputs = processor.image_processor(list(image_batch), return_tensors="pt", **regions).to(model.device)
        drawn += to_pil(model.reconstruct(**inputs, generator=generator, **sampling_options))
    return drawn


def to_pil(values: torch.Tensor) -> list[Image.Image]:
    """Return N PIL images for values `(N, 3, H, W)` in [0, 1]."""
    return VaeImageProcessor.numpy_to_pil(values.float().cpu().permute(0, 2, 3, 1).numpy())
