# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a diffusers scheduler means in training: how much noise, what to predict; and how to exchange it for sampling.

Letters: N images, s latent side.
"""

import inspect
from typing import Any

import diffusers
import torch

FLOW = "flow_prediction"
# Solvers that also know flow matching. (DEIS does too, but leaves the noise of its last step in the image.)
FLOW_SOLVERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def build_scheduler(config: dict[str, Any]) -> diffusers.SchedulerMixin:
    """A diffusers scheduler from its config; on CPU even while the model is being built on the meta device.

    Raises:
        ValueError: it cannot be trained with.
    """
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "The scheduler shifts its noise levels by the size of each image (use_dynamic_shifting); DEEM draws one "
            "size. Set use_dynamic_shifting = False and the shift of that size in the scheduler's config."
        )
    with torch.device("cpu"):
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    kind = prediction_type(scheduler)
    if kind not in ("epsilon", "v_prediction", FLOW) or (kind == FLOW and not hasattr(scheduler, "scale_noise")):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r} is not supported for training. Supported: "
            "'epsilon' and 'v_prediction', and flow matching by FlowMatchEulerDiscreteScheduler."
        )
    return scheduler


def prediction_type(scheduler: diffusers.SchedulerMixin) -> str:
    """What the denoiser predicts: "epsilon", "v_prediction", "sample" or "flow_prediction"."""
    return FLOW if type(scheduler).__name__.startswith("FlowMatch") else scheduler.config.prediction_type


def training_config(config: dict[str, Any]) -> dict[str, Any]:
    """Config of the scheduler to train with, from that of any scheduler which a pipeline samples with.

    Flow matching becomes `FlowMatchEulerDiscreteScheduler` with the same shift, all else `DDPMScheduler` with the same
    noise schedule.
    """
    name = config["_class_name"]
    if name.startswith("FlowMatch") or config.get("prediction_type") == FLOW:
        shift = config.get("shift", config.get("flow_shift", 1.0))
        kept = {key: config[key] for key in ("num_train_timesteps", "use_dynamic_shifting") if key in config}
        return {**kept, "shift": shift, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    known = inspect.signature(diffusers.DDPMScheduler.__init__).parameters
    kept = {key: value for key, value in config.items() if key in known and value is not None}
    # Not DDPM's default: latents are not bounded.
    return {"clip_sample": False, **kept, "_class_name": "DDPMScheduler"}


def add_noise(
    scheduler: diffusers.SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, what to predict of them, and the timesteps as the denoiser wants them.

    Args:
        latents, noise: (N, c, s, s).
        timesteps: int64 (N,) from 0, least noise, to num_train_timesteps - 1. For flow matching they number the
            scheduler's levels: with shift 1 level t has the share (t + 1) / num_train_timesteps of noise.
    """
    kind = prediction_type(scheduler)
    if kind == FLOW:
        levels = scheduler.sigmas.flip(0).to(latents.device)[timesteps]  # [N], share of noise
        share = levels.view(-1, 1, 1, 1).to(latents.dtype)
        return (1 - share) * latents + share * noise, noise - latents, levels * scheduler.config.num_train_timesteps
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    return noisy, target, timesteps


def fitting_schedulers(scheduler: diffusers.SchedulerMixin) -> list[str]:
    """Names of the diffusers schedulers that sample with the noise that `scheduler` trains with, in alphabetical order."""
    others = FLOW_SOLVERS if prediction_type(scheduler) == FLOW else scheduler._compatibles
    return sorted({type(scheduler).__name__, *others})


def exchange_scheduler(scheduler: diffusers.SchedulerMixin, name: str) -> diffusers.SchedulerMixin:
    """The diffusers scheduler of class `name`, set up for the noise that `scheduler` trains with.

    Raises:
        ValueError: diffusers has no such scheduler, or it is of another kind (flow matching against denoising).
    """
    is_flow, own = prediction_type(scheduler) == FLOW, type(scheduler).__name__
    fitting = fitting_schedulers(scheduler)
    other = getattr(diffusers, name, None)
    if name not in fitting and own not in getattr(other, "_compatibles", ()):
        raise ValueError(
            f"No scheduler {name!r} in diffusers draws with this model, which was trained with {own}. Use one of "
            f"{', '.join(fitting)}."
        )
    if not is_flow or name == own:
        return other.from_config(scheduler.config)
    return other(prediction_type=FLOW, use_flow_sigmas=True, flow_shift=scheduler.config.shift)
