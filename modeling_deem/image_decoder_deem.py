# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The diffusion side: denoiser, VAE and scheduler of diffusers, asked to redraw or to draw (spec sections 2, 6, 7).

`DeemImageDecoder` stands alone: given image tokens of any model and the image they came from, `consistency_loss` says
what the tokens have lost. Letters: N images, Q tokens per image, P token width, C condition width, D language width,
L context length, s latent side, H image side.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .attention_deem import parameter_of
from .configuration_deem import DeemImageDecoderConfig
from .diffusion_deem import DeemDiffusionModel
from .fusion_deem import DeemFeatureFusion
from .image_states_deem import DeemImageStates, is_supervised, no_features, own_features
from .losses_deem import region_mean, supervised_mean
from .perceiver_deem import DeemPerceiver
from .scheduling_deem import prediction_type
from .vision_deem import resize_region_masks, sincos_positions_1d

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]


class DeemImageDecoder(DeemDiffusionModel):
    """Denoiser + VAE + scheduler with the two ways into them: image tokens, and language context.

    Attributes (besides those of `DeemDiffusionModel`):
        token_projector: image tokens (width P) -> condition (width C) of the consistency loss.
        context_projector, perceiver: language context -> Q condition tokens of the image loss.
        null_condition: (1, Q, C), the learned "no condition" of classifier-free guidance.
    """

    config: DeemImageDecoderConfig
    config_class = DeemImageDecoderConfig
    base_model_prefix = "image_decoder"
    main_input_name = "target_pixel_values"

    def __init__(self, config: DeemImageDecoderConfig):
        super().__init__(config)
        self.feature_fusion = DeemFeatureFusion(config) if config.fuses_features else None
        self.token_projector = nn.Linear(config.token_size, config.condition_size)
        self.token_projector._init_std = 1e-3
        self.pooled_projector = self.build_pooled_projector()
        self.context_projector = nn.Linear(config.context_size, config.context_size)
        self.perceiver = DeemPerceiver(config.perceiver_config)
        self.null_condition = nn.Parameter(torch.empty(1, config.perceiver_config.num_queries, config.condition_size))
        self.region_mask_resize = config.region_mask_resize or "bilinear"
        self.post_init()
        self.freeze_fixed_parts()

    # ---- conditions --------------------------------------------------------------------------------------------

    def condition_from_context(self, contexts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Contexts (N, L, D) and bool mask (N, L) -> condition (N, Q, C); position 0 is the start-of-image token."""
        contexts = contexts.to(self.null_condition.dtype)  # the decoder may be of another precision
        positions = sincos_positions_1d(contexts.shape[1], contexts.shape[2], contexts.device).to(contexts.dtype)
        return self.perceiver(self.context_projector(contexts) + positions, mask)

    def condition_from_tokens(self, image_tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens (N, Q, P) -> the condition (N, Q, C) under which their image is redrawn."""
        return self.token_projector(image_tokens.to(self.null_condition.dtype))

    def no_features(self, count: int) -> DeemImageStates:
        """Nothing to look into, for `count` images."""
        return no_features(count, like=parameter_of(self, "null_condition").new_zeros(self.config.feature_size or 0))

    # ---- losses ------------------------------------------------------------------------------------------------

    def consistency_loss(
        self,
        latents: torch.Tensor,
        image_tokens: torch.Tensor,
        image_features: tuple[torch.Tensor, ...] | None = None,
        region_masks: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """DEEM's feedback (paper: L_CSR): redraw each image from its own tokens; what they lost costs loss.

        Args:
            latents: (N, 4, s, s), from `encode`.
            image_tokens: (N, Q, P), gradients flow back into them.
            image_features: pyramid maps (N, E, side, side), used unless the config conditions on tokens only.
            region_masks: (N, 1, h, w) in {0, 1}; error outside the region does not count.
            noise, timesteps: the random draws, to repeat a computation; drawn from `generator` otherwise.
        """
        if noise is None:
            noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        if timesteps is None:
            window = self.config.consistency_timestep_range
            timesteps = self.draw_timesteps(len(latents), *window, device=latents.device, generator=generator)
        states = self.consistency_states(image_tokens, image_features, region_masks)
        errors = self.error_map(latents, self.condition_from_tokens(image_tokens), states, timesteps, noise)
        if region_masks is not None:
            region_masks = resize_region_masks(region_masks, latents.shape[-2:], self.region_mask_resize)
        return region_mean(errors, region_masks)

    def consistency_states(
        self,
        image_tokens: torch.Tensor,
        image_features: tuple[torch.Tensor, ...] | None,
        region_masks: torch.Tensor | None = None,
    ) -> DeemImageStates:
        """What the fusion blocks see while an image is redrawn: its own pyramid, or nothing if so configured."""
        if self.config.consistency_condition == "tokens":
            return self.no_features(len(image_tokens))
        if image_features is None:
            raise ValueError(
                "consistency_condition is 'tokens+features', but no image_features were given. Give the pyramid, or "
                "set image_decoder_config.consistency_condition = 'tokens'."
            )
        return own_features(image_features, region_masks, self.region_mask_resize)

    def image_loss(
        self,
        contexts: torch.Tensor,
        context_mask: torch.Tensor,
        states: DeemImageStates,
        latents: torch.Tensor,
        image_loss_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        drop_condition: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Loss of drawing the next image from what was read and drawn before (paper: L_NIP).

        An image whose context is no more than a bos and a start-of-image token has nothing to be drawn from and is
        not supervised.

        Args:
            contexts: (N, L, D) with bool context_mask (N, L), from `gather_contexts`.
            states: the previous images, from `previous_features`.
            latents: (N, 4, s, s), from `encode`.
            image_loss_mask: bool (N,), which images to supervise.
            noise, timesteps, drop_condition: random draws, to repeat a computation; drop_condition (bool, (N,)) says
                whose condition becomes the null condition. Without it a share `condition_dropout` in training, none
                in evaluation.
        """
        count, device = len(latents), latents.device
        if noise is None:
            noise = randn_tensor(latents.shape, generator, device, latents.dtype)
        if timesteps is None:
            total = self.scheduler.config.num_train_timesteps
            timesteps = self.draw_timesteps(count, 0, total - 1, device=device, generator=generator)
        if drop_condition is None:
            where = generator.device if generator is not None else device
            draws = torch.rand(count, generator=generator, device=where).to(device)
            drop_condition = draws < (self.config.condition_dropout if self.training else 0.0)

        condition = self.condition_from_context(contexts, context_mask)
        null_condition = parameter_of(self, "null_condition").to(condition.dtype)
        condition = torch.where(drop_condition[:, None, None], null_condition, condition)
        errors = self.error_map(latents, condition, states, timesteps, noise)
        supervised = is_supervised(context_mask, image_loss_mask)
        return supervised_mean(errors, supervised, self.config.image_loss_reduction)

    # ---- sampling ----------------------------------------------------------------------------------------------

    def sampling_scheduler(
        self, scheduler: diffusers.SchedulerMixin | None, steps: int, device: torch.device
    ) -> diffusers.SchedulerMixin:
        """Return a copy of the given scheduler, or of the model's own, set to a number of steps.

        Raises:
            ValueError: no steps, or a scheduler that the model was not trained for.
        """
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}: give 1 or more.")
        if isinstance(scheduler, str):
            raise ValueError(f"scheduler is the name {scheduler!r}: give image_decoder.make_scheduler({scheduler!r}).")
        scheduler = copy.deepcopy(scheduler or self.scheduler)
        if prediction_type(scheduler) != (trained := prediction_type(self.scheduler)):
            raise ValueError(
                f"{type(scheduler).__name__} expects {prediction_type(scheduler)!r}, but this model predicts "
                f"{trained!r}. Make it by image_decoder.make_scheduler(name)."
            )
        scheduler.set_timesteps(steps, device=device)
        return scheduler

    @torch.no_grad()
    def sample(
        self,
        condition: torch.Tensor,
        states: DeemImageStates,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        scheduler: diffusers.SchedulerMixin | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> torch.Tensor:
        """Images (N, 3, H, H) in [0, 1], denoised from noise under `condition` (N, Q, C).

        Guidance pushes away from the null condition; image features are the same in both branches (spec section 10).

        Args:
            generator: one for the batch, or a list of one per image, which makes each image independent of its
                neighbors.
            latents: initial noise (N, 4, s, s) of variance 1.
            scheduler: any diffusers scheduler with the same noise, see `make_scheduler`; the model's own otherwise.
            callback_on_step_end: called after each step with its number from 0, its timestep, and the latents (N, 4, s, s)
                that `decode` makes a preview of: without noise as the scheduler estimates them, or as they are where it
                does not say. What it raises ends sampling.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        for name, given in (("generator", generator), ("latents", latents)):
            if isinstance(given, (list, tuple, torch.Tensor)) and len(given) != len(condition):
                raise ValueError(f"{len(given)} entries in {name} for {len(condition)} images: give one per image.")
        scheduler = self.sampling_scheduler(scheduler, steps, condition.device)
        side, channels = self.config.latent_side, self.denoiser.config.in_channels
        if latents is None:
            shape = (condition.shape[0], channels, side, side)
            latents = randn_tensor(shape, generator, condition.device, torch.float32)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)

        guided = scale != 1.0
        if guided:
            null_condition = parameter_of(self, "null_condition").to(condition.dtype).expand_as(condition)
            condition = torch.cat([null_condition, condition])
        index, visible = states.index, states.visible
        if index is None:
            index = torch.arange(len(visible), device=visible.device)[:, None]
        if guided:
            index, visible = index.repeat(2, 1), visible.repeat(2, 1)
        # Features are projected once for all steps.
        states = replace(states, visible=visible, index=index, kept_values={}, kept_tables={})

        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for step, timestep in enumerate(scheduler.timesteps):
            noisy = torch.cat([latents, latents]) if guided else latents
            if hasattr(scheduler, "scale_model_input"):
                noisy = scheduler.scale_model_input(noisy, timestep)
            prediction = self.denoise(noisy, timestep.expand(len(noisy)), condition, states).float()
            if guided:
                without, within = prediction.chunk(2)
                prediction = without + scale * (within - without)
            stepped = scheduler.step(prediction, timestep, latents, **extra)
            latents = stepped.prev_sample
            if callback_on_step_end is not None:
                callback_on_step_end(step, timestep, stepped.get("pred_original_sample", latents))
        return self.decode(latents)
