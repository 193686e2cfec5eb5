# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a model sees of images: the same figures for the viewer, the app and whoever calls them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from modeling_deem import DeemForConditionalGeneration, DeemImageError
from recipes.generation.checkpoint import DRAWING_STEPS, make_scheduler
from recipes.generation.tasks import redraw_images, to_pil

SEEDS = (0, 1, 2)


@dataclass
class View:
    """What a model sees of one image.

    Attributes:
        image: as it is to be redrawn, of the denoiser's side.
        redrawn: from the image's own tokens, one per seed.
        seeds: of the noise that each was redrawn from.
        error: of this image alone (N = 1), on the CPU.
    """

    image: Image.Image
    redrawn: list[Image.Image]
    seeds: list[int]
    error: DeemImageError

    @property
    def most(self) -> float:
        """The largest error of a cell at any timestep."""
        return float(self.error.timestep_error_maps.max())

    def error_map(self, timestep: int | None = None) -> torch.Tensor:
        """The error of each cell (s, s), at one of the timesteps looked at; None for their mean.

        Raises:
            ValueError: a timestep that was not looked at.
        """
        if timestep is None:
            return self.error.error_maps[0]
        known = self.error.timesteps.tolist()
        if timestep not in known:
            raise ValueError(f"Timestep {timestep} was not looked at; {known} were.")
        return self.error.timestep_error_maps[0, known.index(timestep)]

    def token_map(self, token: int) -> torch.Tensor:
        """How much the error of each cell (s, s) grows where one image token is left out; below 0 where it falls.

        Raises:
            ValueError: tokens were not left out, or there is no such token.
        """
        if self.error.token_error_maps is None:
            raise ValueError("No token was left out: look with per_token=True.")
        length = self.error.token_error_maps.shape[1]
        if not 0 <= token < length:
            raise ValueError(f"Token {token} does not exist: an image has tokens 0 to {length - 1}.")
        return self.error.token_error_maps[0, token]

    def figures(self) -> dict[str, Any]:
        """The numbers of a view, for JSON: errors by image, timestep and token."""
        tokens = self.error.token_errors
        return {
            "error": float(self.error.image_errors[0]),
            "timesteps": dict(zip(self.error.timesteps.tolist(), self.error.timestep_errors[0].tolist(), strict=True)),
            "tokens": None if tokens is None else tokens[0].tolist(),
        }


def look(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | str],
    seeds: Sequence[int] = SEEDS,
    timesteps: Sequence[int] | None = None,
    num_noise: int = 1,
    per_token: bool = True,
    region_masks: Sequence[Any] | None = None,
    num_inference_steps: int = DRAWING_STEPS,
    guidance_scale: float = 1.0,
    scheduler: str | None = None,
) -> list[View]:
    """Redraw images from their own tokens and measure where that fails.

    An image's figures depend neither on the others nor on their number.

    Args:
        images: N images, PIL or file names.
        seeds: of the noise that each image is redrawn from; the first is that of the errors too.
        timesteps, num_noise, per_token: as in `DeemForConditionalGeneration.image_error`.
        region_masks: N regions as the image processor takes them, None for a whole image.
        num_inference_steps, guidance_scale: of redrawing.
        scheduler: class name of a diffusers scheduler, see `make_scheduler`.

    Raises:
        ValueError: the model is no DEEM or has no image decoder, there is no image or no seed, or what the processor and
            `image_error` refuse.
    """
    if not isinstance(model, DeemForConditionalGeneration):
        raise ValueError(f"A {type(model).__name__} does not redraw images: give the checkpoint of a DEEM.")
    if not images or not seeds:
        raise ValueError(f"Got {len(images)} images and {len(seeds)} seeds; expected one or more of each.")
    regions = {} if region_masks is None else {"region_masks": list(region_masks)}
    inputs = processor.image_processor(list(images), return_targets=True, return_tensors="pt", **regions)
    error = model.image_error(
        **inputs.to(model.device), timesteps=timesteps, num_noise=num_noise, per_token=per_token, seed=seeds[0]
    )
    drawn = redraw_images(
        model,
        processor,
        [image for image in images for _ in seeds],
        seed=[seed for _ in images for seed in seeds],
        region_masks=None if region_masks is None else [region for region in region_masks for _ in seeds],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        scheduler=make_scheduler(model, scheduler),
    )
    targets = to_pil((inputs["target_pixel_values"] + 1) / 2)
    views = []
    for index, target in enumerate(targets):
        own = drawn[index * len(seeds) : (index + 1) * len(seeds)]
        views.append(View(target, own, list(seeds), _of_one(error, index)))
    return views


def _of_one(error: DeemImageError, index: int) -> DeemImageError:
    """The error of one image, on the CPU."""
    one = {name: value if name == "timesteps" else value[index : index + 1] for name, value in error.items()}
    return DeemImageError(**{name: value.cpu() for name, value in one.items()})
