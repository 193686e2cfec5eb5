# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Images of the world as tensors and back, and the colors they show."""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from recipes.synthetic.parts.diffusion_modules import SIZE
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import dominant_color


def render(scenes: Iterable[Scene], what: str) -> Tensor:
    """Return the scenes' images as one tensor, (N, 3, 64, 64) uint8, with a progress bar named `what`."""
    images = [torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8) for scene in tqdm(scenes, what)]
    return torch.stack(images).view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2).contiguous()


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return images (N, 3, H, W) in [-1, 1] as PIL images."""
    values = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(value) for value in values]


def share_of_colors(images: Sequence[Image.Image], colors: Sequence[str]) -> float:
    """Return the share of images whose dominant color is the given one."""
    return sum(dominant_color(image) == color for image, color in zip(images, colors, strict=True)) / len(colors)
