# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which image tokens are used: how much worse an image is redrawn without each, and how much they differ.

Letters: N images, Q tokens of each, P their width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_deem import DeemForConditionalGeneration
from modeling_deem.image_error_deem import evaluating
from recipes.diagnosis.images import Images
from recipes.evaluation.scoring.intervals import mean_interval


def token_effects(
    model: DeemForConditionalGeneration, images: Images, draws_of: Mapping[str, Any], batch_size: int = 32
) -> dict[str, Any]:
    """Return how much worse images are redrawn without each token.

    Args:
        draws_of: timesteps, num_noise and seed, as in `image_error`.

    Returns:
        `effects`, `low`, `high`: (Q,), mean over images of the growth of the error with its 95 % interval; `error`, with all
        tokens; `used`, how many tokens have an interval above 0; `effective`, the exponential of the entropy of the
        effects above 0: Q where all count alike, 1 where one does all.
    """
    found = model.image_error(*images.given(), **draws_of, per_token=True, batch_size=batch_size)
    effects = found.token_errors.double().cpu()
    intervals = [mean_interval(column.numpy(), bounds=(-float("inf"), float("inf"))) for column in effects.T]
    return {
        "error": float(found.image_errors.mean()),
        "effects": [one.value for one in intervals],
        "low": [one.low for one in intervals],
        "high": [one.high for one in intervals],
        "used": sum(one.low > 0 for one in intervals),
        "effective": effective_number(effects.mean(0).clamp(min=0)),
    }


def effective_number(weights: torch.Tensor) -> float:
    """Return the exponential of the entropy of weights (n,) of 0 or more: n where they are equal; 0 where all are 0."""
    if not float(weights.sum()):
        return 0.0
    shares = weights / weights.sum()
    return float(torch.special.entr(shares).sum().exp())


def token_spread(model: DeemForConditionalGeneration, images: Images, batch_size: int = 32) -> dict[str, float]:
    """Return how much image tokens (N, Q, P) differ, from image to image and from token to token.

    Returns:
        `of_images`: share of their variance that is between images, for the same token; the rest is between tokens, the
        same for all images. `directions`: effective number of directions in which images differ. `alike`: mean cosine of
        two tokens of an image, the mean over images taken off: 1 where all say the same.
    """
    with evaluating(model):
        pieces = [
            model.get_image_features(piece.pixel_values, piece.region_masks, return_dict=True).image_tokens
            for piece in images.split(batch_size)
        ]
    return spread_of(torch.cat(pieces))


def spread_of(tokens: torch.Tensor) -> dict[str, float]:
    """Return the figures of `token_spread` of tokens (N, Q, P)."""
    tokens = tokens.double().cpu()
    own = tokens - tokens.mean(0)  # [N, Q, P]
    total = (tokens - tokens.mean((0, 1))).square().sum()
    unit = torch.nn.functional.normalize(own, dim=-1)
    number = tokens.shape[1]
    cosines = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / max(1, number * (number - 1))
    return {
        "of_images": float(own.square().sum() / total),
        "directions": effective_number(torch.linalg.svdvals(own.flatten(0, 1)).square()),
        "alike": float(cosines.mean()),
    }
