# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Images -> what the feedback redraws, by an image processor of transformers; and augmentations shared with the model.

A flip or crop is made on the image itself, before the model's processor and this one see it, so that both see the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ViTImageProcessorPil
from transformers.image_utils import load_image


class FeedbackImageProcessor:
    """Makes `target_pixel_values` (N, 3, H, H) in [-1, 1] of images; they are squashed to squares.

    Args:
        size: their side H in pixels.
        like: processor of the model whose images these are; where it cuts away the margins, so does this one.
    """

    def __init__(self, size: int, like: Any = None) -> None:
        half = [0.5, 0.5, 0.5]
        self.size, self.like = size, like
        square = {"height": size, "width": size}
        self.backend = ViTImageProcessorPil(size=square, image_mean=half, image_std=half, resample=3)

    def __call__(self, images: Image.Image | str | Sequence[Image.Image | str]) -> BatchFeature:
        """Images, or paths or URLs of such, in the order in which the text names them -> `target_pixel_values`."""
        images = [images] if isinstance(images, Image.Image | str) else images
        opened = [seen_part(load_image(image).convert("RGB"), self.like) for image in images]
        if not opened:
            return BatchFeature({"target_pixel_values": torch.zeros(0, 3, self.size, self.size)})
        pixels = self.backend(opened, return_tensors="pt")["pixel_values"].clamp(-1, 1)
        return BatchFeature({"target_pixel_values": pixels})

    def flip_and_crop(
        self,
        images: Sequence[Image.Image],
        generator: torch.Generator | None = None,
        flip: float = 0.5,
        smallest: float = 0.8,
    ) -> list[Image.Image]:
        """Return each image mirrored with probability `flip` and cut to a random window of the same proportions.

        Args:
            smallest: share of the area that a window has at least; 1 cuts nothing.
        """
        augmented = []
        for image in images:
            mirror, area, left, top = torch.rand(4, generator=generator).tolist()
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < flip else image
            scale = (smallest + (1 - smallest) * area) ** 0.5
            width, height = (max(1, round(scale * side)) for side in image.size)
            x, y = round(left * (image.width - width)), round(top * (image.height - height))
            augmented.append(image.crop((x, y, x + width, y + height)))
        return augmented


def seen_part(image: Image.Image, processor: Any) -> Image.Image:
    """Return what is left of an image where the processor of a model cuts out the center, as CLIP's does; else the image.

    Args:
        processor: an image processor, or a processor with one; others, and None, cut nothing.
    """
    processor = getattr(processor, "image_processor", processor)
    tiles = getattr(processor, "image_grid_pinpoints", None)  # together they show all of the image
    if not getattr(processor, "do_center_crop", False) or tiles:
        return image
    size, crop = processor.size, processor.crop_size
    width, height = crop["width"], crop["height"]
    if processor.do_resize:
        shortest = size.get("shortest_edge")
        across, down = (shortest, shortest) if shortest else (size["width"], size["height"])
        whole = (min(image.size),) * 2 if shortest else image.size
        width, height = whole[0] * width / across, whole[1] * height / down
    width, height = (
        min(side, max(1, round(wanted))) for side, wanted in zip(image.size, (width, height), strict=True)
    )
    x, y = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((x, y, x + width, y + height))
