# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A scheduler that adds noise which it was given, to repeat a drawing of another implementation."""

from collections.abc import Iterable, Iterator

import diffusers
import torch
from diffusers import DDPMScheduler


class _Draws:
    """The noise of one drawing after another; copies of a scheduler share it."""

    def __init__(self, noise: Iterable[torch.Tensor]):
        self.noise: Iterator[torch.Tensor] = iter(noise)

    def __deepcopy__(self, memo: dict) -> "_Draws":
        return self


class GivenNoiseScheduler(DDPMScheduler):
    """DDPM whose steps add stored noise instead of drawing it.

    Made by `of`; each call of `set_timesteps` takes the noise of the next drawing, (steps, N, 4, s, s).
    """

    @classmethod
    def of(cls, scheduler: diffusers.SchedulerMixin, *noise: torch.Tensor) -> "GivenNoiseScheduler":
        """The same schedule as `scheduler`, with the noise of one or several drawings."""
        if type(scheduler) is not DDPMScheduler or scheduler.config.variance_type not in (
            "fixed_small",
            "fixed_large",
        ):
            raise ValueError(f"Stored noise is added as DDPM does with a fixed variance, not as {scheduler!r} does.")
        given = cls.from_config(scheduler.config)
        given.draws = _Draws(noise)
        return given

    def set_timesteps(self, *args, **kwargs) -> None:
        super().set_timesteps(*args, **kwargs)
        noise = next(self.draws.noise)
        if len(noise) != len(self.timesteps):
            raise ValueError(f"Noise of {len(noise)} steps was stored, but there are {len(self.timesteps)} steps.")
        self.noise = iter(noise)

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        self.is_mean = True
        output = super().step(model_output, timestep, sample, generator=generator)
        self.is_mean = False
        noise = next(self.noise)
        if noise.shape != sample.shape:
            raise ValueError(f"The stored noise is {tuple(noise.shape)}, the latents are {tuple(sample.shape)}.")
        if timestep > 0:
            output.prev_sample = output.prev_sample + self._get_variance(timestep) ** 0.5 * noise
        return output

    def _get_variance(self, *args, **kwargs) -> torch.Tensor:
        variance = super()._get_variance(*args, **kwargs)
        return torch.zeros_like(variance) if self.is_mean else variance
