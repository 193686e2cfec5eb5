# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The feedback for any model: redraw its images from what it makes of them; what that has lost costs loss.

    images = vlm.get_image_features(**image_inputs, return_dict=True)
    outputs = vlm(**text_inputs, mm_encoder_outputs={"image": images})
    loss = outputs.loss + 5 * feedback(images, target_pixel_values).loss

Letters: N images, L tokens of an image (padded), W their width, Q condition tokens, C their width, H image side, c, s
channels and side of the latents, K other images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from transformers.utils import ModelOutput

from .adapting_deem import adapted
from .checks_deem import check_targets
from .composing_deem import diffusers_config, joint_sizes, load_parts
from .diffusion_deem import DeemDiffusionModel
from .feedback_configuration_deem import DeemFeedbackConfig, small_denoiser
from .feedback_images_deem import FeedbackImageProcessor
from .feedback_losses_deem import choose_others, contrastive_losses
from .feedback_tokens_deem import (
    check_door,
    encoder_tokens,
    group,
    has_first_token,
    image_units,
    language_tokens,
    pad_tokens,
    source_size,
)
from .image_error_deem import DeemImageError, Draws, Redrawn, evaluating, measure
from .perceiver_deem import DeemPerceiver
from .scheduling_deem import add_noise, build_scheduler, training_config

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class DeemFeedbackOutput(ModelOutput):
    """
    Attributes:
        loss: scalar, the mean over images.
        image_losses: (N,), of each image.
    """

    loss: torch.Tensor | None = None
    image_losses: torch.Tensor | None = None


class DeemConnector(nn.Module):
    """Tokens of any width and number -> condition tokens: norm, perceiver or nothing, projection."""

    def __init__(self, config: DeemFeedbackConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.source_size, eps=1e-6)
        self.perceiver = None if config.perceiver_config is None else DeemPerceiver(config.perceiver_config)
        width = config.source_size if self.perceiver is None else config.perceiver_config.hidden_size
        self.projector = nn.Linear(width, config.condition_size)
        self.projector._init_std = config.connector_std

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """tokens (N, L, W), bool mask (N, L) -> condition (N, Q, C) and its mask (N, Q), None where all count."""
        tokens = self.norm(tokens.to(self.norm.weight.dtype))
        if self.perceiver is not None:
            tokens, mask = self.perceiver(tokens, mask), None
        return self.projector(tokens), mask


