# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Denoiser, VAE and scheduler of diffusers as one: images -> latents, and the error of denoising them under a condition.

What the image decoder of a DEEM and the feedback for any model have in common. Letters: N images, C condition width, Q
condition tokens, c channels of the latents, s latent side, H image side.
"""

import diffusers
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .base_deem import DeemPreTrainedModel, mark_upstream
from .image_states_deem import DeemImageStates
from .scheduling_deem import add_noise, build_scheduler, exchange_scheduler


class DeemDiffusionModel(DeemPreTrainedModel):
    """Base of `DeemImageDecoder` and `DeemFeedback`.

    Attributes:
        denoiser: of diffusers, see `DENOISERS` in the config's file; vae: of diffusers, frozen, float32; without one the
            latents are the pixels, `config.pixel_unshuffle` squared of them in a cell.
        feature_fusion: image features -> residuals at the UNet's skips, else None.
        pooled_projector: mean of the condition tokens -> the one vector that Stable Diffusion 3 wants besides, else None.
    """

    def __init__(self, config):
        from .denoiser_deem import build_denoiser  # diffusers' denoisers are slow to import, and only needed here

        super().__init__(config)
        self.denoiser, self.vae = build_denoiser(config.denoiser), None
        mark_upstream(self.denoiser)
        if config.vae is None:
            channels = 3 * config.pixel_unshuffle**2
            source = f"Pixels, unshuffled by pixel_unshuffle {config.pixel_unshuffle}, have"
            mend = "Give vae, or in_channels of 3 * pixel_unshuffle squared."
        else:
            self.vae = getattr(diffusers, config.vae["_class_name"]).from_config(config.vae)
            mark_upstream(self.vae)
            channels, source = self.vae.config.latent_channels, "The VAE's latents have"
            mend = "Take both from one pipeline."
        if channels != (taken := self.denoiser.config.in_channels):
            raise ValueError(f"{source} {channels} channels, the denoiser takes {taken}. {mend}")
        self.feature_fusion, self.pooled_projector = None, None
        self._scheduler = None

    def build_pooled_projector(self) -> nn.Linear | None:
        """What makes the pooled vector of a denoiser that wants one."""
        if not (pooled_size := self.denoiser.config.get("pooled_projection_dim")):
            return None
        projector = nn.Linear(self.config.condition_size, pooled_size)
        projector._init_std = 0.0
        return projector

    def fixed_parts(self) -> list[nn.Module]:
        """What never trains: the VAE, and parts of the denoiser that have no effect."""
        return [part for part in (self.vae, *getattr(self.denoiser, "unused_parts", list)()) if part is not None]

    @property
    def scheduler(self) -> diffusers.SchedulerMixin:
        """The training scheduler; sampling works on copies."""
        if self._scheduler is None:
            self._scheduler = build_scheduler(self.config.scheduler)
        return self._scheduler

    def make_scheduler(self, name: str) -> diffusers.SchedulerMixin:
        """A diffusers scheduler of another class for sampling, e.g. "DDIMScheduler", with the noise of training."""
        return exchange_scheduler(self.scheduler, name)

    # ---- latents -----------------------------------------------------------------------------------------------

    @property
    def latent_shift(self) -> float:
        """What is taken off the VAE's latents before they are scaled."""
        return self.vae.config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(
        self,
        target_pixel_values: torch.Tensor,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images (N, 3, H, H) in [-1, 1] -> latents (N, 4, s, s), shifted and scaled, in the VAE's precision.

        Sampled from the posterior where the VAE has one; Sana's gives the latents themselves. Without a VAE the pixels.
        """
        if self.vae is None:
            return F.pixel_unshuffle(target_pixel_values, self.config.pixel_unshuffle)
        encoded = self.vae.encode(target_pixel_values.to(self.vae.dtype))
        if "latent" in encoded:
            latents = encoded.latent
        else:
            posterior = encoded.latent_dist
            if noise is None:
                noise = randn_tensor(posterior.mean.shape, generator, posterior.mean.device, posterior.mean.dtype)
            latents = posterior.mean + posterior.std * noise
        return (latents - self.latent_shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_posterior(self, target_pixel_values: torch.Tensor) -> torch.Tensor:
        """What `encode` samples from, to be kept and sampled later by `sample_latents`.

        Images (N, 3, H, H) in [-1, 1] -> mean and standard deviation of the latents, shifted and scaled, one behind
        the other: (N, 8, s, s). Where the VAE has no posterior, the latents: (N, 4, s, s).
        """
        if self.vae is None:
            return self.encode(target_pixel_values)
        encoded = self.vae.encode(target_pixel_values.to(self.vae.dtype))
        scale = self.vae.config.scaling_factor
        if "latent" in encoded:
            return (encoded.latent - self.latent_shift) * scale
        posterior = encoded.latent_dist
        return torch.cat([(posterior.mean - self.latent_shift) * scale, posterior.std * scale], dim=1)

    def sample_latents(self, posterior: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents (N, 4, s, s) from `encode_posterior`, with the noise that `encode` would draw; latents pass."""
        if posterior.shape[1] == self.denoiser.config.in_channels:
            return posterior
        mean, deviation = posterior.float().chunk(2, dim=1)
        return mean + deviation * randn_tensor(mean.shape, generator, mean.device, mean.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, 4, s, s) -> images (N, 3, H, H) in [0, 1]."""
        if self.vae is None:
            return (F.pixel_shuffle(latents, self.config.pixel_unshuffle) / 2 + 0.5).clamp(0, 1)
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.latent_shift
        return (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    # ---- errors ------------------------------------------------------------------------------------------------

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        condition: torch.Tensor,
        states: DeemImageStates | None = None,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The denoiser's prediction (N, 4, s, s) for noisy latents; image features count where they are fused in.

        Args:
            condition_mask: bool (N, Q), which tokens of the condition count; None for all.
        """
        dtype, extra = self.denoiser.dtype, {}
        if self.feature_fusion is not None:
            extra = {"fusion": self.feature_fusion, "image_states": states}
        elif self.pooled_projector is not None:
            extra = {"pooled": self.pooled_projector(condition.mean(1)).to(dtype)}
        if condition_mask is not None:
            extra["condition_mask"] = condition_mask
        return self.denoiser(latents.to(dtype), timesteps, condition.to(dtype), **extra)

    def error_map(
        self,
        latents: torch.Tensor,
        condition: torch.Tensor,
        states: DeemImageStates | None,
        timesteps: torch.Tensor,
        noise: torch.Tensor,
        condition_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Squared error of the denoiser at every latent cell, (N, 4, s, s) float32; the scheduler sets the target."""
        noisy, target, timesteps = add_noise(self.scheduler, latents, noise, timesteps)
        prediction = self.denoise(noisy, timesteps, condition, states, condition_mask)
        return (prediction.float() - target.float()).square()

    def draw_timesteps(
        self, count: int, first: int, last: int, device: torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Timesteps (count,): a uniform draw from all training timesteps, squeezed linearly into [first, last]."""
        total = self.scheduler.config.num_train_timesteps
        where = generator.device if generator is not None else device
        draws = torch.randint(total, (count,), generator=generator, device=where).to(device)
        return self.squeeze_timesteps(draws, first, last)

    def squeeze_timesteps(self, timesteps: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Timesteps of the whole range, int64 (N,), moved linearly into [first, last]."""
        total = self.scheduler.config.num_train_timesteps
        return (first + timesteps.double() * ((last + 1 - first) / total)).round().long().clamp(max=last)
