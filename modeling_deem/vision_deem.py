# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Pixels -> grid tokens and a four-level feature pyramid, from an encoder that AutoModel knows (spec section 2).

Letters: N images, E feature width, h/w input sides, g side of the token grid, V pyramid levels (fine to coarse).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MODEL_MAPPING, AutoModel
from transformers.models.vitdet.modeling_vitdet import VitDetLayerNorm
from transformers.utils import ModelOutput

# Encoders in stages, fine to coarse at strides 4, 8, 16 and 32, and what to ask them for besides hidden states.
STAGED_ENCODERS: dict[str, dict[str, bool]] = {
    "convnext": {},
    "convnextv2": {},
    "dinov3_convnext": {},
    "resnet": {},
    "swin": {"output_hidden_states_before_downsampling": True},
}
# Plain ViTs, and what to ask them for: position embeddings at any input size are not everybody's default.
PLAIN_ENCODERS: dict[str, dict[str, bool]] = {
    "clip_vision_model": {"interpolate_pos_encoding": True},
    "dinov2": {},
    "dinov2_with_registers": {},
    "dinov3_vit": {},
    "siglip2_vision_model": {},
    "siglip_vision_model": {"interpolate_pos_encoding": True},
}
NUM_LEVELS = 4

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
    if grid.is_meta:  # while a checkpoint is loaded: a shape is enough, and the bicubic rule in Python takes long
        return grid.new_empty(1, grid.shape[1], side, side)
    return F.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False).to(table.dtype)


