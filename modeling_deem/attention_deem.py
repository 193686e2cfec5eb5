# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The feature synchronizer: tokens look into the feature pyramids of several images (deformable attention).

Released as "MMFS" (multi-image multi-scale feature synchronizer); used in the language model and at the UNet's skips.
Letters: G groups (sequences, or images to draw), L queries per group, n images per group, N images of the batch,
V levels, H heads, K points per level, S cells of all levels, E feature width, c value channels per head.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .image_states_deem import DeemImageStates


def parameter_of(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter that is used outside its module's forward, where accelerate's offloading has not fetched it yet."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return getattr(module, name)
    hook.pre_forward(module)
    parameter = getattr(module, name)
    hook.post_forward(module, None)
    return parameter


class DeemFeatureSynchronizer(nn.Module):
    """Deformable attention from queries to the feature pyramids of several images (spec section 4).

    Each query predicts, per head and image, K sampling offsets shared by all levels and one weight per (level, point).
    The softmax runs over all images, levels and points together, plus one null slot of logit 0 that reads the learned
    `null_value`; so a query that sees no image reads only the null value. How many images ago an image was seen enters
    through a learned table (nearest visible image = 1).

    Args:
        query_size: width of queries and of the relative-position table.
        feature_size: width E of the image features.
        value_size: width of the values; a multiple of `num_heads`.
        output_size: width of the output.
        level_sides: side that each level has at the pretraining resolution, fine to coarse; offsets count its cells.
        base_side: an offset of 1 moves 1/base_side of the image on a level of that side.
        max_images: size of the relative-position table; a query may see at most `max_images - 1` images.
        offset_range: initial offsets are uniform in [-offset_range, offset_range].
        train_null_value: the UNet side keeps its null value at a frozen zero.
    """

    def __init__(
        self,
        query_size: int,
        feature_size: int,
        value_size: int,
        output_size: int,
        level_sides: list[int] | tuple[int, ...],
        base_side: int,
        num_heads: int = 16,
        num_points: int = 8,
        max_images: int = 50,
        offset_range: float = 3.0,
        train_null_value: bool = True,
    ):
        super().__init__()
        if value_size % num_heads:
            raise ValueError(
                f"The feature synchronizer's value width ({value_size}) must be a multiple of its number of heads "
                f"({num_heads})."
            )
        self.level_sides, self.base_side = tuple(level_sides), base_side
        self.num_heads, self.num_points, self.max_images = num_heads, num_points, max_images
        self.offset_range, self.train_null_value = offset_range, train_null_value
        num_levels = len(self.level_sides)

        self.query_projection = nn.Linear(query_size, query_size)
        self.image_positions = nn.Parameter(torch.empty(max_images, query_size))
        self.sampling_offsets = nn.Linear(query_size, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(query_size, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(feature_size, value_size)
        self.null_value = nn.Parameter(torch.empty(value_size))
        self.output_projection = nn.Linear(value_size, output_size)

    def fixed_parts(self) -> list[nn.Parameter]:
        """What never trains."""
        return [] if self.train_null_value else [self.null_value]

    def project_values(self, features: torch.Tensor) -> torch.Tensor:
        """Values of all images: features (N, S, E) -> (N, H, c, S). Independent of the queries, hence cacheable."""
        weight, bias = (parameter_of(self.value_projection, name) for name in ("weight", "bias"))
        values = weight @ features.transpose(-1, -2) + bias[:, None]  # [N, H*c, S], maps without a copy
        return values.unflatten(-2, (self.num_heads, -1))

    def forward(
        self,
        queries: torch.Tensor,
        values: torch.Tensor,
        sides: list[tuple[int, int]],
        visible: torch.Tensor,
        reference_points: torch.Tensor,
        tables: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            queries: (G, L, query_size).
            values: (G, n, H, c, S), from `project_values`; S runs over the levels, each row by row.
            sides: (height, width) of each level in `values`.
            visible: bool (G, n), or (G, L, n) where it differs between queries; images in order of appearance.
            reference_points: (L, 2) or (G, L, 2), as (x, y) in [0, 1].
            tables: a list that the caller keeps between calls on the same images; empty at first, filled here.
        Returns: (G, L, output_size).
        """
        groups, num_images = values.shape[:2]
        length, heads, points, levels = queries.shape[1], self.num_heads, self.num_points, len(sides)
        if num_images >= self.max_images:
            raise ValueError(
                f"{num_images} images in one sequence, but the relative-position table holds {self.max_images - 1}. Use fewer "
                "images, or a model with a larger table (image_attention_max_images, fusion_max_images)."
            )
        if num_images == 0:  # nothing to look at: the null slot has all the weight
            return self.output_projection(self.null_value.expand(groups, length, -1))

        # How many visible images ago each image was seen: nearest 1, invisible 0.
        visible = visible[:, None] if visible.dim() == 2 else visible  # [G, L or 1, n]
        seen = visible.long()
        rank = seen * (seen.sum(-1, keepdim=True) + 1 - seen.cumsum(-1))

        offsets, logits = self.predict(queries, rank, num_images, tables)  # [G, L, n, *]
        offsets = offsets.view(groups, length, num_images, heads, points, 2)
        offsets = offsets.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # [G*n*H, L, K, 2]
        logits = logits.view(groups, length, num_images, heads, levels * points)

        # One softmax over images x levels x points and the null slot, whose logit is 0.
        logits = logits.masked_fill(~visible[..., None, None], float("-inf"))
        logits = logits.transpose(2, 3).flatten(3)  # [G, L, H, n*V*K]
        weights = F.pad(logits, (0, 1)).softmax(-1).to(values.dtype)
        null_weight = weights[..., -1:]  # [G, L, H, 1]
        weights = weights[..., :-1].view(groups, length, heads, num_images, levels, points)
        weights = weights.permute(4, 0, 3, 2, 1, 5).flatten(1, 3)  # [V, G*n*H, L, K]
        # grid_sample spans the image by [-1, 1].
        reference = (2 * reference_points - 1).view(-1, 1, 1, length, 1, 2)
        reference = reference.expand(groups, num_images, heads, -1, -1, -1).flatten(0, 2)  # [G*n*H, L, 1, 2]
        sampled, maps_of_levels = 0, values.flatten(0, 2).split([height * width for height, width in sides], dim=-1)
        for level, (height, width) in enumerate(sides):
            scale = 2 * self.level_sides[level] / self.base_side
            grid = reference + offsets * offsets.new_tensor([scale / width, scale / height])  # [G*n*H, L, K, 2]
            maps = maps_of_levels[level].unflatten(-1, (height, width))  # [G*n*H, c, h, w]
            samples = F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)  # [G*n*H, c, L, K]
            sampled = sampled + (samples * weights[level, :, None]).sum(-1)  # [G*n*H, c, L]

        sampled = sampled.view(groups, num_images, heads, -1, length).sum(1)  # [G, H, c, L]
        output = sampled.permute(0, 3, 1, 2) + null_weight * self.null_value.view(heads, -1)  # [G, L, H, c]
        return self.output_projection(output.flatten(2))

    def predict(
        self, queries: torch.Tensor, rank: torch.Tensor, num_images: int, tables: list[torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampling offsets (G, L, n, H*K*2) and attention logits (G, L, n, H*V*K) of each query and image, float32.

        Both are linear in (projected query + position of the image), so each part is computed once.

        Args:
            rank: int64 (G, L or 1, n), how many visible images ago each image was seen.
        """
        query = self.query_projection(queries)
        tables = [] if tables is None else tables
        if not tables:
            tables.extend(self.position_tables(num_images))
        offset_table, logit_table = tables
        offsets = self.sampling_offsets(query)[:, :, None] + offset_table[rank]
        logits = self.attention_weights(query)[:, :, None] + logit_table[rank]
        return offsets.float(), logits.float()

    def position_tables(self, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What each relative position adds to both predictions, (num_images + 1, outputs)."""
        positions = self.image_positions[: num_images + 1]
        predictions = (self.sampling_offsets, self.attention_weights)
        return tuple(F.linear(positions, parameter_of(prediction, "weight")) for prediction in predictions)


class DeemImageAttention(nn.Module):
    """Gated residual from language tokens to image features: `tanh(gate) * synchronizer(norm(h), norm(features))`.

    The gate starts at zero, so a new model computes exactly the plain language model. All queries look from the
    center of the image.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        text_config = config.text_config
        eps = getattr(text_config, "rms_norm_eps", None) or getattr(text_config, "layer_norm_eps", 1e-6)
        self.layer_key = str(layer_idx)
        self.gate = nn.Parameter(torch.zeros(1))
        self.query_norm = LlamaRMSNorm(text_config.hidden_size, eps=eps)
        self.feature_norm = LlamaRMSNorm(config.feature_size, eps=eps)
        self.synchronizer = DeemFeatureSynchronizer(
            query_size=text_config.hidden_size,
            feature_size=config.feature_size,
            value_size=config.feature_size,
            output_size=text_config.hidden_size,
            level_sides=config.image_attention_sides,
            base_side=config.image_attention_base_side,
            num_heads=config.image_attention_heads,
            num_points=config.image_attention_points,
            max_images=config.image_attention_max_images,
            offset_range=config.image_attention_offset_range,
        )

    def forward(self, hidden_states: torch.Tensor, states: DeemImageStates) -> torch.Tensor:
        """hidden_states (B, T, D) -> residual (B, T, D)."""
        values = states.get_values(
            self.layer_key, lambda features: self.synchronizer.project_values(self.feature_norm(features))
        )
        tables = states.get_tables(self.layer_key)
        center = hidden_states.new_full((hidden_states.shape[1], 2), 0.5, dtype=torch.float32)
        queries = self.query_norm(hidden_states)
        residual = self.synchronizer(queries, values, states.sides, states.visible, center, tables)
        return torch.tanh(self.gate) * residual
