# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Fusion of image features into the skips of a UNet (spec section 6).

Letters: G images to denoise, M images whose features are looked into, E feature width, c channels of a skip.
"""

from dataclasses import replace

import torch
from torch import nn

from .attention_deem import DeemFeatureSynchronizer, affine_of
from .image_states_deem import FUSION_EPS, DeemImageStates
from .vision_deem import resize_positions, sincos_positions_2d


class DeemFusionBlock(nn.Module):
    """Residual for one skip: its cells look into the feature pyramids; a zero convolution lets nothing through at first.

    Args:
        config: a `DeemImageDecoderConfig`.
        channels: channels of the skip.
        side: side of the skip at the denoiser's own sample size; one unit of offset is 1/side of the image.
    """

    def __init__(self, config, block_idx: int, channels: int, side: int):
        super().__init__()
        self.block_key, self.channels, self.side, self.table_side = str(block_idx), channels, side, config.latent_side
        self.query_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feature_norm = nn.LayerNorm(config.feature_size, eps=FUSION_EPS)
        self.synchronizer = DeemFeatureSynchronizer(
            query_size=channels,
            feature_size=config.feature_size,
            value_size=config.fusion_size,
            output_size=channels,
            level_sides=config.feature_sides,
            base_side=side,
            num_heads=config.fusion_heads,
            num_points=config.fusion_points,
            max_images=config.fusion_max_images,
            offset_range=config.fusion_offset_range,
            train_null_value=False,
        )
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)
        self.conv._init_std = 0.0
        self.register_buffer("positions", self.compute_positions(side), persistent=False)

    def compute_positions(self, side: int | None = None) -> torch.Tensor:
        """Sin-cos positions (side * side, c), resized from the table of the latent's side."""
        table = sincos_positions_2d(self.table_side, self.channels)
        return resize_positions(table, side or self.side).flatten(2)[0].T.contiguous()

    def forward(self, sample: torch.Tensor, states: DeemImageStates) -> torch.Tensor:
        """sample (G, c, s, s) -> residual (G, c, s, s)."""
        side = sample.shape[-1]
        positions = self.positions if side == self.side else self.compute_positions(side)
        queries = self.query_norm(sample.flatten(2).transpose(1, 2)) + positions.to(sample)  # [G, s*s, c]
        centers = (torch.arange(side, device=sample.device, dtype=torch.float32) + 0.5) / side
        reference = torch.stack([centers.repeat(side), centers.repeat_interleave(side)], dim=-1)  # [s*s, 2] as (x, y)

        residual = self.synchronizer(queries, states, reference, affine_of(self.feature_norm), self.block_key)
        return self.conv(residual.transpose(1, 2).unflatten(2, (side, side)))


class DeemFeatureFusion(nn.Module):
    """One fusion block for every skip of the UNet and one for the output of its mid block."""

    def __init__(self, config):
        super().__init__()
        widths = config.denoiser["block_out_channels"]
        layers = config.denoiser.get("layers_per_block", 2)
        layers = [layers] * len(widths) if isinstance(layers, int) else layers
        side, skips = config.latent_side, [(widths[0], config.latent_side)]
        for level, width in enumerate(widths):
            skips += [(width, side)] * layers[level]
            if level < len(widths) - 1:
                side //= 2
                skips.append((width, side))
        self.skip_blocks = nn.ModuleList(
            DeemFusionBlock(config, idx, channels, side) for idx, (channels, side) in enumerate(skips)
        )
        self.mid_block = DeemFusionBlock(config, len(skips), widths[-1], side)

    def forward(
        self, sample: torch.Tensor, skips: tuple[torch.Tensor, ...], states: DeemImageStates
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Mid-block output and skips, each with its residual added."""
        if states.features.dtype != sample.dtype:
            states = replace(states, features=states.features.to(sample.dtype))
        fused = tuple(skip + block(skip, states) for block, skip in zip(self.skip_blocks, skips, strict=True))
        return sample + self.mid_block(sample, states), fused
