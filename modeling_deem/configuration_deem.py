# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Configuration of DEEM: vision encoder, perceiver, language model and diffusion decoder in one nested, typed object.

Defaults are the released 7B model (ConvNeXt-B-CLIP, Vicuna-7B, SD-2.1-base, 77 image tokens). Symbols used in the
comments: Q image tokens per image, P perceiver width, E width of the image features, C width of the denoiser's
condition, D language width.
"""

from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Denoisers of diffusers: the config key of the width C of their condition, and whether image features are fused in.
DENOISERS = {
    "PixArtTransformer2DModel": ("caption_channels", False),
    "SD3Transformer2DModel": ("joint_attention_dim", False),
    "SanaTransformer2DModel": ("caption_channels", False),
    "UNet2DConditionModel": ("cross_attention_dim", True),
}


@strict
class DeemPerceiverConfig(PreTrainedConfig):
    r"""Learned queries that read any sequence through cross-attention (a Q-Former without text branch).

    Args:
        num_queries: number of learned queries, i.e. of output tokens (Q).
        hidden_size: width of queries and output (P).
        encoder_hidden_size: width of the sequence that is read; `None` lets the surrounding config fill it in.
        cross_attention_frequency: every how many layers a cross-attention follows the self-attention.
        qk_norm: LayerNorm over each head's queries and keys.
    """

    model_type = "deem_perceiver"

    num_queries: int = 77
    hidden_size: int = 768
    encoder_hidden_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    qk_norm: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"The perceiver's hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )
        no_unknown_keys(self, kwargs)


class DiffusionSizes:
    """What the configs of denoiser, VAE and scheduler, fields of these names, say about sizes."""

    @property
    def condition_size(self) -> int:
        """Width C of the tokens that the denoiser is conditioned on.

        Raises:
            ValueError: the denoiser is not a supported one, or its config does not say.
        """
        name = self.denoiser["_class_name"]
        if name not in DENOISERS:
            raise ValueError(f"Denoisers of class {name!r} are not supported. Supported: {', '.join(DENOISERS)}.")
        key, _ = DENOISERS[name]
        if self.denoiser.get(key) is None:
            raise ValueError(f"The denoiser's config must give {key}, the width of its condition ({name}).")
        return self.denoiser[key]

    @property
    def fuses_features(self) -> bool:
        """Whether image features are fused into the denoiser."""
        return DENOISERS[self.denoiser["_class_name"]][1]

    @property
    def latent_side(self) -> int:
        """Side of the latent map, in cells."""
        return self.denoiser["sample_size"]

    @property
    def target_size(self) -> int:
        """Side of the images to draw, in pixels."""
        if self.vae is None:
            return self.latent_side * self.pixel_unshuffle
        widths = self.vae.get("block_out_channels") or self.vae["encoder_block_out_channels"]
        return self.latent_side * 2 ** (len(widths) - 1)

    def check_timestep_range(self, name: str) -> None:
        """Raise ValueError where the field `name`, first and last timestep, is no range of the scheduler's."""
        (low, high), total = getattr(self, name), self.scheduler.get("num_train_timesteps", 1000)
        if not 0 <= low < high < total:
            raise ValueError(
                f"{name} is [{low}, {high}]; expected 0 <= first < last < {total} (the scheduler's num_train_timesteps)."
            )


