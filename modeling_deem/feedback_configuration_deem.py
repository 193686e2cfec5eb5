# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Configuration of `DeemFeedback`: what is redrawn under what, by which denoiser, and how that is scored."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_deem import DeemPerceiverConfig, DiffusionSizes, no_unknown_keys


@strict
class DeemFeedbackConfig(DiffusionSizes, PreTrainedConfig):
    r"""The feedback that a denoiser gives to a model's image tokens.

    Args:
        denoiser, vae, scheduler: diffusers configs, as in `DeemImageDecoderConfig`. Without a VAE the denoiser sees pixels.
        pixel_unshuffle: without a VAE, side in pixels of the squares that become cells.
        source: what the images are redrawn from: "tokens" as the language model is given them (DEEM), "encoder", the last
            hidden state of the vision encoder (DIVA, GenHancer), or "language", the language model's last hidden states at
            the image tokens (ROSS).
        source_size: width of these vectors.
        connector: "perceiver", learned queries that read any number of tokens, or "linear", one condition token each.
        perceiver_config: of the perceiver; its `hidden_size` is its own, a projection follows.
        tokens: "all" of an image, or one "global" vector.
        global_token: which one: the "first" token of the encoder (CLS), or the "mean". Of an encoder alone it is its pooled
            vector, where it has one.
        objective: "denoise", the squared error (DEEM), or "contrastive", whose tokens they are (DCR).
        num_negatives: other images that each is contrasted with; None for all of the batch.
        temperature: of the contrastive objective.
        timestep_range: first and last timestep, both included.
        train_denoiser: for a denoiser from scratch; a pretrained one stays as it is.
        loss_weight: of the loss in a trainer (paper: 5).
        feedback_share: share of a step's images that a trainer redraws.
        connector_std: standard deviation of the connector's last projection at the start.
    """

    model_type = "deem_feedback"
    sub_configs_defaults = {"perceiver_config": SubConfigSpec(config_class=DeemPerceiverConfig, optional=True)}

    denoiser: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    pixel_unshuffle: int = 8
    source: Literal["tokens", "encoder", "language"] = "tokens"
    source_size: int = 768
    connector: Literal["perceiver", "linear"] = "perceiver"
    perceiver_config: dict | PreTrainedConfig | None = None
    tokens: Literal["all", "global"] = "all"
    global_token: Literal["first", "mean"] = "mean"
    objective: Literal["denoise", "contrastive"] = "denoise"
    num_negatives: int | None = None
    temperature: float | int = 0.1
    timestep_range: list[int] | tuple[int, int] = (200, 799)
    train_denoiser: bool = False
    loss_weight: float | int = 5.0
    feedback_share: float | int = 1.0
    connector_std: float | int = 1e-3
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.denoiser is None:
            self.denoiser = small_denoiser(in_channels=3 * self.pixel_unshuffle**2, side=8)
        if self.scheduler is None:
            self.scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
        if self.connector == "linear":
            self.perceiver_config = None
        elif self.perceiver_config is None:
            self.perceiver_config = {"num_queries": 77, "num_hidden_layers": 2, "cross_attention_frequency": 1}
        super().__post_init__(**kwargs)
        if self.perceiver_config is not None and self.perceiver_config.encoder_hidden_size is None:
            self.perceiver_config.encoder_hidden_size = self.source_size
        self.check_timestep_range("timestep_range")
        for name, least in (("temperature", 0), ("feedback_share", 0)):
            if getattr(self, name) <= least or (name == "feedback_share" and self.feedback_share > 1):
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0, for a share at most 1.")
        if self.num_negatives is not None and self.num_negatives < 1:
            raise ValueError(f"num_negatives is {self.num_negatives}; expected 1 or more, or None for all others.")
        no_unknown_keys(self, kwargs)


def small_denoiser(
    in_channels: int,
    side: int,
    condition_size: int = 256,
    width: int = 256,
    num_layers: int = 6,
    num_heads: int = 4,
    patch_size: int = 1,
) -> dict[str, Any]:
    """Return the config of a diffusion transformer to be trained from scratch; 7 million parameters by default.

    Args:
        in_channels, side: of the latents; without a VAE 3 * pixel_unshuffle squared, and the image's side in such squares.
        condition_size: width of the condition tokens that it attends to.
    """
    return {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": side,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "cross_attention_dim": width,
        "caption_channels": condition_size,
        "use_additional_conditions": False,
    }


__all__ = ["DeemFeedbackConfig", "small_denoiser"]
