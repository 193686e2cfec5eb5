# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the error of redrawing says of each image: where, at which timesteps, and which of its tokens matter.

Nothing is random: all images get the same noises, at every timestep the same, and the mean of the VAE's posterior. So an
image has the same error in any batch. Letters: N images, T timesteps, K noises, L tokens of an image (padded), W their
width, Q condition tokens, C their width, c, s channels and side of the latents, H image side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers.utils import ModelOutput

from .checks_deem import MADE_BY_PROCESSOR, check_targets
from .diffusion_deem import DeemDiffusionModel
from .image_states_deem import DeemImageStates
from .vision_deem import resize_region_masks

Condition = tuple[torch.Tensor, torch.Tensor | None]
NUM_TIMESTEPS = 4  # by default


@dataclass
class DeemImageError(ModelOutput):
    """
    Attributes:
        image_errors: (N,) float32, mean over `timestep_errors`.
        error_maps: (N, s, s) float32, of each latent cell, mean over channels, noises and timesteps.
        timestep_errors: (N, T) float32, mean over the cells, within the region where one was given.
        timestep_error_maps: (N, T, s, s) float32, whose mean over the timesteps `error_maps` is.
        token_errors: (N, L) float32, how much `image_errors` grows where one token is left out: below 0 where the image is
            redrawn better without. With `per_token` only.
        token_error_maps: (N, L, s, s) float32, how much each cell of `error_maps` grows then; 0 outside of a region.
        token_mask: bool (N, L), which tokens an image has; None where all have L. Errors of tokens are 0 elsewhere.
        timesteps: int64 (T,), those measured at.
    """

    image_errors: torch.Tensor | None = None
    error_maps: torch.Tensor | None = None
    timestep_errors: torch.Tensor | None = None
    timestep_error_maps: torch.Tensor | None = None
    token_errors: torch.Tensor | None = None
    token_error_maps: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None


@dataclass
class Redrawn:
    """Images, and what each is redrawn from.

    Attributes:
        latents: (N, c, s, s).
        tokens: (N, L, W); mask: bool (N, L), which of them count, None for all.
        condition_of: tokens (n, L, W) and their mask -> the condition (n, Q, C) and its mask.
        states: the features that each image sees besides, or None.
        regions: (N, 1, h, w) in {0, 1}, where errors count; None for everywhere.
    """

    latents: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor | None
    condition_of: Callable[[torch.Tensor, torch.Tensor | None], Condition]
    states: DeemImageStates | None = None
    regions: torch.Tensor | None = None


@dataclass
class Draws:
    """At which timesteps and noises images are redrawn.

    Attributes:
        timesteps: int64 (T,).
        noise: (K, c, s, s).
        batch_size: rows that the denoiser sees at a time.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    batch_size: int

    @classmethod
    def of(
        cls,
        part: DeemDiffusionModel,
        like: torch.Tensor,
        window: Sequence[int],
        timesteps: Sequence[int] | torch.Tensor | None = None,
        num_noise: int = 1,
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
    ) -> "Draws":
        """Check what the caller asks for, and draw the noise.

        Args:
            like: latents (N, c, s, s).
            window: first and last timestep of the loss, over which the default ones are spread evenly.

        Raises:
            ValueError: timesteps that the scheduler does not have, or numbers below 1.
        """
        total = part.scheduler.config.num_train_timesteps
        if timesteps is None:
            width = (window[1] + 1 - window[0]) / NUM_TIMESTEPS
            timesteps = [int(window[0] + (place + 0.5) * width) for place in range(NUM_TIMESTEPS)]
        levels = torch.as_tensor(timesteps)
        whole = levels.dim() == 1 and len(levels) and levels.dtype in (torch.int64, torch.int32)
        if not whole or levels.min() < 0 or levels.max() >= total:
            raise ValueError(
                f"timesteps are {str(timesteps)[:80]}; expected a list of one or more whole numbers from 0, least noise, to "
                f"{total - 1}."
            )
        check_counts(num_noise=num_noise, batch_size=batch_size)
        source = torch.Generator().manual_seed(seed) if generator is None else generator
        noise = randn_tensor((num_noise, *like.shape[1:]), source, like.device, like.dtype)
        return cls(levels.long().to(like.device), noise, batch_size)


def check_counts(**numbers: int) -> None:
    """Raise ValueError where a number, given by its name, is no whole one of 1 or more."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} is {number!r}; expected a whole number of 1 or more.")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Let models compute without dropout and gradients, and go on afterwards in the modes that they were in."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def states_of(states: DeemImageStates | None, index: torch.Tensor) -> DeemImageStates | None:
    """The states of rows that see what the images `index`, int64 (n,), see."""
    if states is None:
        return None
    return replace(states, visible=states.visible[index], index=states.row_index[index])


