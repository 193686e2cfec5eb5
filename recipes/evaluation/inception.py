# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The Inception network that FID is defined by, in plain torch: reads `pt_inception-2015-12-05-6726825d.pth`.

It is Inception v3 (Szegedy et al., 2015) as TensorFlow's release of 2015-12-05 has it: average pools leave the padding out,
the last block pools by the maximum, and there are 1008 classes. Weights have torchvision's names.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recipes.evaluation.predictions import digest

SIDE, WIDTH, CLASSES = 299, 2048, 1008
USUAL_DIGEST = "6726825d"  # the first digits of the usual file's SHA-256, also in its name


class _Convolution(nn.Module):
    """Convolution, normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(values)))


def _mean_pool(values: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 64, 1)
        self.branch5x5_1 = _Convolution(inputs, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(inputs, pooled, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(values))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(values)))
        return torch.cat([self.branch1x1(values), five, three, self.branch_pool(_mean_pool(values))], 1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = _Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(values)))
        return torch.cat([self.branch3x3(values), three, F.max_pool2d(values, 3, stride=2)], 1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        along, across = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Convolution(inputs, 192, 1)
        self.branch7x7_1 = _Convolution(inputs, width, 1)
        self.branch7x7_2 = _Convolution(width, width, **along)
        self.branch7x7_3 = _Convolution(width, 192, **across)
        self.branch7x7dbl_1 = _Convolution(inputs, width, 1)
        self.branch7x7dbl_2 = _Convolution(width, width, **across)
        self.branch7x7dbl_3 = _Convolution(width, width, **along)
        self.branch7x7dbl_4 = _Convolution(width, width, **across)
        self.branch7x7dbl_5 = _Convolution(width, 192, **along)
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(values)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(values)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(values), seven, twice, self.branch_pool(_mean_pool(values))], 1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = _Convolution(inputs, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_2(self.branch3x3_1(values))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(values))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([three, seven, F.max_pool2d(values, 3, stride=2)], 1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, pools_by_maximum: bool):
        super().__init__()
        self.pools_by_maximum = pools_by_maximum
        self.branch1x1 = _Convolution(inputs, 320, 1)
        self.branch3x3_1 = _Convolution(inputs, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        once, twice = self.branch3x3_1(values), self.branch3x3dbl_2(self.branch3x3dbl_1(values))
        pooled = F.max_pool2d(values, 3, stride=1, padding=1) if self.pools_by_maximum else _mean_pool(values)
        parts = [self.branch1x1(values), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class InceptionV3(nn.Module):
    """Images (N, 3, H, W) in 0..1 -> features (N, 2048) of the last pool, of which FID is made."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b, self.Mixed_6c = _BlockC(768, 128), _BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = _BlockC(768, 160), _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b, self.Mixed_7c = _BlockE(1280, False), _BlockE(2048, True)
        self.fc = nn.Linear(WIDTH, CLASSES)  # of the file; no part of FID

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False) * 2 - 1
        values = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(values)))
        values = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(values, 3, stride=2)))
        values = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(values, 3, stride=2))))
        values = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(values)))))
        values = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(values)))
        return values.mean((2, 3))


def load_inception(file: str | Path) -> tuple[InceptionV3, str]:
    """Return the network with the weights of a file, and the file's SHA-256.

    Raises:
        ValueError: there is no such file, or it holds other weights.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"No Inception weights at {file}: give pt_inception-2015-12-05-6726825d.pth of pytorch-fid.")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise errors of many kinds
        raise ValueError(
            f"{file} is no file of weights that torch reads ({type(error).__name__}: {error})."
        ) from error
    model = InceptionV3()
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items() if _counts(name)}
    given = weights if isinstance(weights, dict) else {}
    found = {name: tuple(value.shape) for name, value in given.items() if _counts(name) and torch.is_tensor(value)}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"{file} holds no weights of FID's Inception: {len(odd)} of {len(wanted)} differ, as {odd[0]}: "
            f"{found.get(odd[0])} instead of {wanted.get(odd[0])}. Give pt_inception-2015-12-05-6726825d.pth."
        )
    model.load_state_dict({name: given[name] for name in wanted}, strict=False)
    return model.eval().requires_grad_(False), digest(file)


def _counts(name: str) -> bool:
    """Whether a weight is used at inference; files differ in those that are not."""
    return not name.endswith("num_batches_tracked") and not name.startswith("AuxLogits.")