class DeemFeedback(DeemDiffusionModel):
    """Connector, denoiser, VAE and scheduler: the tokens of images and the images -> a loss on the tokens.

    Frozen are the VAE and, unless `config.train_denoiser`, the denoiser; the connector trains.
    """

    config: DeemFeedbackConfig
    config_class = DeemFeedbackConfig
    base_model_prefix = "feedback"
    main_input_name = "target_pixel_values"
    _no_split_modules = ["DeemPerceiverLayer"]
    _keep_in_fp32_modules_strict = ["vae"]

    def __init__(self, config: DeemFeedbackConfig):
        super().__init__(config)
        self.connector = DeemConnector(config)
        self.pooled_projector = self.build_pooled_projector()
        self.post_init()
        self.freeze_fixed_parts()

    def fixed_parts(self) -> list[nn.Module]:
        """What never trains: the VAE, parts without effect, and a denoiser that was pretrained."""
        return [*super().fixed_parts(), *([] if self.config.train_denoiser else [self.denoiser])]

    @property
    def image_processor(self) -> FeedbackImageProcessor:
        """Images -> `target_pixel_values`, and the flip and crop that they share with the model's own pixels."""
        return FeedbackImageProcessor(self.config.target_size)

    # ---- composing ---------------------------------------------------------------------------------------------

    @classmethod
    def from_diffusion_pretrained(
        cls,
        diffusion: str,
        model: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        **config_fields: Any,
    ) -> "DeemFeedback":
        """Compose a feedback of a diffusers pipeline, of which denoiser, VAE and scheduler are read, for a model.

        Args:
            diffusion: folder or name of a Stable Diffusion 1, 2 or 3, PixArt or Sana.
            model: whose images are to be redrawn: a vision-language model, or a vision encoder with source="encoder". Its
                sizes are read; it is not kept. Without it give `source_size`.
            dtype: of all but the VAE; float32 by default.
            config_fields: of `DeemFeedbackConfig`: source, connector, objective, tokens, ...

        Raises:
            ValueError: the model has no door for encoded images, or a part does not fit.
        """
        whole = diffusers.DiffusionPipeline.load_config(diffusion)
        name = "transformer" if "transformer" in whole else "unet"
        denoiser, vae = (diffusers.AutoModel.from_pretrained(diffusion, subfolder=part) for part in (name, "vae"))
        scheduler = diffusers.DiffusionPipeline.load_config(diffusion, subfolder="scheduler")
        fields = {
            "denoiser": diffusers_config(denoiser),
            "vae": diffusers_config(vae),
            "scheduler": diffusers_config(build_scheduler(training_config(scheduler))),
            **config_fields,
        }
        state = {f"denoiser.{key}": tensor for key, tensor in denoiser.state_dict().items()}
        state |= {f"vae.{key}": tensor for key, tensor in vae.state_dict().items()}
        return load_parts(cls, fit_to_model(model, fields), state, dtype or torch.float32)

    @classmethod
    def from_scratch(
        cls,
        model: nn.Module | None = None,
        image_size: int = 64,
        vae: str | None = None,
        width: int = 256,
        num_layers: int = 6,
        **config_fields: Any,
    ) -> "DeemFeedback":
        """Compose a feedback whose small denoiser, a diffusion transformer, trains together with the connector.

        Args:
            model: as in `from_diffusion_pretrained`.
            image_size: side in pixels of the images that are redrawn.
            vae: folder or name of a diffusers pipeline whose VAE makes the latents; without it the pixels are redrawn, in
                squares of `pixel_unshuffle`.
            width, num_layers: of the denoiser, see `small_denoiser`.
        """
        own = {"train_denoiser": True, "connector_std": 0.02, "timestep_range": (0, 999)}
        fields, state = {**own, **config_fields}, {}
        factor = fields.get("pixel_unshuffle", DeemFeedbackConfig.pixel_unshuffle)
        channels = 3 * factor**2
        if vae is not None:
            encoder = diffusers.AutoModel.from_pretrained(vae, subfolder="vae")
            fields["vae"], channels = diffusers_config(encoder), encoder.config.latent_channels
            widths = fields["vae"].get("block_out_channels") or fields["vae"]["encoder_block_out_channels"]
            factor = 2 ** (len(widths) - 1)
            state = {f"vae.{key}": tensor for key, tensor in encoder.state_dict().items()}
        if image_size % factor:
            raise ValueError(f"image_size is {image_size}; expected a multiple of {factor}, the pixels of a cell.")
        sizes = {"condition_size": width, "width": width, "num_layers": num_layers}
        fields.setdefault("denoiser", small_denoiser(channels, image_size // factor, **sizes))
        return load_parts(cls, fit_to_model(model, fields), state, torch.float32)

    # ---- tokens ------------------------------------------------------------------------------------------------

    def gather_tokens(
        self,
        images: Any,
        count: int,
        num_tiles: Sequence[int] | None = None,
        hidden_states: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the images are redrawn from, (N, L, W), and its bool mask (N, L); arguments as in `forward`."""
        config, pooled = self.config, getattr(images, "pooler_output", None)
        if config.source == "language":
            tokens = language_tokens(images, count, num_tiles, hidden_states, image_mask)
        elif config.source == "tokens":
            tokens = group(image_units(images), count, num_tiles)
        elif config.tokens == "global" and is_pooled(pooled, count, config.source_size):
            tokens = list(pooled.flatten(1)[:, None])
        else:
            tokens = encoder_tokens(images, count, num_tiles)
        if (width := tokens[0].shape[-1]) != config.source_size:
            raise ValueError(
                f"The tokens are {width} wide, the feedback was made for {config.source_size} (source {config.source!r}). "
                "Compose it with model= of this model, or give source_size."
            )
        if config.tokens == "global":
            first = config.global_token == "first" and config.source == "encoder"
            tokens = [one[:1] if first else one.mean(0, keepdim=True) for one in tokens]
        return pad_tokens(tokens)

    def condition(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The condition (N, Q, C) that tokens (N, L, W) become, and its mask.

        Raises:
            ValueError: tokens of different numbers, a linear connector, and a denoiser that takes no mask.
        """
        condition, mask = self.connector(tokens, mask)
        if mask is not None and self.pooled_projector is not None:
            raise ValueError(
                f"The images have different numbers of tokens, and {type(self.denoiser).__name__} takes no mask: use "
                "connector='perceiver', or tokens='global'."
            )
        return condition, mask

    # ---- losses ------------------------------------------------------------------------------------------------

    def check_targets(self, targets: torch.Tensor) -> None:
        """Raise ValueError where target images are of another size, or outside [-1, 1]."""
        side, made = self.config.target_size, "feedback.image_processor(images) makes such targets."
        if targets.dim() != 4 or targets.shape[1:] != (3, side, side):
            raise ValueError(
                f"target_pixel_values have the shape {tuple(targets.shape)}; expected (N, 3, {side}, {side}). {made}"
            )
        check_targets(targets, made)

    def draw(
        self, latents: torch.Tensor, noise: torch.Tensor | None, timesteps: torch.Tensor | None, generator: Generators
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (N, c, s, s) and timesteps (N,): those given, else drawn; a list of generators has one per image."""
        if noise is None:
            noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
        if timesteps is None:
            window, place = self.config.timestep_range, {"device": latents.device}
            if isinstance(generator, list | tuple):
                drawn = [self.draw_timesteps(1, *window, **place, generator=one) for one in generator]
                timesteps = torch.cat(drawn)
            else:
                timesteps = self.draw_timesteps(len(latents), *window, **place, generator=generator)
        return noise, timesteps

    def contrast(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        tokens: list[tuple[torch.Tensor, torch.Tensor | None]],
        others: torch.Tensor,
    ) -> torch.Tensor:
        """Contrastive losses (N,), in one call of the denoiser.

        Args:
            tokens: of the images, and of their views if there are any, each with its mask.
            others: int64 (N, K), whose tokens each image is contrasted with.
        """
        count, copies = len(latents), len(tokens) + others.shape[1]
        rows = [row for one, mask in tokens for row in unpad(one, mask)]
        own = torch.arange(count, device=others.device)[:, None]
        view = [own + count] if len(tokens) > 1 else []
        index = torch.cat([own, *view, others], dim=1).flatten()  # [N * copies], whose tokens each copy gets
        condition, mask = self.condition(*pad_tokens(rows))
        mask = None if mask is None else mask[index]
        noisy, target, times = add_noise(self.scheduler, latents, noise, timesteps)
        noisy, times = (one.repeat_interleave(copies, 0) for one in (noisy, times))
        prediction = self.denoise(noisy, times, condition[index], condition_mask=mask).unflatten(0, (count, copies))
        seen = prediction[:, 1] if view else None
        given = (prediction[:, 0], target, prediction[:, len(tokens) :], seen)
        return contrastive_losses(*given, self.config.temperature)

    def forward(
        self,
        images: Any,
        target_pixel_values: torch.Tensor | None = None,
        target_latents: torch.Tensor | None = None,
        num_tiles: Sequence[int] | None = None,
        hidden_states: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        views: Any = None,
        selected: torch.Tensor | None = None,
        detach: bool = False,
        noise: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        others: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> DeemFeedbackOutput:
        r"""
        Args:
            images: what `get_image_features(..., return_dict=True)` of a model returned, or the output of a vision encoder
                with source="encoder"; the gradient flows back into it.
            target_pixel_values: (N, 3, H, H) in [-1, 1], the same images in the same order, of `image_processor`.
            target_latents: the same encoded already, (N, c, s, s), see `encode`.
            num_tiles: of each image, where the model cuts images into tiles and its output does not say how many.
            hidden_states: (B, T, W), the language model's last, with image_mask, bool (B, T); for source="language".
            views: as `images`, of augmented views of the same images, a positive of the contrastive objective.
            selected: int64 (n,), redraw these images only.
            detach: let no gradient back into the images, so that the connector learns alone.
            noise, timesteps, others: the random draws, to repeat a computation; drawn from `generator` otherwise, one for
                the batch or a list of one per (selected) image.

        Raises:
            ValueError: targets of another number, size or range; tokens of another width; a source that is not given.
        """
        targets = target_pixel_values if target_latents is None else target_latents
        if targets is None:
            raise ValueError("Give target_pixel_values, the images to be redrawn, or target_latents.")
        if target_latents is None:
            self.check_targets(target_pixel_values)
        given = [images] if views is None or self.config.objective == "denoise" else [images, views]
        language = {"hidden_states": hidden_states, "image_mask": image_mask}
        tokens = [self.gather_tokens(one, len(targets), num_tiles, **language) for one in given]
        if selected is not None:
            targets = targets[selected]
            tokens = [(one[selected], None if mask is None else mask[selected]) for one, mask in tokens]
        if detach:
            tokens = [(one.detach(), mask) for one, mask in tokens]
        latents = targets if target_latents is not None else self.encode(targets, generator)
        noise, timesteps = self.draw(latents, noise, timesteps, generator)
        if self.config.objective == "denoise":
            condition, mask = self.condition(*tokens[0])
            errors = self.error_map(latents, condition, None, timesteps, noise, mask)
            losses = errors.flatten(1).mean(1)
        else:
            if others is None:
                one = generator[0] if isinstance(generator, list | tuple) else generator
                others = choose_others(len(latents), self.config.num_negatives, latents.device, one)
            losses = self.contrast(latents, noise, timesteps, tokens, others)
        return DeemFeedbackOutput(loss=losses.mean(), image_losses=losses)

    def image_error(
        self,
        images: Any,
        target_pixel_values: torch.Tensor,
        num_tiles: Sequence[int] | None = None,
        hidden_states: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
        num_noise: int = 1,
        per_token: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 32,
    ) -> DeemImageError:
        """How well each image is redrawn from what the model makes of it: per image, per cell and, if asked for, per token.

        The denoising error, whatever the objective; no gradient, no dropout in the feedback.

        Args:
            images, target_pixel_values, num_tiles, hidden_states, image_mask: as in `forward`.
            timesteps, num_noise, per_token, seed, generator, batch_size: as in `image_error` of a DEEM; tokens are those of
                the source, before the connector.

        Raises:
            ValueError: as `forward`; timesteps that the scheduler does not have; an image of one token and `per_token`.
        """
        self.check_targets(target_pixel_values)
        with evaluating(self):
            given = (num_tiles, hidden_states, image_mask)
            tokens, mask = self.gather_tokens(images, len(target_pixel_values), *given)
            latents = self.encode(target_pixel_values, noise=target_pixel_values.new_zeros(()))
            asked = (timesteps, num_noise, seed, generator, batch_size)
            draws = Draws.of(self, latents, self.config.timestep_range, *asked)
            return measure(self, Redrawn(latents, tokens, mask, self.condition), draws, per_token)

    def adapted_to(
        self,
        model: nn.Module,
        image_inputs: dict[str, Any],
        target_pixel_values: torch.Tensor,
        steps: int = 5,
        learning_rate: float = 4e-6,
        parameters: str = "vision_tower",
        num_tiles: Sequence[int] | None = None,
        generator: Generators = None,
    ):
        """Return a context in which `model` has learned from redrawing these very images; on leaving it is as before.

        Args:
            image_inputs: what the model's `get_image_features` takes.
            parameters: name of the part of the model that learns ("visual" in Qwen-VL).

        Raises:
            ValueError: on entering, no such part, or a quantized or offloaded one; the source is the language model.
        """
        if self.config.source == "language":
            raise ValueError(
                "source is 'language': adapting reads the images alone. Use source='tokens' or 'encoder'."
            )

        def loss() -> torch.Tensor:
            images = model.get_image_features(**image_inputs, return_dict=True)
            return self(images, target_pixel_values, num_tiles=num_tiles, generator=generator).loss

        return adapted(model, loss, parameters, steps, learning_rate)


def unpad(tokens: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Tokens (N, L, W) without their padding, (L', W) of each image."""
    return list(tokens) if mask is None else [one[counts] for one, counts in zip(tokens, mask, strict=True)]


def is_pooled(given: Any, count: int, size: int) -> bool:
    """Whether it is one vector for each of `count` images, as an encoder alone gives it: (N, size), or (N, size, 1, 1)."""
    return isinstance(given, torch.Tensor) and given.flatten(1).shape == (count, size)


def fit_to_model(model: nn.Module | None, fields: dict[str, Any]) -> DeemFeedbackConfig:
    """The config of what the model says and of what the caller says, who has the last word.

    Raises:
        ValueError: the model has no door for encoded images, or no such source.
    """
    found, source = {}, fields.get("source", DeemFeedbackConfig.source)
    if model is not None:
        if source != "encoder" or getattr(model, "can_generate", bool)():
            check_door(model)
        found["source_size"] = fields.get("source_size") or source_size(model.config, source)
        found["global_token"] = fields.get("global_token") or ("first" if has_first_token(model) else "mean")
        sizes = joint_sizes(found["source_size"])["perceiver_config"]
        found["perceiver_config"] = {**sizes, "num_hidden_layers": 2, "cross_attention_frequency": 1}
        found["perceiver_config"] |= fields.get("perceiver_config") or {}
    return DeemFeedbackConfig(**{**fields, **found})


__all__ = ["DeemConnector", "DeemFeedback", "DeemFeedbackOutput"]
