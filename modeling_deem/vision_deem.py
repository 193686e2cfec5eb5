# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Pixels -> grid tokens and a four-level feature pyramid, from an encoder that AutoModel knows (spec section 2).

Letters: N images, E feature width, h/w input sides, g side of the token grid, V pyramid levels (fine to coarse).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel
from transformers.utils import ModelOutput

# Side that a mask is reduced to before its shape becomes a token (spec section 2, step 7).
_MASK_SHAPE_SIDE = 112


def sincos_positions_1d(length: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Sin-cos positions 0..length-1, (length, size) float32: first half sines, second half cosines, base 10000."""
    frequencies = 10000 ** -(torch.arange(size // 2, dtype=torch.float64, device=device) / (size / 2))
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def sincos_positions_2d(side: int, size: int) -> torch.Tensor:
    """Sin-cos positions of a square grid, (side * side, size) float32, row by row: first half from y, second from x."""
    line = sincos_positions_1d(side, size // 2)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([rows, columns], dim=-1)


def resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """Grid positions (s*s, E) -> (1, E, side, side), bicubic where the sides differ."""
    old = round(table.shape[0] ** 0.5)
    grid = table.view(1, old, old, -1).permute(0, 3, 1, 2)
    if old == side:
        return grid
    return F.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False).to(table.dtype)


def resize_region_masks(masks: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Region masks (N, 1, h, w) -> {0, 1} of `size`: every cell that the resized mask touches.

    `mode` "bilinear" is the released rule, under which a region smaller than a cell can vanish; "antialias" weighs all
    pixels of a cell, so that a region keeps at least one.
    """
    masks = F.interpolate(
        masks.float(), size=size, mode="bilinear", align_corners=False, antialias=mode == "antialias"
    )
    return (masks > 0).float()


@dataclass
class DeemVisionOutput(ModelOutput):
    """
    Attributes:
        grid_tokens: (N, 1 + g*g, E), or five region tokens more in front; what the perceiver reads.
        image_features: V maps (N, E, side, side), fine to coarse, with positions, not masked by regions.
        last_hidden_state, hidden_states, attentions: the encoder's own, the latter two if asked for.
    """

    grid_tokens: torch.Tensor | None = None
    image_features: tuple[torch.Tensor, ...] | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class DeemRegionTokens(nn.Module):
    """Five tokens of a region: the mean feature inside it on each pyramid level, and the shape of its mask."""

    def __init__(self, feature_size: int):
        super().__init__()
        self.level_projection = nn.Linear(feature_size, feature_size)  # one for all levels, as released
        self.shape_projection = nn.Sequential(
            nn.Linear(_MASK_SHAPE_SIDE**2, feature_size),
            nn.ReLU(),
            nn.Linear(feature_size, feature_size),
            nn.ReLU(),
            nn.Linear(feature_size, feature_size),
        )

    def forward(self, features: list[torch.Tensor], masks: torch.Tensor, mode: str) -> torch.Tensor:
        """V maps (N, E, side, side) and masks (N, 1, h, w) -> (N, V + 1, E)."""
        tokens = []
        for level in features:
            region = resize_region_masks(masks, level.shape[-2:], mode).to(level.dtype)
            mean = (level * region).sum((2, 3)) / (region.sum((2, 3)) + 1e-8)  # [N, E]
            tokens.append(self.level_projection(mean))
        size = (_MASK_SHAPE_SIDE, _MASK_SHAPE_SIDE)
        shape = F.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False)
        tokens.append(self.shape_projection(shape.flatten(1).to(features[0].dtype)))
        return torch.stack(tokens, dim=1)


