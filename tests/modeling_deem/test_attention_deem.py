# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The feature synchronizer against a slow loop over its definition, and what its gate and its null slot promise."""

import math

import pytest
import torch
from deem_fixtures import tiny_config

from modeling_deem.attention_deem import DeemFeatureSynchronizer, DeemImageAttention
from modeling_deem.image_states_deem import DeemImageStates

G, N, L, QUERY, FEATURE, VALUE, OUTPUT, HEADS, POINTS, MAX_IMAGES = 2, 3, 4, 10, 6, 8, 5, 2, 3, 6
LEVEL_SIDES, BASE_SIDE = (8, 4), 5
NATIVE = [(8, 8), (4, 4)]
OTHER = [(5, 7), (3, 2)]  # height and width differ, neither is the configured side


def synchronizer(seed: int = 0, **changes) -> DeemFeatureSynchronizer:
    """A synchronizer whose tensors are all audible."""
    torch.manual_seed(seed)
    fields = {
        "query_size": QUERY,
        "feature_size": FEATURE,
        "value_size": VALUE,
        "output_size": OUTPUT,
        "level_sides": LEVEL_SIDES,
        "base_side": BASE_SIDE,
        "num_heads": HEADS,
        "num_points": POINTS,
        "max_images": MAX_IMAGES,
    }
    module = DeemFeatureSynchronizer(**(fields | changes))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def inputs(sides: list[tuple[int, int]], visible: str, seed: int = 0, images: int = N) -> tuple[torch.Tensor, ...]:
    """queries (G, L, QUERY), features (G, n, S, FEATURE), visibility, reference points (L, 2)."""
    generator = torch.Generator().manual_seed(seed)
    cells = sum(height * width for height, width in sides)
    queries = torch.randn(G, L, QUERY, generator=generator, requires_grad=True)
    features = torch.randn(G, images, cells, FEATURE, generator=generator, requires_grad=True)
    shape = {"2-D": (G, images), "3-D": (G, L, images)}[visible]
    mask = torch.rand(shape, generator=generator) < 0.6
    mask.view(-1, images)[0] = False  # one query, or group, that sees nothing
    mask.view(-1, images)[-1] = True  # and one that sees all
    return queries, features, mask, torch.rand(L, 2, generator=generator)