@strict
class DeemImageDecoderConfig(DiffusionSizes, PreTrainedConfig):
    r"""The diffusion side: a diffusers denoiser, VAE and scheduler, and what feeds them.

    Args:
        denoiser, vae, scheduler: diffusers configs (`dict(module.config)` with `_class_name`). The denoiser is one of
            `DENOISERS`; the scheduler says what it predicts.
        perceiver_config: perceiver that turns the language context into condition tokens; its `hidden_size` is the
            width of the denoiser's condition (C).
        token_size: width P of the image tokens that condition the consistency loss.
        context_size: width D of the language model's hidden states.
        feature_size: width E of the image features fused at a UNet's skips; other denoisers see tokens only.
        feature_sides: sides of the feature pyramid at the encoder's pretraining resolution; sampling offsets are
            measured in these cells.
        fusion_size, fusion_heads, fusion_points, fusion_max_images, fusion_offset_range: the feature synchronizer at
            each skip.
        num_previous_images: how many images before the drawn one feed the image loss and generation (released: 1).
        condition_dropout: share of training images whose condition is replaced by the learned null condition.
        consistency_timestep_range: first and last timestep of the consistency loss, both included.
        consistency_condition: whether the consistency loss sees the image tokens only, or also the feature pyramid (as
            published, and the default for a UNet).
        image_loss_reduction: "supervised" averages over images that have a condition, "all" over every image (the
            released rule).
        region_mask_resize: how region masks reach coarse maps, see `DeemConfig`, which fills it in; alone "bilinear".
        num_inference_steps, guidance_scale: defaults of the samplers.
    """

    model_type = "deem_image_decoder"
    sub_configs_defaults = {"perceiver_config": SubConfigSpec(config_class=DeemPerceiverConfig)}

    denoiser: dict[str, Any] | None = None
    vae: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    perceiver_config: dict | PreTrainedConfig | None = None
    token_size: int | None = None
    context_size: int | None = None
    feature_size: int | None = None
    feature_sides: list[int] | tuple[int, ...] = (64, 32, 16, 8)
    fusion_size: int = 1024
    fusion_heads: int = 16
    fusion_points: int = 8
    fusion_max_images: int = 10
    fusion_offset_range: float | int = 1
    num_previous_images: int = 1
    condition_dropout: float | int = 0.1
    consistency_timestep_range: list[int] | tuple[int, int] = (200, 799)
    consistency_condition: Literal["tokens", "tokens+features"] | None = None
    image_loss_reduction: Literal["supervised", "all"] = "supervised"
    region_mask_resize: Literal["bilinear", "antialias"] | None = None
    num_inference_steps: int = 250
    guidance_scale: float | int = 3.5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.denoiser is None:
            self.denoiser = {
                "_class_name": "UNet2DConditionModel",
                "sample_size": 64,
                "block_out_channels": [320, 640, 1280, 1280],
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
            }
        if self.vae is None:
            self.vae = {
                "_class_name": "AutoencoderKL",
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
                "latent_channels": 4,
                "sample_size": 512,
            }
        if self.scheduler is None:
            self.scheduler = {
                "_class_name": "DDPMScheduler",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "clip_sample": False,
                "steps_offset": 1,
                "timestep_spacing": "leading",
                "prediction_type": "epsilon",
            }
        if self.perceiver_config is None:
            self.perceiver_config = {
                "hidden_size": self.condition_size,
                "num_hidden_layers": 1,
                "num_attention_heads": 16 if self.condition_size % 16 == 0 else 4,
                "cross_attention_frequency": 1,
                "qk_norm": False,
            }
        if self.consistency_condition is None:
            self.consistency_condition = "tokens+features" if self.fuses_features else "tokens"
        super().__post_init__(**kwargs)
        if self.consistency_condition == "tokens+features" and not self.fuses_features:
            raise ValueError(
                f"consistency_condition is 'tokens+features', but image features enter a UNet only, not "
                f"{self.denoiser['_class_name']}. Leave it out, or set it to 'tokens'."
            )
        if self.perceiver_config.hidden_size != self.condition_size:
            raise ValueError(
                f"The image decoder's perceiver gives tokens of width {self.perceiver_config.hidden_size}, but the "
                f"denoiser's {DENOISERS[self.denoiser['_class_name']][0]} is {self.condition_size}. Set image_decoder_config.perceiver_config."
                f"hidden_size = {self.condition_size}."
            )
        self.check_timestep_range("consistency_timestep_range")
        no_unknown_keys(self, kwargs)


