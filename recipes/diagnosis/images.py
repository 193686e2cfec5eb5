# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The samples that a checkpoint is diagnosed on: the world's unseen scenes, or data of the user's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from processing import DeemDataCollator, DeemProcessor
from recipes.data.sources import DataArguments
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.training.held_out import held_out_samples, micro_batches

Batch = dict[str, Any]
IMAGE_KEYS = ("pixel_values", "target_pixel_values", "region_masks")


@dataclass
class Images:
    """Images as a model takes them.

    Attributes:
        pixel_values: (N, 3, h, w), of the encoder.
        target_pixel_values: (N, 3, H, H) in [-1, 1], the same images.
        region_masks: (N, 1, h, w) in {0, 1}, or None.
    """

    pixel_values: torch.Tensor
    target_pixel_values: torch.Tensor
    region_masks: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixel_values)

    def rows(self, index: slice) -> "Images":
        """Return some of the images."""
        masks = None if self.region_masks is None else self.region_masks[index]
        return Images(self.pixel_values[index], self.target_pixel_values[index], masks)

    def split(self, size: int) -> list["Images"]:
        """Return the images in pieces of at most `size`, as equal as can be, so that none is left alone."""
        pieces = -(-len(self) // size)
        bounds = [round(place * len(self) / pieces) for place in range(pieces + 1)]
        return [self.rows(slice(first, last)) for first, last in zip(bounds, bounds[1:], strict=False)]

    def given(self) -> tuple[torch.Tensor, ...]:
        """Return them in the order in which `image_error` takes them."""
        return self.pixel_values, self.target_pixel_values, self.region_masks


def world_samples(world: World, number: int) -> list[dict[str, Any]]:
    """Return unseen scenes: each with its caption behind it, and in every second sample another one, drawn behind its own.

    So the text loss reads images everywhere, and half of the images can be drawn from a text with an image in it.
    """
    samples = []
    for place in range(number):
        scenes = [world.scene(HELD_OUT + place), world.scene(HELD_OUT + number + place)][: 1 + place % 2]
        said = [scene.caption("medium") for scene in scenes]
        text = f"<image>{said[0]}" if len(scenes) == 1 else f"<image>{said[0]}. {said[1]}<image>"
        samples.append({"text": text, "images": [scene.image for scene in scenes], "id": str(place)})
    return samples


def read_batches(
    data: Sequence[str], processor: DeemProcessor, world: World, number: int, batch_size: int, seed: int
) -> list[Batch]:
    """Return batches of `number` samples, fewer where the data has fewer, as the collator makes them.

    Args:
        data: as in `--data` of recipes/pretrain.py; the world's unseen scenes where there is none.
    """
    if data:
        # each sample for itself: packed rows would be cut and could not be put together by mode
        arguments = DataArguments(data=list(data), pack_length=0)
        samples = held_out_samples(arguments, processor, number, seed, ("plain",))
    else:
        samples = world_samples(world, number)
    collate = DeemDataCollator(processor)
    return [collate(piece) for piece in micro_batches(samples, batch_size)]


def images_of(batches: Sequence[Batch], number: int, device: torch.device) -> Images:
    """Return the first `number` images of batches.

    Raises:
        ValueError: there are fewer than two.
    """
    with_images = [batch for batch in batches if "pixel_values" in batch]
    count = sum(len(batch["pixel_values"]) for batch in with_images)
    if min(count, number) < 2:
        raise ValueError(
            f"{count} images in the data, {number} asked for: at least 2 are needed, since tokens of one are given to another."
        )
    columns: dict[str, torch.Tensor | None] = {}
    for name in IMAGE_KEYS:
        if name == "region_masks" and not any(name in batch for batch in with_images):
            continue
        pieces = [batch.get(name, torch.ones_like(batch["pixel_values"][:, :1])) for batch in with_images]
        columns[name] = torch.cat(pieces)[:number].to(device)
    return Images(**columns)
