# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which way what is needed to redraw an image takes: its tokens, or past them; and at which timesteps tokens count.

Letters: N images, T timesteps, s side of the latents.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from modeling_deem import DeemForConditionalGeneration, DeemImageError
from modeling_deem.image_error_deem import Draws, Redrawn, evaluating, join, measure, states_of
from recipes.diagnosis.images import Images
from recipes.evaluation.scoring.intervals import mean_interval

# name: whose tokens, whose features, in words. "mean": the mean of all images' tokens, which tells nothing of any.
CONDITIONS = {
    "own": ("own", "own", "own tokens, own features"),
    "other tokens": ("other", "own", "tokens of another image, own features"),
    "other features": ("own", "other", "own tokens, features of another image"),
    "tokens alone": ("own", None, "own tokens, no features"),
    "features alone": ("mean", "own", "own features, and the mean tokens of all images"),
    "neither": ("mean", None, "the mean tokens of all images, no features"),
}
TOKEN_CONDITIONS = {
    "own": ("own", None, "own tokens"),
    "other tokens": ("other", None, "tokens of another image"),
    "neither": ("mean", None, "the mean tokens of all images"),
}


def conditions_of(model: DeemForConditionalGeneration) -> dict[str, tuple[str, str | None, str]]:
    """Return the conditions that a model can be tested under: without features where its consistency loss has none."""
    decoder = model.require_image_decoder()
    alone = decoder.feature_fusion is None or decoder.config.consistency_condition == "tokens"
    return TOKEN_CONDITIONS if alone else CONDITIONS


def condition_errors(
    model: DeemForConditionalGeneration,
    images: Images,
    draws_of: Mapping[str, Any],
    batch_size: int = 32,
    conditions: Mapping[str, tuple[str, str | None, str]] | None = None,
) -> dict[str, DeemImageError]:
    """Return the errors of redrawing each image under each condition, all with the same noise.

    "Another image" is the one before it in its batch; the mean is that of the batch.

    Args:
        draws_of: timesteps, num_noise and seed, as in `image_error`.
        conditions: those wanted; all of `conditions_of` by default.
    """
    decoder, draws = model.require_image_decoder(), None
    conditions = conditions_of(model) if conditions is None else conditions
    pieces: dict[str, list[DeemImageError]] = {name: [] for name in conditions}
    with evaluating(model):
        for batch in images.split(batch_size):
            seen = model.get_image_features(batch.pixel_values, batch.region_masks, return_dict=True)
            targets, count = batch.target_pixel_values, len(batch)
            latents = decoder.encode(targets, noise=targets.new_zeros(()))
            if draws is None:
                window = decoder.config.consistency_timestep_range
                draws = Draws.of(decoder, latents, window, **draws_of, batch_size=batch_size)
            other = torch.arange(count, device=latents.device).roll(1)
            states: dict[str | None, Any] = {None: None}
            if decoder.feature_fusion is not None:
                own = decoder.consistency_states(seen.image_tokens, seen.image_features, batch.region_masks)
                states = {"own": own, "other": states_of(own, other), None: decoder.no_features(count)}
            tokens = {"own": seen.image_tokens, "other": seen.image_tokens[other]}
            tokens["mean"] = seen.image_tokens.mean(0, keepdim=True).expand_as(seen.image_tokens)
            condition_of = lambda given, mask: (decoder.condition_from_tokens(given), mask)  # noqa: E731
            for name, (whose, features, _) in conditions.items():
                fused = None if states[features] is None else replace(states[features])
                redrawn = Redrawn(latents, tokens[whose], None, condition_of, fused, batch.region_masks)
                pieces[name].append(measure(decoder, redrawn, draws))
    return {name: join(found) for name, found in pieces.items()}


def leak_test(errors: Mapping[str, DeemImageError], window: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Return what each condition costs: its mean error, and how much that is above the own, over the loss's timesteps.

    Args:
        window: first and last timestep of the consistency loss; all are taken where none lies within.

    Returns:
        per condition `error`; `more`, its difference from the own with the 95 % interval `low`, `high` over images; and
        `share`, `more` as a share of the own error.
    """
    levels = next(iter(errors.values())).timesteps
    within = (levels >= window[0]) & (levels <= window[1])
    within = within if within.any() else torch.ones_like(within)
    means = {name: one.timestep_errors[:, within].mean(1).double().cpu() for name, one in errors.items()}
    found = {}
    for name, values in means.items():
        more = mean_interval((values - means["own"]).numpy(), bounds=(-float("inf"), float("inf")))
        found[name] = {"error": float(values.mean()), "more": more.value, "low": more.low, "high": more.high}
        found[name]["share"] = more.value / float(means["own"].mean())
    return found


def by_timestep(errors: Mapping[str, DeemImageError]) -> dict[str, Any]:
    """Return, for each timestep, the mean error of each condition and how well it tells tokens apart.

    Returns:
        `timesteps`; `errors` by condition; `more`, how much worse the tokens of another image are, as a share of the own
        error; `told_apart`, the share of images that are redrawn better from their own tokens than from another's (half:
        not at all), with the 95 % interval `low` and `high`.
    """
    own, other = (errors[name].timestep_errors.double().cpu() for name in ("own", "other tokens"))
    told = (own < other).double() + 0.5 * (own == other).double()
    intervals = [mean_interval(column.numpy(), bounds=(0, 1)) for column in told.T]
    return {
        "timesteps": errors["own"].timesteps.tolist(),
        "errors": {name: one.timestep_errors.mean(0).tolist() for name, one in errors.items()},
        "more": ((other - own).mean(0) / own.mean(0)).tolist(),
        "told_apart": [one.value for one in intervals],
        "low": [one.low for one in intervals],
        "high": [one.high for one in intervals],
    }
