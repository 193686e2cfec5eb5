# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""EfficientNet-Lite0, an image classifier of 1,000 ImageNet classes, as a judge of RobustVQA.

No class of transformers computes it: its EfficientNet has squeeze-and-excitation, which the Lite models lack. Names of
modules are those of the published weights, which are TensorFlow's: images are scaled as (x - 127) / 128, and padding is
TensorFlow's "same", one more to the right and below where it is uneven.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIDE, KEPT = 224, 0.875  # pixels; the share of the shorter side that the crop keeps
BATCH_NORM_EPSILON = 1e-3
# Per group of blocks: how many, kernel, stride of the first, expansion, channels.
GROUPS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
GROUPS += ((1, 3, 1, 6, 320),)
STEM, HEAD, CLASSES = 32, 1280, 1000


class SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(input / stride) cells."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in images.shape[-2:]]
        high, wide = padding
        return super().forward(F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON)


class Block(nn.Module):
    """An inverted bottleneck; its input is added where the shape stays."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        self._expand_conv = SameConv2d(inside, wide, 1) if expansion > 1 else None
        self._bn0 = _norm(wide) if expansion > 1 else None
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv2d(wide, outside, 1)
        self._bn2 = _norm(outside)
        self.adds = stride == 1 and inside == outside

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        wide = features
        if self._expand_conv is not None and self._bn0 is not None:
            wide = F.relu6(self._bn0(self._expand_conv(wide)))
        wide = F.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow = self._bn2(self._project_conv(wide))
        return narrow + features if self.adds else narrow


class EfficientNetLite0(nn.Module):
    """The classifier: pixels (N, 3, 224, 224) of `prepare` -> logits (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, STEM, 3, 2), _norm(STEM)
        blocks, inside = [], STEM
        for number, kernel, stride, expansion, outside in GROUPS:
            for at in range(number):
                blocks.append(Block(inside, outside, kernel, stride if at == 0 else 1, expansion))
                inside = outside
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(inside, HEAD, 1), _norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        features = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            features = block(features)
        return self._fc(F.relu6(self._bn1(self._conv_head(features))).mean((2, 3)))


def prepare(image: Image.Image) -> Tensor:
    """Return the pixels (3, 224, 224) of an RGB image: the middle square of 7/8 of its shorter side, from about -1 to 1."""
    kept = min(image.size) * KEPT
    left, top = (image.width - kept) / 2, (image.height - kept) / 2
    box = (left, top, left + kept, top + kept)
    square = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    return (torch.from_numpy(np.asarray(square, dtype=np.float32)).permute(2, 0, 1) - 127) / 128


class LiteJudge:
    """The classifier as a judge (see recipes/evaluation/judges.py), which chooses among the classes that have a name.

    Args:
        file: the weights.
        names: of the classes by their number, 0 to 999.

    Raises:
        ValueError: the file holds other weights, or a number is none of a class.
    """

    def __init__(self, file: Path, names: Mapping[int, str]) -> None:
        if wrong := [number for number in names if not 0 <= number < CLASSES]:
            raise ValueError(
                f"Classes are numbered from 0 to {CLASSES - 1}; got {wrong[:5]}. Give ImageNet's numbers."
            )
        self.file, self.numbers, self.names = file, sorted(names), dict(names)
        self.model = EfficientNetLite0().eval()
        try:
            self.model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        except RuntimeError as error:
            raise ValueError(f"{file} holds other weights than EfficientNet-Lite0's: {str(error)[:300]}") from error

    def __repr__(self) -> str:
        digest = sha256(self.file.read_bytes()).hexdigest()
        return f"EfficientNet-Lite0 among {len(self.numbers)} classes, {self.file.name}, SHA-256 {digest}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the likeliest class of each image."""
        logits = self.model(torch.stack([prepare(image) for image in images]))
        chosen = logits[:, self.numbers].argmax(-1).tolist()
        return [self.names[self.numbers[place]] for place in chosen]
