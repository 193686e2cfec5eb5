# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Weighted bilinear samples of many maps as one sparse product: what the feature synchronizer reads on a CPU.

A bag is one query and head that looks into one map: the weighted sum of its samples there. Nothing with a channel axis
is kept but maps and sums, and backward computes the samples' corners anew. Letters: M bags, R maps, V levels, K points
per level, S cells of all levels, C channels.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ENTRIES_AT_ONCE = 2**18  # corners that a core takes at once; fewer do not pay for starting, more leave its cache
LEAST_FEATURES, LEAST_SAMPLES = 2**17, 2**11  # below, plain sampling starts faster (docs/performance.md)


@dataclass
class Levels:
    """The levels of a map, one behind the other, each row by row.

    Attributes:
        sides: (height, width) of each level.
        scales: cells of each level that an offset of 1 moves.
    """

    sides: list[tuple[int, int]]
    scales: list[float]

    @property
    def num_cells(self) -> int:
        return sum(height * width for height, width in self.sides)

    def columns(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Widths, heights, scales as `like`, and first cells as int32; each (V, 1)."""
        first, firsts = 0, []
        for height, width in self.sides:
            firsts.append(first)
            first += height * width
        sizes = [[width for _, width in self.sides], [height for height, _ in self.sides], self.scales]
        columns = [like.new_tensor(values).unsqueeze(1) for values in sizes]
        return (*columns, torch.tensor(firsts, dtype=torch.int32, device=like.device).unsqueeze(1))


@dataclass
class Bags:
    """Which map each bag looks into, bags in the order of maps.

    Attributes:
        maps: int32 (M,), the map of each bag.
        counts: bags of each map.
    """

    maps: torch.Tensor
    counts: list[int]

    def chunks(self, most: int) -> Iterator[tuple[slice, slice]]:
        """Maps and their bags in turns of at most `most` bags, but of at least one map; maps without bags are left out
        where they are many."""
        first_map = first_bag = last_bag = 0
        for number, count in enumerate([*self.counts, most + 1]):
            if last_bag > first_bag and last_bag - first_bag + count > most:
                yield slice(first_map, number), slice(first_bag, last_bag)
                first_map, first_bag = number, last_bag
            elif last_bag == first_bag:
                first_map = number
            last_bag += count


class _Axis:
    """One coordinate of each sample: its two cells (int32), what each of them counts (0 outside), and the derivatives of
    this by the coordinate."""

    def __init__(self, center: torch.Tensor, offset: torch.Tensor, size: torch.Tensor, scale: torch.Tensor):
        """center (m,) in [0, 1], offset (m, K), size and scale (V, 1) -> all (m, V, K)."""
        place = torch.addcmul((center[:, None, None] * size).sub_(0.5), offset[:, None], scale)  # in cells
        low = place.floor()
        share = place.sub_(low)
        last = size - 1
        self.slopes = ((low >= 0) & (low <= last)).to(low.dtype), ((low >= -1) & (low < last)).to(low.dtype)
        self.shares = (1 - share) * self.slopes[0], share * self.slopes[1]
        low.nan_to_num_()  # a step of NaN is a NaN, not a place outside memory
        self.cells = low.clamp(min=0).minimum(last).int(), low.add_(1).clamp_(min=0).minimum(last).int()


class _Corners:
    """The four cells around each sample of some bags, (m, 4, V*K) each.

    Attributes:
        rows: int32, the row of each corner in the bags' maps, whose cells stand one behind the other.
        weights: what it counts.
    """

    def __init__(
        self,
        centers: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor,
        maps: torch.Tensor,
        levels: Levels,
    ):
        """centers (m, 2), offsets (m, K, 2), weights (m, V*K), maps int32 (m,)."""
        widths, heights, self.scales, firsts = levels.columns(weights)
        self.x = _Axis(centers[:, 0], offsets[..., 0], widths, self.scales)
        self.y = _Axis(centers[:, 1], offsets[..., 1], heights, self.scales)
        self.samples = weights.view(self.x.shares[0].shape)  # [m, V, K]
        firsts = firsts + (maps * levels.num_cells)[:, None, None]
        shape = (len(weights), 4, *self.samples.shape[1:])
        self.rows, self.weights = firsts.new_empty(shape), weights.new_empty(shape)
        for a in range(2):
            row = torch.addcmul(firsts, self.y.cells[a], widths.int())
            share = self.samples * self.y.shares[a]
            for b in range(2):
                torch.add(row, self.x.cells[b], out=self.rows[:, 2 * a + b])
                torch.mul(share, self.x.shares[b], out=self.weights[:, 2 * a + b])

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of the corners' weights (m, 4, V, K) -> of the offsets (m, K, 2) and of the weights (m, V*K)."""
        corner, x, y = gradient.unbind(1), self.x, self.y
        upper, lower = (corner[i] * x.shares[0] + corner[i + 1] * x.shares[1] for i in (0, 2))
        left, right = (corner[i] * y.shares[0] + corner[i + 2] * y.shares[1] for i in (0, 1))
        along_x = (right * x.slopes[1]).sub_(left.mul_(x.slopes[0]))
        along_y = (lower * y.slopes[1]).sub_(upper * y.slopes[0])
        moved = self.samples * self.scales
        offsets = torch.stack([(along_x * moved).sum(1), (along_y * moved).sum(1)], dim=-1)
        return offsets, (upper * y.shares[0]).addcmul_(lower, y.shares[1]).flatten(1)


class _WeightedSamples(torch.autograd.Function):
    """See `weighted_samples`."""

    @staticmethod
    def forward(ctx, maps, centers, offsets, weights, levels, bags):
        ctx.save_for_backward(maps, centers, offsets, weights)
        ctx.levels, ctx.bags = levels, bags
        output = maps.new_empty(len(weights), maps.shape[-1])
        for read, here, corners in _chunks(centers, offsets, weights, levels, bags):
            table, weights_here = maps[read].flatten(0, 1), corners.weights.flatten()
            starts = _starts(corners.rows)[:-1]
            output[here] = F.embedding_bag(
                corners.rows.flatten(), table, starts, mode="sum", per_sample_weights=weights_here
            )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        maps, centers, offsets, weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        wants_maps, _, *wants_places = ctx.needs_input_grad[:4]
        of_offsets, of_weights = torch.empty_like(offsets), torch.empty_like(weights)
        of_maps, seen = [], 0  # gradients of the maps so far, and how many these are
        for read, here, corners in _chunks(centers, offsets, weights, ctx.levels, ctx.bags):
            if any(wants_places):
                products = _products(corners.rows, gradient[here], maps[read].flatten(0, 1))
                of_offsets[here], of_weights[here] = corners.backward(products)
            if wants_maps:
                shape = maps[read].shape
                of_maps += [torch.zeros_like(maps[seen : read.start]), _transposed(corners, gradient[here], shape)]
                seen = read.stop
        if wants_maps:
            whole = [part for part in (*of_maps, torch.zeros_like(maps[seen:])) if len(part)]
            of_maps = whole[0] if len(whole) == 1 else torch.cat(whole)  # filled once: fresh memory is what costs
        return of_maps if wants_maps else None, None, of_offsets, of_weights, None, None


def _chunks(
    centers: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, levels: Levels, bags: Bags
) -> Iterator[tuple[slice, slice, _Corners]]:
    """Maps, bags, and the corners of these bags, in turns that stay in cache."""
    most = ENTRIES_AT_ONCE * torch.get_num_threads()
    for read, here in bags.chunks(max(most // (4 * weights.shape[1]), 1)):
        given = (centers[here], offsets[here], weights[here], bags.maps[here] - read.start)
        yield read, here, _Corners(*given, levels)


def _starts(rows: torch.Tensor) -> torch.Tensor:
    """Where each bag's rows (m, 4, V, K) begin among all, and where the last one ends: int32 (m + 1,)."""
    return torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device) * rows[0].numel()


def _products(rows: torch.Tensor, gradient: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Products of each bag's gradient (m, C) with each of its rows (m, 4, V, K) of the table: a sampled product."""
    if len(table) <= rows[0].numel():  # fewer cells than corners
        return (gradient @ table.T).gather(1, rows.flatten(1).long()).view(rows.shape)
    starts = _starts(rows)
    zeros = gradient.new_zeros(rows.numel())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        pattern = torch.sparse_csr_tensor(
            starts, rows.flatten(), zeros, (len(rows), len(table)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(pattern, gradient, table.T, beta=0.0).values().view(rows.shape)


def _transposed(corners: _Corners, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The gradient of the maps read, (r, S, C): each cell is the bag of all that looked at it."""
    rows, order = corners.rows.flatten().sort(stable=True)
    cells = torch.bincount(rows, minlength=shape[0] * shape[1])
    starts = cells.cumsum(0).sub_(cells).int()
    bag = (order // corners.rows[0].numel()).int()
    weights = corners.weights.flatten().index_select(0, order)
    return F.embedding_bag(bag, gradient, starts, mode="sum", per_sample_weights=weights).view(shape)


def weighted_samples(
    maps: torch.Tensor,
    centers: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor,
    levels: Levels,
    bags: Bags,
) -> torch.Tensor:
    """Sum of weights times bilinear samples, (M, C), on a CPU in float32 or float64; zero outside the map.

    Args:
        maps: (R, S, C), contiguous.
        centers: (M, 2), where each bag looks from, as (x, y) in [0, 1]; without gradient.
        offsets: (M, K, 2), shared by all levels.
        weights: (M, V*K).
    """
    if not len(weights):
        return maps.new_zeros(0, maps.shape[-1])
    return _WeightedSamples.apply(maps, centers, offsets.contiguous(), weights.contiguous(), levels, bags)


def weight_inside(centers: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, levels: Levels) -> torch.Tensor:
    """What `weighted_samples` gives of a map of ones, (M,): the part of the weights that falls inside."""
    widths, heights, scales, _ = levels.columns(weights)
    inside = weights.unflatten(1, (len(levels.sides), -1))
    for axis, sizes in enumerate((widths, heights)):
        place = centers[:, axis, None, None] * sizes - 0.5 + offsets[:, None, :, axis] * scales
        inside = inside * torch.minimum(place + 1, sizes - place).clamp(0, 1)
    return inside.sum((1, 2))


def can_sample_sparsely(features: torch.Tensor, num_samples: int) -> bool:
    """Whether `weighted_samples` takes features of this kind, and is worth its start-up for so many bilinear samples.

    The plain way is taken on other devices, in half precision, and where graphs are captured.
    """
    kind = features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64)
    plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return kind and not plain and features.numel() >= LEAST_FEATURES and num_samples >= LEAST_SAMPLES