def bilinear(level: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Value (c,) of a map (height, width, c) at a point of the unit square; cell (i, j) has its center at
    ((j + 0.5) / width, (i + 0.5) / height), and outside the map there is zero."""
    height, width, _ = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column.item()), math.floor(row.item())
    value = level.new_zeros(level.shape[2])
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                value = value + (1 - (row - i).abs()) * (1 - (column - j).abs()) * level[i, j]
    return value


def slow(
    module: DeemFeatureSynchronizer,
    queries: torch.Tensor,
    features: torch.Tensor,
    sides: list[tuple[int, int]],
    visible: torch.Tensor,
    reference: torch.Tensor,
) -> torch.Tensor:
    """Section 4 of the architecture's description, step by step, for one query, head, image, level and point at a time."""
    groups, length, images, levels = len(queries), queries.shape[1], features.shape[1], len(sides)
    channels = VALUE // HEADS
    outputs = []
    for g in range(groups):
        values = [module.value_projection(features[g, j]).view(-1, HEADS, channels) for j in range(images)]
        for q in range(length):
            sees = (visible[g] if visible.dim() == 2 else visible[g, q]).tolist()
            # Step 1: how many visible images ago.
            rho = [sum(sees[j:]) if sees[j] else 0 for j in range(images)]
            # Steps 2 and 3: per image a query, offsets and logits.
            per_image = [
                module.query_projection(queries[g, q]) + module.image_positions[rho[j]] for j in range(images)
            ]
            offsets = [module.sampling_offsets(query).view(HEADS, POINTS, 2) for query in per_image]
            logits = [module.attention_weights(query).view(HEADS, levels, POINTS) for query in per_image]
            heads = []
            for h in range(HEADS):
                # Step 5: a softmax over all images, levels and points, and a null slot per image and level.
                flat = [logits[j][h] + (0.0 if sees[j] else -10000.0) for j in range(images)]
                null = queries.new_full((images * levels,), -math.log(images * levels))
                weights = torch.cat([torch.stack(flat).flatten(), null]).softmax(0)
                null_weight = weights[-images * levels :].sum()
                weights = weights[: -images * levels].view(images, levels, POINTS)
                # Steps 4 and 6: where to look, and what is there.
                total = null_weight * module.null_value.view(HEADS, channels)[h]
                for j in range(images):
                    start = 0
                    for level, (height, width) in enumerate(sides):
                        cells = values[j][start : start + height * width, h].view(height, width, channels)
                        start += height * width
                        scale = LEVEL_SIDES[level] / BASE_SIDE
                        for k in range(POINTS):
                            x = reference[q, 0] + offsets[j][h, k, 0] * scale / width
                            y = reference[q, 1] + offsets[j][h, k, 1] * scale / height
                            total = total + weights[j, level, k] * bilinear(cells, x, y)
                heads.append(total)
            outputs.append(module.output_projection(torch.cat(heads)))
    return torch.stack(outputs).view(groups, length, -1)


def fast(module, queries, features, sides, visible, reference) -> torch.Tensor:
    index = torch.arange(features.shape[0] * features.shape[1]).view(features.shape[:2])
    states = DeemImageStates(features=features.flatten(0, 1), sides=sides, visible=visible, index=index)
    return module(queries, states, reference)


@pytest.mark.parametrize("visible", ["2-D", "3-D"])
@pytest.mark.parametrize("sides", [NATIVE, OTHER], ids=["native", "other"])
def test_synchronizer_equals_a_slow_loop(sides: list[tuple[int, int]], visible: str) -> None:
    module = synchronizer()
    queries, features, mask, reference = inputs(sides, visible)
    weight = torch.randn(G, L, OUTPUT, generator=torch.Generator().manual_seed(1))
    wanted = [queries, features, *module.parameters()]
    results = []
    for function in (slow, fast):
        output = function(module, queries, features, sides, mask, reference)
        results.append([output, *torch.autograd.grad((output * weight).sum(), wanted)])
    names = ["output", "queries", "features", *(name for name, _ in module.named_parameters())]
    for name, one, other in zip(names, *results, strict=True):
        assert one.abs().max() > 1e-3, f"{name}: silent, nothing compared"
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_queries_with_reference_points_of_their_own() -> None:
    module = synchronizer()
    queries, features, mask, _ = inputs(NATIVE, "2-D")
    reference = torch.rand(G, L, 2)
    with torch.no_grad():
        together = fast(module, queries, features, NATIVE, mask, reference)
        for g in range(G):
            own = fast(module, queries[g : g + 1], features[g : g + 1], NATIVE, mask[g : g + 1], reference[g])
            torch.testing.assert_close(together[g : g + 1], own)


def test_no_image_equals_images_that_nobody_sees() -> None:
    module = synchronizer()
    queries, features, mask, reference = inputs(NATIVE, "2-D")
    with torch.no_grad():
        unseen = fast(module, queries, features, NATIVE, torch.zeros_like(mask), reference)
        none = fast(module, queries, features[:, :0], [], mask[:, :0], reference)
        expected = module.output_projection(module.null_value).expand(G, L, -1)
    torch.testing.assert_close(unseen, expected)
    torch.testing.assert_close(none, expected)


def test_unseen_images_change_nothing() -> None:
    module = synchronizer()
    queries, features, _, reference = inputs(NATIVE, "2-D")
    mask = torch.tensor([[True, False, True]] * G)
    changed = features.detach().clone()
    changed[:, 1] += 1.0
    with torch.no_grad():
        first = fast(module, queries, features, NATIVE, mask, reference)
        assert torch.equal(first, fast(module, queries, changed, NATIVE, mask, reference))
        fewer = fast(module, queries, features[:, ::2], NATIVE, mask[:, ::2], reference)
        torch.testing.assert_close(first, fewer)
        more = fast(module, queries, changed, NATIVE, torch.ones_like(mask), reference)
        assert not torch.allclose(first, more, atol=1e-3)


def test_images_are_told_apart_by_how_long_ago_they_were() -> None:
    module = synchronizer()
    queries, features, _, reference = inputs(NATIVE, "2-D")
    mask = torch.ones(G, N, dtype=torch.bool)
    with torch.no_grad():
        forward = fast(module, queries, features, NATIVE, mask, reference)
        backward = fast(module, queries, features.flip(1), NATIVE, mask, reference)
        assert not torch.allclose(forward, backward, atol=1e-3)
        module.image_positions.zero_()  # without positions the order of images means nothing
        forward = fast(module, queries, features, NATIVE, mask, reference)
        torch.testing.assert_close(forward, fast(module, queries, features.flip(1), NATIVE, mask, reference))


def test_too_many_images_and_odd_widths_are_refused() -> None:
    module = synchronizer()
    queries, features, mask, reference = inputs(NATIVE, "2-D", images=MAX_IMAGES)
    with pytest.raises(ValueError, match=f"{MAX_IMAGES} images.*holds {MAX_IMAGES - 1}"):
        fast(module, queries, features, NATIVE, mask, reference)
    most = [queries, features[:, 1:], NATIVE, mask[:, 1:], reference]
    assert fast(module, *most).isfinite().all()
    with pytest.raises(ValueError, match="9.*multiple.*2"):
        synchronizer(value_size=9)


def image_attention() -> tuple[DeemImageAttention, DeemImageStates, torch.Tensor]:
    torch.manual_seed(0)
    config = tiny_config()
    block = DeemImageAttention(config, 0)
    for name, parameter in block.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    sides = [(8, 8), (4, 4), (2, 2)]
    states = DeemImageStates(
        features=torch.randn(3, 84, config.feature_size),
        sides=sides,
        index=torch.tensor([[0, 1], [2, 0]]),
        visible=torch.tensor([[[k > 1, k > 3] for k in range(5)], [[k > 2, False] for k in range(5)]]),
    )
    return block, states, torch.randn(2, 5, config.text_config.hidden_size)


def test_gate_scales_the_residual() -> None:
    block, states, hidden_states = image_attention()
    with torch.no_grad():
        open_gate = block(hidden_states, states) / block.gate.tanh()
        block.gate.fill_(0.3)
        torch.testing.assert_close(block(hidden_states, states), math.tanh(0.3) * open_gate)
        block.gate.zero_()
        assert torch.equal(block(hidden_states, states), torch.zeros_like(hidden_states))


def test_kept_values_give_the_same_and_are_projected_once() -> None:
    block, states, hidden_states = image_attention()
    with torch.no_grad():
        expected = block(hidden_states, states)
        assert not states.kept_values
        states.kept_values, states.kept_tables = {}, {}
        torch.testing.assert_close(block(hidden_states, states), expected)
        assert set(states.kept_values) == {"0"}
        states.features = torch.full_like(states.features, float("nan"))  # not looked at again
        last = block(hidden_states[:, -1:], states.of_tokens(4, 1, keep=True))
    torch.testing.assert_close(last, expected[:, -1:])