@strict
class DeemConfig(PreTrainedConfig):
    r"""
    A whole DEEM model.

    Args:
        vision_config, text_config: any transformers config whose `model_type` AutoModel knows.
        perceiver_config: the perceiver that turns grid tokens into image tokens; `num_queries` is Q.
        image_decoder_config: the diffusion side, or `None` for a model that only writes text.
        feature_size: width E of grid tokens and image features.
        position_grid_side: side of the sin-cos table, in grid cells of the encoder's pretraining resolution.
        use_region_tokens: prepend five region tokens (one per pyramid level, one of the mask's shape) to the grid
            tokens (stage 3 of the paper).
        image_attention_interval: every how many layers of the language model attend to image features.
        image_attention_levels: pyramid levels (0 = finest) that the language model sees.
        image_attention_sides: sides of these levels that sampling offsets are measured in.
        image_attention_base_side: one unit of offset is 1/base of the image at a level of that side.
        image_attention_max_images: most images a token may see (size of the relative-position table, minus one).
        lm_head_bias: output bias; new tokens start at -5, so that they stay rare until trained.
        text_loss_weight, image_loss_weight, consistency_loss_weight: weights of the three losses (paper: 1, 5, 5).
    """

    model_type = "deem"
    keys_to_ignore_at_inference = ["past_key_values", "image_states", "image_hidden_states"]
    keys_to_ignore_at_inference += ["text_loss", "image_loss", "consistency_loss"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="convnext"),
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32006, "rms_norm_eps": 1e-5}
        ),
        "perceiver_config": SubConfigSpec(config_class=DeemPerceiverConfig),
        "image_decoder_config": SubConfigSpec(config_class=DeemImageDecoderConfig, optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    perceiver_config: dict | PreTrainedConfig | None = None
    image_decoder_config: dict | PreTrainedConfig | None = None

    image_token_id: int = 32001
    start_of_image_token_id: int = 32000
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 31999

    feature_size: int = 1024
    position_grid_side: int = 16
    use_region_tokens: bool = False
    region_mask_resize: Literal["bilinear", "antialias"] = "bilinear"

    image_attention_interval: int = 4
    image_attention_levels: list[int] | tuple[int, ...] = (1, 2, 3)
    image_attention_sides: list[int] | tuple[int, ...] = (32, 16, 8)
    image_attention_base_side: int = 16
    image_attention_heads: int = 16
    image_attention_points: int = 8
    image_attention_max_images: int = 50
    image_attention_offset_range: float | int = 3

    lm_head_bias: bool = True
    text_loss_weight: float | int = 1.0
    image_loss_weight: float | int = 5.0
    consistency_loss_weight: float | int = 5.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        if len(self.image_attention_sides) != len(self.image_attention_levels):
            raise ValueError(
                f"image_attention_sides {list(self.image_attention_sides)} and image_attention_levels "
                f"{list(self.image_attention_levels)} must have one entry per level."
            )
        if any(level not in range(4) for level in self.image_attention_levels):
            raise ValueError(
                f"image_attention_levels are {list(self.image_attention_levels)}; the pyramid has the levels 0 (finest) "
                "to 3 (coarsest)."
            )
        if self.feature_size % 4:
            raise ValueError(
                f"feature_size is {self.feature_size}; it must be a multiple of 4 (sine and cosine of two coordinates)."
            )
        if self.perceiver_config.encoder_hidden_size is None:
            self.perceiver_config.encoder_hidden_size = self.feature_size
        if self.image_decoder_config is not None:
            decoder = self.image_decoder_config
            given = dict(feature_size=self.feature_size, region_mask_resize=self.region_mask_resize)
            given |= dict(token_size=self.perceiver_config.hidden_size, context_size=self.text_config.hidden_size)
            for name, value in given.items():
                if getattr(decoder, name) is None:
                    setattr(decoder, name, value)
                elif getattr(decoder, name) != value:
                    raise ValueError(
                        f"image_decoder_config.{name} is {getattr(decoder, name)}, but the rest of the model gives "
                        f"{value}. Leave it out to have it filled in."
                    )
            if decoder.perceiver_config.encoder_hidden_size is None:
                decoder.perceiver_config.encoder_hidden_size = decoder.context_size
        no_unknown_keys(self, kwargs)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens Q per image."""
        return self.perceiver_config.num_queries

    @num_image_tokens.setter
    def num_image_tokens(self, value: int) -> None:
        self.perceiver_config.num_queries = value


# Keys that the library itself puts into a config: from_pretrained, save_pretrained and (use_cache) Trainer.
_LIBRARY_KEYS = {"attn_implementation", "auto_map", "name_or_path", "quantization_config"}
_LIBRARY_KEYS |= {"transformers_weights", "use_cache"}


def no_unknown_keys(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """A misspelt key must not pass silently: name it, and the nearest known one.

    A saved config may come from another version: keys of it that resemble none of ours are only reported.
    """
    known = set(type(config).__dataclass_fields__)
    for key in kwargs:
        if key in known or key in _LIBRARY_KEYS or key.startswith("_") or hasattr(PreTrainedConfig, key):
            continue
        near = get_close_matches(key, known, n=3)
        hint = (
            f" Did you mean {' or '.join(map(repr, near))}?" if near else f" Known keys: {', '.join(sorted(known))}."
        )
        message = f"{type(config).__name__} has no key {key!r} (given value: {kwargs[key]!r}).{hint}"
        if near or config.transformers_version is None:
            raise ValueError(message)
        logger.warning(message)


__all__ = ["DENOISERS", "DeemConfig", "DeemImageDecoderConfig", "DeemPerceiverConfig"]
