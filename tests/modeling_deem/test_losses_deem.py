# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The reductions of the three losses against loops over their definition."""

import pytest
import torch
from deem_fixtures import tiny_model

from modeling_deem.losses_deem import region_mean, supervised_mean, text_loss
from modeling_deem.vision_deem import resize_region_masks


def errors(count: int = 3, side: int = 4) -> torch.Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(0))


def test_text_loss_is_the_mean_over_shifted_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[3, -100, 4, 5, -100], [6, 1, -100, -100, 2]])
    picked = []
    for row in range(2):
        for column in range(4):  # a token predicts its successor; the first label has no predictor
            target = labels[row, column + 1]
            if target != -100:
                picked.append(-logits[row, column].log_softmax(-1)[target])
    assert len(picked) == 4
    torch.testing.assert_close(text_loss(logits, labels), torch.stack(picked).mean())
    torch.testing.assert_close(text_loss(logits, labels, 16), torch.stack(picked).sum() / 16)
    torch.testing.assert_close(text_loss(logits, labels, torch.tensor(16)), torch.stack(picked).sum() / 16)


def test_text_loss_without_targets_is_zero_with_zero_gradient() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = text_loss(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_text_loss_of_half_precision_is_float32() -> None:
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1, 2, 3]])
    loss = text_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, text_loss(logits.float(), labels))


def test_region_mean_averages_inside_each_region_then_over_images() -> None:
    values = errors()
    regions = torch.zeros(3, 1, 4, 4)
    regions[0, :, :2, :2], regions[1, :, 3, 3], regions[2] = 1, 1, 1
    expected = torch.stack([values[0, :, :2, :2].mean(), values[1, :, 3, 3].mean(), values[2].mean()]).mean()
    torch.testing.assert_close(region_mean(values, regions), expected)
    outside = values + 100 * (1 - regions)
    torch.testing.assert_close(region_mean(outside, regions), expected)
    assert region_mean(values + 100 * regions, regions) > expected + 99
    assert region_mean(values, None) == region_mean(values, torch.ones(3, 1, 4, 4)) == values.mean()


def test_vanished_region_counts_as_zero() -> None:
    values = errors(2)
    regions = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    torch.testing.assert_close(region_mean(values, regions), values[1].mean() / 2)


def test_supervised_mean() -> None:
    values = errors()
    supervised = torch.tensor([True, False, True])
    per_image = torch.stack([value.mean() for value in values])
    torch.testing.assert_close(supervised_mean(values, supervised), (per_image[0] + per_image[2]) / 2)
    torch.testing.assert_close(supervised_mean(values, supervised, "all"), (per_image[0] + per_image[2]) / 3)
    for reduction in ("supervised", "all"):
        values.requires_grad_()
        nothing = supervised_mean(values, torch.zeros(3, dtype=torch.bool), reduction)
        nothing.backward()
        assert nothing == 0 and not values.grad.any()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (37, 53)])
def test_antialiased_regions_keep_at_least_one_cell(size: tuple[int, int]) -> None:
    pixels = [(0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3), (3, 7), (8, 8), (15, 16), (31, 32)]
    masks = torch.zeros(len(pixels), 1, *size)
    for mask, (row, column) in zip(masks, pixels, strict=True):
        mask[0, row, column] = 1
    vanished = 0
    for side in (64, 16, 8, 7, 4, 2, 1):
        kept = resize_region_masks(masks, (side, side), "antialias")
        assert set(kept.unique().tolist()) <= {0.0, 1.0}
        assert kept.flatten(1).sum(1).min() >= 1, side
        vanished += (resize_region_masks(masks, (side, side)).flatten(1).sum(1) == 0).sum()
    assert vanished > 0  # what the released rule loses


def test_resized_regions_by_hand() -> None:
    masks = torch.zeros(1, 1, 8, 8)
    masks[..., 2:4, 2:6] = 1
    expected = torch.zeros(4, 4)
    expected[1, 1:3] = 1  # cells of 2x2 pixels; the bilinear sampling point is the middle of the cell
    for mode in ("bilinear", "antialias"):
        got = resize_region_masks(masks, (4, 4), mode)[0, 0]
        assert got[1, 1:3].tolist() == [1, 1]
        if mode == "bilinear":
            assert torch.equal(got, expected)
    assert torch.equal(resize_region_masks(torch.ones(2, 1, 8, 8), (3, 3)), torch.ones(2, 1, 3, 3))
    assert not resize_region_masks(torch.zeros(2, 1, 8, 8), (3, 3), "antialias").any()


def test_timesteps_of_the_consistency_loss_are_a_squeezed_uniform_draw() -> None:
    decoder = tiny_model().image_decoder
    device = torch.device("cpu")
    drawn = decoder.draw_timesteps(200_000, 200, 799, device, torch.Generator().manual_seed(0))
    assert (drawn.min(), drawn.max()) == (200, 799)
    counts = torch.bincount(drawn)[200:]
    # t' = round(500 + 0.6 (t - 500)): 1000 timesteps onto 600, one or two each.
    assert counts.min() > 0 and counts.max() < 600 and abs(drawn.double().mean() - 499.5) < 2
    everything = decoder.draw_timesteps(100_000, 0, 999, device, torch.Generator().manual_seed(0))
    raw = torch.randint(1000, (100_000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(everything, raw)
    raw = torch.randint(1000, (200_000,), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(drawn, (500 + 0.6 * (raw - 500)).round().long())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_error_map_measures_against_the_schedulers_target(kind: str) -> None:
    model = tiny_model()
    decoder = model.image_decoder
    decoder.scheduler.register_to_config(prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps, condition = torch.tensor([100, 900]), torch.randn(2, 4, 32, generator=generator)
    features = tuple(torch.randn(2, 32, side, side, generator=generator) for side in (16, 8, 4, 2))
    with torch.no_grad():
        states = decoder.consistency_states(torch.zeros(2, 4, 24), features)
        got = decoder.error_map(latents, condition, states, timesteps, noise)
        share = decoder.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        target = noise if kind == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * latents
        expected = (decoder.denoise(noisy, timesteps, condition, states) - target).square()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