class DeemVisionTower(nn.Module):
    """Vision encoder with a projected feature pyramid.

    The encoder must give four stage maps at strides 4, 8, 16 and 32 and a pooled vector (ConvNeXt and its kin). The
    third map and the pooled vector become the grid tokens; the projected maps with 2-D sin-cos positions are the
    image features that language model and denoiser look into.
    """

    num_levels = 4
    grid_level = 2

    def __init__(self, config):
        super().__init__()
        self.region_mask_resize = config.region_mask_resize
        size = config.feature_size
        self.encoder = AutoModel.from_config(config.vision_config)
        widths = getattr(config.vision_config, "hidden_sizes", None)
        if widths is None or len(widths) != self.num_levels:
            raise ValueError(
                f"The vision encoder {config.vision_config.model_type!r} does not give the {self.num_levels} stage "
                f"maps of a hierarchical encoder (hidden_sizes is {widths}). Supported: convnext, convnextv2."
            )
        self.level_projections = nn.ModuleList(nn.Linear(width, size) for width in widths)
        self.pooled_projection = nn.Linear(widths[-1], size)
        self.position_projection = nn.Linear(size, size)
        self.position_norm = nn.LayerNorm(size, eps=1e-6)
        self.output_norm = nn.LayerNorm(size, eps=1e-6)
        self.region_tokens = DeemRegionTokens(size) if config.use_region_tokens else None
        self.position_grid_side = config.position_grid_side
        self.register_buffer("positions", self.compute_positions(), persistent=False)

    def compute_positions(self) -> torch.Tensor:
        """The sin-cos table, (grid side squared, E); `_init_weights` restores the buffer from it."""
        return sincos_positions_2d(self.position_grid_side, self.level_projections[0].out_features)

    def forward(
        self, pixel_values: torch.Tensor, region_masks: torch.Tensor | None = None, **kwargs
    ) -> DeemVisionOutput:
        """pixel_values (N, 3, h, w), region_masks (N, 1, h, w) in {0, 1} or None for whole images."""
        wants_states = kwargs.pop("output_hidden_states", None)
        outputs = self.encoder(pixel_values, output_hidden_states=True, **kwargs)

        # 1. Stage maps and the pooled vector, projected to one width.
        stages = outputs.hidden_states[-self.num_levels :]
        maps = [
            projection(stage.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [N, E, side, side]
            for projection, stage in zip(self.level_projections, stages, strict=True)
        ]
        pooled = self.pooled_projection(outputs.pooler_output.flatten(1))[:, None]  # [N, 1, E]
        tokens = torch.cat([pooled, maps[self.grid_level].flatten(2).transpose(1, 2)], dim=1)  # [N, 1 + g*g, E]

        # 2. Positions on both; the pooled token has none.
        image_features = tuple(level + resize_positions(self.positions, level.shape[-1]) for level in maps)
        grid = maps[self.grid_level].shape[-2:]
        tokens = self.position_norm(self.position_projection(tokens))
        positions = resize_positions(self.positions, grid[-1]).flatten(2).transpose(1, 2)  # [1, g*g, E]
        tokens = tokens + F.pad(positions, (0, 0, 1, 0))

        # 3. Outside its region an image has no grid tokens.
        if region_masks is not None:
            inside = resize_region_masks(region_masks, grid, self.region_mask_resize).flatten(2).transpose(1, 2)
            tokens = tokens * F.pad(inside, (0, 0, 1, 0), value=1.0).to(tokens.dtype)
        tokens = self.output_norm(tokens)
        if self.region_tokens is not None:
            masks = region_masks if region_masks is not None else torch.ones_like(pixel_values[:, :1])
            tokens = torch.cat([self.region_tokens(image_features, masks, self.region_mask_resize), tokens], dim=1)

        return DeemVisionOutput(
            grid_tokens=tokens,
            image_features=image_features,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states if wants_states else None,
            attentions=getattr(outputs, "attentions", None),
        )


__all__ = [
    "DeemRegionTokens",
    "DeemVisionOutput",
    "DeemVisionTower",
    "resize_positions",
    "resize_region_masks",
    "sincos_positions_1d",
    "sincos_positions_2d",
]