def redrawing_errors(
    part: DeemDiffusionModel,
    latents: torch.Tensor,
    condition: torch.Tensor,
    draws: Draws,
    states: DeemImageStates | None = None,
    condition_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Squared errors of redrawing (N, c, s, s) under the condition (N, Q, C): (N, T, s, s) float32.

    Each is a mean over channels and noises.
    """
    shape = (len(latents), len(draws.timesteps), len(draws.noise))
    pieces = []
    for rows in torch.arange(shape[0] * shape[1] * shape[2], device=latents.device).split(draws.batch_size):
        image, level, draw = torch.unravel_index(rows, shape)
        mask = None if condition_mask is None else condition_mask[image]
        noisy = (draws.timesteps[level], draws.noise[draw])
        errors = part.error_map(latents[image], condition[image], states_of(states, image), *noisy, mask)
        pieces.append(errors.mean(1))
    return torch.cat(pieces).unflatten(0, shape).mean(2)


def left_out_errors(part: DeemDiffusionModel, redrawn: Redrawn, draws: Draws) -> torch.Tensor:
    """Errors (N, L, s, s) of the images without their first token, their second, and so on; means over timesteps.

    Raises:
        ValueError: an image of one token.
    """
    count, length = redrawn.tokens.shape[:2]
    if length < 2 or (redrawn.mask is not None and redrawn.mask.sum(1).min() < 2):
        raise ValueError(
            "An image has one token: without it there is nothing to redraw from. Leave out per_token, or condition on all "
            "tokens."
        )
    each = max(1, draws.batch_size // (len(draws.timesteps) * len(draws.noise)))
    others = torch.arange(length - 1, device=redrawn.tokens.device)
    pieces = []
    for pairs in torch.arange(count * length, device=others.device).split(each):
        image, token = pairs // length, pairs % length
        kept = others + (others >= token[:, None])  # [n, L - 1]
        mask = None if redrawn.mask is None else redrawn.mask[image[:, None], kept]
        condition, mask = redrawn.condition_of(redrawn.tokens[image[:, None], kept], mask)
        states = states_of(redrawn.states, image)
        errors = redrawing_errors(part, redrawn.latents[image], condition, draws, states, mask)
        pieces.append(errors.mean(1))
    return torch.cat(pieces).unflatten(0, (count, length))


def measure(part: DeemDiffusionModel, redrawn: Redrawn, draws: Draws, per_token: bool = False) -> DeemImageError:
    """The errors of images under their tokens; `per_token` takes L times as long."""
    if redrawn.states is not None:  # features are projected once
        redrawn.states.kept_values, redrawn.states.kept_tables = {}, {}
    condition, mask = redrawn.condition_of(redrawn.tokens, redrawn.mask)
    errors = redrawing_errors(part, redrawn.latents, condition, draws, redrawn.states, mask)
    side = errors.shape[-2:]
    weights = torch.ones_like(errors[:1, :1]) / (side[0] * side[1])
    regions = None
    if redrawn.regions is not None:
        regions = resize_region_masks(redrawn.regions, side, part.region_mask_resize).to(errors)  # [N, 1, s, s]
        weights = regions / (regions.sum((1, 2, 3), keepdim=True) + 1e-8)
        errors = errors * regions
    of_timesteps = (errors * weights).sum((-2, -1))
    found = DeemImageError(
        image_errors=of_timesteps.mean(1),
        error_maps=errors.mean(1),
        timestep_errors=of_timesteps,
        timestep_error_maps=errors,
        token_mask=redrawn.mask,
        timesteps=draws.timesteps,
    )
    if per_token:
        without = left_out_errors(part, redrawn, draws)  # [N, L, s, s]
        without = (without if regions is None else without * regions) - found.error_maps[:, None]
        found.token_error_maps = without if redrawn.mask is None else without * redrawn.mask[..., None, None]
        found.token_errors = (found.token_error_maps * weights).sum((-2, -1))
    return found


def join(pieces: Sequence[DeemImageError]) -> DeemImageError:
    """The errors of batches behind each other, at the same timesteps."""
    return DeemImageError(
        **{
            name: value if name == "timesteps" else torch.cat([piece[name] for piece in pieces])
            for name, value in pieces[0].items()
        }
    )


class ImageErrorMixin:
    """`image_error` of a DEEM."""

    def image_error(
        self,
        pixel_values: torch.Tensor,
        target_pixel_values: torch.Tensor,
        region_masks: torch.Tensor | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
        num_noise: int = 1,
        per_token: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
    ) -> DeemImageError:
        """How well each image is redrawn from its own image tokens: per image, per cell and, if asked for, per token.

        The mean over images is the consistency loss at these timesteps and this noise. No gradient, no dropout.

        Args:
            pixel_values, target_pixel_values, region_masks: as in `consistency_loss`, any number of images.
            timesteps: whole numbers from 0, least noise, to the scheduler's last; 4 spread over the window of the loss by
                default.
            num_noise: noises that are averaged over; every image and timestep gets the same.
            per_token: also leave out one image token at a time, which takes as many times as long as there are tokens.
            seed: of the noise; or a `generator` to draw it from.
            batch_size: images that are encoded, and noisy ones that are denoised, at a time.

        Raises:
            ValueError: timesteps that the scheduler does not have; targets of another number than images, outside of
                [-1, 1], or the encoder's input itself.
        """
        decoder = self.require_image_decoder()
        check_targets(target_pixel_values, MADE_BY_PROCESSOR, pixel_values)
        check_counts(num_noise=num_noise, batch_size=batch_size)
        pieces, draws = [], None
        with evaluating(self):
            for start in range(0, len(pixel_values), batch_size):
                rows = slice(start, start + batch_size)
                masks = None if region_masks is None else region_masks[rows]
                images = self.get_image_features(pixel_values[rows], masks, return_dict=True)
                targets = target_pixel_values[rows]
                latents = decoder.encode(targets, noise=targets.new_zeros(()))
                if draws is None:
                    window = decoder.config.consistency_timestep_range
                    draws = Draws.of(decoder, latents, window, timesteps, num_noise, seed, generator, batch_size)
                states = decoder.consistency_states(images.image_tokens, images.image_features, masks)
                condition_of = lambda tokens, mask: (decoder.condition_from_tokens(tokens), mask)  # noqa: E731
                redrawn = Redrawn(latents, images.image_tokens, None, condition_of, states, masks)
                pieces.append(measure(decoder, redrawn, draws, per_token))
        return join(pieces)


__all__ = ["DeemImageError"]