def resize_region_masks(masks: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Region masks (N, 1, h, w) -> {0, 1} of `size`: every cell that the resized mask touches.

    `mode` "bilinear" is the released rule, under which a region smaller than a cell can vanish; "antialias" weighs all
    pixels of a cell, so that a region keeps at least one.
    """
    masks = F.interpolate(masks.float(), size=size, mode="bilinear", antialias=mode == "antialias")
    return (masks > 0).float()


def is_staged(vision_config) -> bool:
    """Whether an encoder gives stage maps itself; a plain ViT gives one map.

    Raises:
        ValueError: an encoder of another family.
    """
    kind = vision_config.model_type
    if kind not in STAGED_ENCODERS and kind not in PLAIN_ENCODERS:
        raise ValueError(
            f"Vision encoders of type {kind!r} are not supported. Supported: {', '.join(sorted(STAGED_ENCODERS))}, "
            f"and as plain ViTs {', '.join(sorted(PLAIN_ENCODERS))}."
        )
    return kind in STAGED_ENCODERS


def has_attention(model_class: type, name: str | None) -> bool:
    """Whether a class of models has an implementation of attention by that name ("sdpa", "flash_attention_2", ...)."""
    flags = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}
    return all(getattr(model_class, flag) for kind, flag in flags.items() if kind in (name or ""))


def stage_widths(vision_config) -> list[int]:
    """Channels of the four stage maps of an encoder in stages.

    Raises:
        ValueError: another number of stages.
    """
    widths = getattr(vision_config, "hidden_sizes", None)
    if vision_config.model_type == "swin":
        widths = [vision_config.embed_dim * 2**stage for stage in range(len(vision_config.depths))]
    if widths is None or len(widths) != NUM_LEVELS:
        raise ValueError(
            f"The vision encoder {vision_config.model_type!r} has stages of widths {widths}; DEEM needs {NUM_LEVELS}, at "
            "strides 4, 8, 16 and 32."
        )
    return list(widths)


def pyramid_sides(vision_config, image_size: int) -> list[int]:
    """Sides of the four pyramid levels, fine to coarse, for images of `image_size` pixels."""
    if is_staged(vision_config):
        return [image_size // stride for stride in (4, 8, 16, 32)]
    grid = image_size // vision_config.patch_size
    return [4 * grid, 2 * grid, grid, grid // 2]


class DeemSimplePyramid(nn.Module):
    """Four levels from the one map of a plain ViT, at 1/4, 1/2, 1 and 2 times its stride (ViTDet, Li et al. 2022).

    As there: two transposed convolutions, one, none, and max pooling. The convolutions that follow in ViTDet are the
    tower's `level_projections` (1x1) and, for its 3x3, the synchronizers, which sample between cells themselves.
    """

    def __init__(self, size: int):
        super().__init__()
        self.widths = [size // 4, size // 2, size, size]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(size, size // 2, kernel_size=2, stride=2),
                    VitDetLayerNorm(size // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(size // 2, size // 4, kernel_size=2, stride=2),
                ),
                nn.ConvTranspose2d(size, size // 2, kernel_size=2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, stride=2),
            ]
        )

    def forward(self, grid: torch.Tensor) -> list[torch.Tensor]:
        """The last map (N, W, g, g) -> levels (N, widths[i], side, side), sides 4g, 2g, g, g // 2."""
        return [level(grid) for level in self.levels]


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
        shape = F.interpolate(masks.float(), size=_MASK_SHAPE_SIDE, mode="bilinear", align_corners=False)
        tokens.append(self.shape_projection(shape.flatten(1).to(features[0].dtype)))
        return torch.stack(tokens, dim=1)


class DeemVisionTower(nn.Module):
    """Vision encoder with a projected feature pyramid.

    An encoder in stages gives the four maps itself; from the last map of a plain ViT `simple_pyramid` makes them. The
    third map and the pooled vector become the grid tokens; the projected maps with 2-D sin-cos positions are the
    image features that language model and denoiser look into. An encoder without pooled vector lends its first token
    (CLS) if it has tokens besides the patches, else the mean of the patches.
    """

    grid_level = 2

    def __init__(self, config):
        super().__init__()
        self.region_mask_resize = config.region_mask_resize
        size, vision_config = config.feature_size, config.vision_config
        self.simple_pyramid = None if is_staged(vision_config) else DeemSimplePyramid(vision_config.hidden_size)
        widths = stage_widths(vision_config) if self.simple_pyramid is None else self.simple_pyramid.widths
        if not has_attention(MODEL_MAPPING[type(vision_config)], vision_config._attn_implementation):
            vision_config._attn_implementation_internal = None  # asked of the whole model, and set where it applies
        self.encoder = AutoModel.from_config(vision_config)
        self.level_projections = nn.ModuleList(nn.Linear(width, size) for width in widths)
        self.pooled_projection = nn.Linear(widths[-1], size)
        self.position_projection = nn.Linear(size, size)
        self.position_norm = nn.LayerNorm(size, eps=1e-6)
        self.output_norm = nn.LayerNorm(size, eps=1e-6)
        self.region_tokens = DeemRegionTokens(size) if config.use_region_tokens else None
        self.position_grid_side = config.position_grid_side
        self.register_buffer("positions", self.compute_positions(), persistent=False)
        decoder = config.image_decoder_config
        reads_all = config.use_region_tokens or (decoder is not None and decoder.fuses_features)
        read = range(NUM_LEVELS) if reads_all else {self.grid_level, *config.image_attention_levels}
        self.unread_levels = sorted(set(range(NUM_LEVELS)) - set(read))

    def fixed_parts(self) -> list[nn.Module | nn.Parameter]:
        """What never trains: levels that nothing looks at, and the token for masked patches of a ViT's pretraining."""
        fixed = [self.level_projections[level] for level in self.unread_levels]
        if self.simple_pyramid is not None:
            fixed += [self.simple_pyramid.levels[level] for level in self.unread_levels]
        tokens = [getattr(module, "mask_token", None) for module in self.encoder.modules()]
        return fixed + [token for token in tokens if isinstance(token, nn.Parameter)]

    def compute_positions(self) -> torch.Tensor:
        """The sin-cos table, (grid side squared, E); `_init_weights` restores the buffer from it."""
        return sincos_positions_2d(self.position_grid_side, self.level_projections[0].out_features)

    def encode(self, pixel_values: torch.Tensor, **kwargs) -> tuple[list[torch.Tensor], torch.Tensor, ModelOutput]:
        """Pixels (N, 3, h, w) -> four maps (N, W_i, side, side), pooled vector (N, W), the encoder's own output."""
        kind = self.encoder.config.model_type
        if self.simple_pyramid is None:
            kwargs["output_hidden_states"] = True
            outputs = self.encoder(pixel_values, **STAGED_ENCODERS[kind], return_dict=True, **kwargs)
            maps = getattr(outputs, "reshaped_hidden_states", None) or outputs.hidden_states
            return maps[-NUM_LEVELS:], outputs.pooler_output.flatten(1), outputs

        patch = self.encoder.config.patch_size
        height, width = pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch
        if kind == "siglip2_vision_model":  # takes patches, each as (row, column, channel)
            pixel_values = pixel_values[..., : height * patch, : width * patch].unfold(2, patch, patch)
            pixel_values = pixel_values.unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
            kwargs["pixel_attention_mask"] = torch.ones_like(pixel_values[..., 0], dtype=torch.long)
            kwargs["spatial_shapes"] = torch.tensor([[height, width]] * len(pixel_values))
        outputs = self.encoder(pixel_values, **PLAIN_ENCODERS[kind], return_dict=True, **kwargs)
        states, count = outputs.last_hidden_state, height * width  # [N, CLS and registers + patches, W]
        grid = states[:, -count:]
        pooled = outputs.pooler_output
        if pooled is None:
            pooled = states[:, 0] if states.shape[1] > count else grid.mean(1)
        return self.simple_pyramid(grid.transpose(1, 2).unflatten(2, (height, width))), pooled, outputs

    @property
    def config(self):
        """The encoder's: what transformers looks at to see how a part of a model attends."""
        return self.encoder.config

    @property
    def _supports_sdpa(self) -> bool:
        return self.encoder._supports_sdpa

    def forward(
        self, pixel_values: torch.Tensor, region_masks: torch.Tensor | None = None, **kwargs
    ) -> DeemVisionOutput:
        """pixel_values (N, 3, h, w), region_masks (N, 1, h, w) in {0, 1} or None for whole images."""
        # 1. Four maps and the pooled vector, projected to one width.
        wants_states = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        stages, pooled, outputs = self.encode(pixel_values, **kwargs)
        maps = [
            projection(stage.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [N, E, side, side]
            for projection, stage in zip(self.level_projections, stages, strict=True)
        ]
        pooled = self.pooled_projection(pooled)[:, None]  # [N, 1, E]
        tokens = torch.cat([pooled, maps[self.grid_level].flatten(2).transpose(1, 2)], dim=1)  # [N, 1 + g*g, E]

        # 2. Positions on both; the pooled token has none.
        table = self.positions.to(tokens.dtype)
        image_features = tuple(level + resize_positions(table, level.shape[-1]) for level in maps)
        grid = maps[self.grid_level].shape[-2:]
        tokens = self.position_norm(self.position_projection(tokens))
        positions = resize_positions(table, grid[-1]).flatten(2).transpose(1, 2)  # [1, g*g, E]
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
