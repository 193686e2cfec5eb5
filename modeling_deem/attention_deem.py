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

from .image_states_deem import DeemImageStates, Sights, image_ranks
from .sampling_deem import Levels, can_sample_sparsely, weight_inside, weighted_samples


def parameter_of(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter that is used outside its module's forward, where accelerate's offloading has not fetched it yet."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return getattr(module, name)
    hook.pre_forward(module)
    parameter = getattr(module, name)
    hook.post_forward(module, None)
    return parameter


def affine_of(norm: nn.Module) -> tuple[torch.Tensor, ...]:
    """Weight, and bias where there is one, of a norm whose input comes normalized without them."""
    names = ("weight", "bias") if getattr(norm, "bias", None) is not None else ("weight",)
    return tuple(parameter_of(norm, name) for name in names)


def norm_eps(text_config) -> float:
    """The epsilon of a language model's norms, which the norms of image attention share."""
    return getattr(text_config, "rms_norm_eps", None) or getattr(text_config, "layer_norm_eps", 1e-6)


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

    def value_weights(self, affine: tuple[torch.Tensor, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (H*c, E) and bias (H*c,) of the value projection, a norm's own weight and bias folded in."""
        weight, bias = (parameter_of(self.value_projection, name) for name in ("weight", "bias"))
        scale, *shift = (part.to(weight.dtype) for part in affine) if affine else (None,)
        bias = bias + weight @ shift[0] if shift else bias
        return (weight if scale is None else weight * scale), bias

    def project_values(self, features: torch.Tensor, affine: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        """Values of all images: features (N, S, E) -> (N, H, S, c). Independent of the queries, hence cacheable."""
        values = F.linear(features, *self.value_weights(affine))
        return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()

    def forward(
        self,
        queries: torch.Tensor,
        states: DeemImageStates,
        reference_points: torch.Tensor,
        affine: tuple[torch.Tensor, ...] = (),
        key: str | None = None,
    ) -> torch.Tensor:
        """
        Args:
            queries: (G, L, query_size).
            states: features of N images, and which of them each query sees.
            reference_points: (L, 2) or (G, L, 2), as (x, y) in [0, 1].
            affine: weight, and bias if any, that the features, normalized without, still lack (`affine_of`).
            key: under which the states keep values and position tables, if they keep any.
        Returns: (G, L, output_size).
        """
        num_images = states.visible.shape[-1]
        if num_images >= self.max_images:
            raise ValueError(
                f"{num_images} images in one sequence, but the relative-position table holds {self.max_images - 1}. Use fewer "
                "images, or a model with a larger table (image_attention_max_images, fusion_max_images)."
            )
        if num_images == 0 or not len(states.features):  # nothing to look at: the null slot has all the weight
            output = self.output_projection(self.null_value.expand(*queries.shape[:2], -1))
            return output + self.nothing_of(queries, states.features, affine) if num_images else output
        tables = self.position_tables(num_images, states.get_tables(key))
        num_samples = queries.shape[0] * queries.shape[1] * num_images * self.attention_weights.out_features
        look = self.look_sparsely if can_sample_sparsely(states.features, num_samples) else self.look
        return self.output_projection(look(queries, states, reference_points, affine, key, tables).to(queries.dtype))

    def nothing_of(
        self, queries: torch.Tensor, features: torch.Tensor, affine: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """The number 0 that gives what is not computed, where no image can be seen, the gradient 0 and not none: processes
        that share gradients (DDP, FSDP) must all have the same ones, and go the same way back."""
        parameters = (parameter for parameter in self.parameters() if parameter.requires_grad)
        unused = [queries, features, *affine, *parameters]
        return sum(part.reshape(-1)[:0].sum() for part in unused)

    def look(
        self,
        queries: torch.Tensor,
        states: DeemImageStates,
        reference_points: torch.Tensor,
        affine: tuple[torch.Tensor, ...],
        key: str | None,
        tables: list[torch.Tensor],
    ) -> torch.Tensor:
        """What the queries see, (G, L, H*c), every query with every image, on any device."""
        values = states.get_values(key, lambda features: self.project_values(features, affine))[states.row_index]
        groups, num_images = values.shape[:2]
        length, heads, points, levels = queries.shape[1], self.num_heads, self.num_points, len(states.sides)
        visible = states.visible
        visible = visible[:, None] if visible.dim() == 2 else visible  # [G, L or 1, n]

        offsets, logits = self.predict(self.query_projection(queries)[:, :, None], image_ranks(visible), tables)
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
        values = values.flatten(0, 2).transpose(1, 2)  # [G*n*H, c, S]
        sampled, maps_of_levels = 0, values.split([height * width for height, width in states.sides], dim=-1)
        for level, (height, width) in enumerate(states.sides):
            scale = 2 * self.level_sides[level] / self.base_side
            grid = reference + offsets * offsets.new_tensor([scale / width, scale / height])  # [G*n*H, L, K, 2]
            maps = maps_of_levels[level].unflatten(-1, (height, width))  # [G*n*H, c, h, w]
            samples = F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)  # [G*n*H, c, L, K]
            sampled = sampled + (samples * weights[level, :, None]).sum(-1)  # [G*n*H, c, L]

        sampled = sampled.view(groups, num_images, heads, -1, length).sum(1)  # [G, H, c, L]
        output = sampled.permute(0, 3, 1, 2) + null_weight * self.null_value.view(heads, -1)  # [G, L, H, c]
        return output.flatten(2)

    def look_sparsely(
        self,
        queries: torch.Tensor,
        states: DeemImageStates,
        reference_points: torch.Tensor,
        affine: tuple[torch.Tensor, ...],
        key: str | None,
        tables: list[torch.Tensor],
    ) -> torch.Tensor:
        """The same as `look`, of pairs of a query and an image that it sees alone (P of them), on a CPU."""
        (groups, length), heads = queries.shape[:2], self.num_heads
        sights = states.get_sights(length)
        query = self.query_projection(queries).flatten(0, 1)  # [G*L, query_size]
        offsets, logits = self.predict(query, sights.rank, tables, sights.query)
        offsets = offsets.unflatten(1, (heads, -1, 2))  # [P, H, K, 2]
        logits = logits.unflatten(1, (heads, -1))  # [P, H, V*K]
        weights, null_weight = share_out(logits, sights.query, groups * length)
        centers = reference_points.expand(groups, -1, -1).flatten(0, 1)[sights.query]  # [P, 2]

        levels = Levels(states.sides, [side / self.base_side for side in self.level_sides])
        places = tuple(part.to(states.features.dtype) for part in (centers, offsets, weights))
        if self.samples_first(len(offsets), states):
            sampled = self.sample_and_project(states.features, sights, places, levels, affine)
        else:
            values = states.get_values(key, lambda features: self.project_values(features, affine))
            sampled = self.sample(values, sights, places, levels)  # [P, H, c]
        output = null_weight[..., None] * self.null_value.view(heads, -1)  # [G*L, H, c]
        return output.to(sampled.dtype).index_add(0, sights.query, sampled).view(groups, length, -1)

    def samples_first(self, num_pairs: int, states: DeemImageStates) -> bool:
        """Whether fewer products are needed where features are sampled before they are projected: few queries, and
        nothing that is kept for more of them to come."""
        corners = num_pairs * self.attention_weights.out_features * 4
        return states.kept_values is None and 4 * corners < states.features[..., 0].numel() * len(self.null_value)

    def sample(
        self, maps: torch.Tensor, sights: Sights, places: tuple[torch.Tensor, ...], levels: Levels
    ) -> torch.Tensor:
        """Weighted samples (P, H, C) of maps (N, H or 1, S, C) at places: centers (P, 2), offsets (P, H, K, 2) and weights
        (P, H, V*K)."""
        centers, offsets, weights = places
        heads = weights.shape[1]
        order, bags = sights.get_bags(heads, maps.shape[1] != heads, len(maps))
        bag_by_bag = (centers.repeat_interleave(heads, 0), offsets.flatten(0, 1), weights.flatten(0, 1))
        given = (part.index_select(0, order) for part in bag_by_bag)
        sampled = weighted_samples(maps.flatten(0, 1), *given, levels, bags)
        return torch.empty_like(sampled).index_copy(0, order, sampled).view(len(weights), heads, maps.shape[-1])

    def sample_and_project(
        self,
        features: torch.Tensor,
        sights: Sights,
        places: tuple[torch.Tensor, ...],
        levels: Levels,
        affine: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """The same as `sample` of the projected values: the projection is linear, so that it may come last. Its bias counts
        as far as the samples lie inside of the image."""
        weight, bias = self.value_weights(affine)
        sampled = self.sample(features[:, None], sights, places, levels)  # [P, H, E]
        centers, offsets, weights = places
        heads = weights.shape[1]
        inside = weight_inside(
            centers.repeat_interleave(heads, 0), offsets.flatten(0, 1), weights.flatten(0, 1), levels
        )
        projected = torch.einsum("phe,hce->phc", sampled, weight.view(heads, -1, weight.shape[1]))
        return projected + inside.view(len(weights), heads, 1) * bias.view(heads, -1)

    def predict(
        self,
        query: torch.Tensor,
        rank: torch.Tensor,
        tables: list[torch.Tensor],
        pairs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampling offsets (..., H*K*2) and attention logits (..., H*V*K) of each query and image, float32.

        Both are linear in (projected query + position of the image), so each part is computed once.

        Args:
            query: (..., query_size), projected.
            rank: int64 (...), how many visible images ago each image was seen.
            pairs: int64 (P,), which queries (G*L, query_size) the ranks (P,) belong to.
        """
        predicted = []
        for prediction, table in zip((self.sampling_offsets, self.attention_weights), tables, strict=True):
            own = prediction(query)
            own = own if pairs is None else own.index_select(0, pairs)
            predicted.append((own + F.embedding(rank, table)).float())
        return tuple(predicted)

    def position_tables(self, num_images: int, kept: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What each relative position adds to both predictions, (num_images + 1, outputs).

        Args:
            kept: a list that the caller keeps between calls on the same images; empty at first, filled here.
        """
        kept = [] if kept is None else kept
        if not kept:
            positions = self.image_positions[: num_images + 1]
            for prediction in (self.sampling_offsets, self.attention_weights):
                kept.append(F.linear(positions, parameter_of(prediction, "weight")))
        return kept


def share_out(logits: torch.Tensor, query: torch.Tensor, num_queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax per query and head over all the images it sees and the null slot, whose logit is 0.

    Args:
        logits: (P, H, V*K), one entry per query and image that it sees.
        query: int64 (P,), the query of each.

    Returns:
        weights (P, H, V*K); null weights (num_queries, H).
    """
    highest = logits.detach().amax(-1)  # [P, H]
    top = highest.new_zeros(num_queries, highest.shape[1])
    top = top.scatter_reduce(0, query[:, None].expand_as(highest), highest, "amax")
    weights = (logits - top.index_select(0, query)[..., None]).exp()
    null = torch.exp(-top)
    scale = 1 / null.index_add(0, query, weights.sum(-1))
    return weights * scale.index_select(0, query)[..., None], null * scale


class DeemImageAttention(nn.Module):
    """Gated residual from language tokens to image features: `tanh(gate) * synchronizer(norm(h), norm(features))`.

    The gate starts at zero, so a new model computes exactly the plain language model. All queries look from the
    center of the image.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        text_config = config.text_config
        eps = norm_eps(text_config)
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
        center = hidden_states.new_full((hidden_states.shape[1], 2), 0.5, dtype=torch.float32)
        queries = self.query_norm(hidden_states)
        residual = self.synchronizer(queries, states, center, affine_of(self.feature_norm), self.layer_key)
        return torch.tanh(self.gate) * residual
