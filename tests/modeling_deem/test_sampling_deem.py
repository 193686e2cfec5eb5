# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Each fast way against the plain one: forward and all gradients, on random shapes."""

import pytest
import torch
import torch.nn.functional as F
from deem_fixtures import tiny_batch, tiny_draws, tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_deem import attention_deem, sampling_deem
from modeling_deem.attention_deem import DeemFeatureSynchronizer, affine_of
from modeling_deem.image_states_deem import DeemImageStates, normalize_features, own_features
from modeling_deem.sampling_deem import Bags, Levels, weight_inside, weighted_samples

LEVELS = Levels([(5, 7), (3, 2), (1, 1)], [2.0, 1.0, 0.5])


def bags(counts: list[int], points: int = 4) -> tuple[Bags, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bags of so many queries per map, their centers, offsets and weights in float64."""
    maps = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
    count, generator = len(maps), torch.Generator().manual_seed(0)
    centers = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    offsets = torch.randn(count, points, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, len(LEVELS.sides) * points, generator=generator, dtype=torch.float64)
    return Bags(maps, counts), centers, offsets, weights


@pytest.mark.parametrize("most", [1, 10**6], ids=["map by map", "at once"])
@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0, 1], [2, 2]])
def test_gradients_of_weighted_samples(counts: list[int], most: int, monkeypatch) -> None:
    monkeypatch.setattr(sampling_deem, "ENTRIES_AT_ONCE", most)
    of, centers, offsets, weights = bags(counts)
    maps = torch.randn(len(counts), LEVELS.num_cells, 3, dtype=torch.float64)
    wanted = [tensor.requires_grad_() for tensor in (maps, offsets, weights)]
    assert torch.autograd.gradcheck(
        lambda maps, offsets, weights: weighted_samples(maps, centers, offsets, weights, LEVELS, of), wanted
    )
    ones = weighted_samples(torch.ones_like(maps[..., :1]), centers, offsets, weights, LEVELS, of)
    torch.testing.assert_close(weight_inside(centers, offsets, weights, LEVELS), ones[:, 0])
    assert ones.min() < 0.9 * weights.sum(1).max()  # some lie outside


@pytest.mark.parametrize("counts", [[3, 0, 2, 0], [0, 0, 5], [4], [0, 0], [2, 9, 2, 0, 0, 1]])
@pytest.mark.parametrize("most", [1, 4, 100])
def test_chunks_hold_every_bag_once_with_its_map(counts: list[int], most: int) -> None:
    of, *_ = bags(counts)
    seen = []
    for read, here in of.chunks(most):
        assert here.stop - here.start <= max(most, max(counts))
        assert all(read.start <= number < read.stop for number in of.maps[here].tolist())
        seen += range(here.start, here.stop)
    assert seen == list(range(sum(counts)))


def test_a_step_of_nan_is_nan_and_no_place_outside_memory() -> None:
    of, centers, offsets, weights = bags([2, 2])
    offsets[0, 0, 0], offsets[1, 1, 1], offsets[2] = float("nan"), float("inf"), 1e30
    offsets.requires_grad_()
    maps = torch.randn(2, LEVELS.num_cells, 3, dtype=torch.float64, requires_grad=True)
    output = weighted_samples(maps, centers, offsets, weights, LEVELS, of)
    output.sum().backward()
    assert output[:2].isnan().all() and not output[2].any() and output[3].isfinite().all()


def random_case(seed: int, seen: str) -> tuple[DeemFeatureSynchronizer, tuple, dict[str, torch.Tensor]]:
    """A synchronizer, what it is given besides, and the tensors whose gradients count."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    groups, length, images, heads, points = number(1, 3), number(1, 5), number(1, 4), number(1, 3), number(1, 4)
    sides = [[(8, 8), (4, 4)], [(5, 7), (1, 1)], [(1, 1), (1, 1)], [(3, 2), (2, 3)]][number(0, 3)]
    module = DeemFeatureSynchronizer(10, 6, heads * number(1, 4), 5, (8, 4), 5, heads, points, max_images=6)
    norm = [nn.LayerNorm(6), LlamaRMSNorm(6)][number(0, 1)]
    for parameter in [*module.parameters(), *norm.parameters()]:
        nn.init.normal_(parameter, std=0.5)
    shape = (groups, images) if number(0, 1) else (groups, length, images)
    visible = {"random": torch.rand(shape) < 0.6, "none": torch.zeros(shape), "all": torch.ones(shape)}[seen].bool()
    count = images + number(0, 2)  # some features that no row looks at
    features = torch.randn(count, sum(h * w for h, w in sides), 6, requires_grad=True)
    queries = torch.randn(groups, length, 10, requires_grad=True)
    index = torch.stack([torch.randperm(count)[:images] for _ in range(groups)])
    states = DeemImageStates(features=normalize_features(features, 1e-6), sides=sides, visible=visible, index=index)
    named = {f"synchronizer.{name}": tensor for name, tensor in module.named_parameters()}
    named |= {f"norm.{name}": tensor for name, tensor in norm.named_parameters()}
    return module, (queries, states, torch.rand(length, 2), norm), named | {"features": features, "queries": queries}


@pytest.mark.parametrize("seen", ["random", "none", "all"])
@pytest.mark.parametrize("way", ["sampled first", "projected first"])
@pytest.mark.parametrize("seed", range(6))
def test_sparse_looks_are_plain_looks(seed: int, way: str, seen: str, monkeypatch) -> None:
    monkeypatch.setattr(DeemFeatureSynchronizer, "samples_first", lambda *given: way == "sampled first")
    module, (*given, norm), wanted = random_case(seed, seen)
    results = []
    for sparse in (False, True):
        monkeypatch.setattr(attention_deem, "can_sample_sparsely", lambda *given, sparse=sparse: sparse)
        output = module(*given, affine_of(norm))
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        gradients = torch.autograd.grad((output * weight).sum(), wanted.values(), allow_unused=True, retain_graph=True)
        results.append([output, *gradients])
    for name, one, other in zip(["output", *wanted], *results, strict=True):
        one, other = (torch.zeros(()) if part is None else part for part in (one, other))
        atol = 1e-5 * max(1.0, float(one.detach().abs().max()))
        torch.testing.assert_close(
            other.expand_as(one), one, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", [nn.LayerNorm, LlamaRMSNorm])
def test_a_norm_folds_into_the_projection(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, norm, features = DeemFeatureSynchronizer(10, 6, 8, 5, (2,), 5, 2, 3), kind(6), torch.randn(2, 4, 6) * 3 + 1
    for parameter in [*module.parameters(), *norm.parameters()]:
        nn.init.normal_(parameter)
    eps = norm.eps if kind is nn.LayerNorm else norm.variance_epsilon
    plain = F.linear(norm(features), module.value_projection.weight, module.value_projection.bias)
    folded = module.project_values(normalize_features(features, eps, center=kind is nn.LayerNorm), affine_of(norm))
    torch.testing.assert_close(folded.transpose(1, 2).flatten(2), plain, rtol=1e-4, atol=1e-5)


def awake_model() -> nn.Module:
    """A tiny model whose images are heard: gates and fusion convolutions are open."""
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        if name.endswith((".gate", "conv.weight")) and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "rows", [("bttit", "btt"), ("btitit", "bitbit")], ids=["no previous image", "previous images"]
)
def test_a_step_is_the_plain_step(rows: tuple[str, ...], monkeypatch) -> None:
    model, batch = awake_model(), tiny_batch(*rows)
    count = len(batch["pixel_values"])
    draws = {"consistency_draws": tiny_draws(count), "image_draws": tiny_draws(count, image=True)}
    results = []
    for sparse in (False, True):
        monkeypatch.setattr(attention_deem, "can_sample_sparsely", lambda *given, sparse=sparse: sparse)
        model.zero_grad()
        outputs = model(**batch, **draws)
        outputs.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": outputs.loss, "logits": outputs.logits, **found})
    assert results[0].keys() == results[1].keys()
    for name, one in results[0].items():
        scale = float(one.detach().abs().max())
        assert (results[1][name] - one).abs().max() <= 1e-4 * scale + 1e-7, name


def test_where_nobody_has_a_previous_image_it_is_as_if_one_were_out_of_sight() -> None:
    model, batch = awake_model().eval(), tiny_batch("bttit", "bti")
    decoder, draws = model.image_decoder, tiny_draws(2)
    features = model.get_image_features(batch["pixel_values"]).image_features
    unseen = own_features(features)
    unseen.visible = torch.zeros_like(unseen.visible)
    condition = torch.randn(2, model.config.num_image_tokens, decoder.config.condition_size)
    with torch.no_grad():
        given = (torch.randn_like(draws["noise"]), draws["timesteps"], condition)
        one, other = (decoder.denoise(*given, states) for states in (unseen, decoder.no_features(2)))
    torch.testing.assert_close(one, other)


def test_the_sparse_way_is_taken_where_it_is_worth_it() -> None:
    features = torch.zeros(1, 1344, 256)
    assert sampling_deem.can_sample_sparsely(features, 10**4)
    assert not sampling_deem.can_sample_sparsely(features, 192)  # one token that looks into one image
    assert not sampling_deem.can_sample_sparsely(features.bfloat16(), 10**4)
    assert not sampling_deem.can_sample_sparsely(features.to("meta"), 10**4)
    assert not sampling_deem.can_sample_sparsely(features[:, :100], 10**4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not sampling_deem.can_sample_sparsely(features, 10**4)
