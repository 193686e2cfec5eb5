# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A first DEEM from three pretrained parts, vision encoder, language model and diffusion pipeline; and the encoder back."""

import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers import logging as transformers_logging

from .configuration_deem import DeemConfig, DeemImageDecoderConfig
from .scheduling_deem import build_scheduler, training_config
from .text_deem import embedding_name, layer_shape
from .vision_deem import is_staged, pyramid_sides, stage_widths

# In the order in which they enter the vocabulary (spec section 1, "Special tokens").
NEW_TOKENS = ("<|startofimage|>", "<image>", "<ref>", "</ref>", "<box>", "</box>")
# Logit bias of new tokens, so that an untrained model does not write them.
NEW_TOKEN_BIAS = -5.0


def diffusers_config(module) -> dict[str, Any]:
    """Config of a diffusers module as plain JSON values, with its class name."""
    private = ("_name_or_path", "_diffusers_version", "_use_default_values")
    config = {key: value for key, value in dict(module.config).items() if key not in private}
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return {**config, "_class_name": type(module).__name__}


def empty_prompt(pipeline: "diffusers.DiffusionPipeline", num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a pipeline's text encoders say of the empty prompt.

    Where the denoiser attends to all tokens, their first `num_tokens`. Where padding is masked (PixArt, Sana), the tokens
    that are not, over and over: cross-attention to equal copies is cross-attention to one.

    Returns:
        tokens (1, num_tokens, C), and the pooled vector (1, width) if the denoiser wants one.
    """
    names, pooled, mask = inspect.signature(pipeline.encode_prompt).parameters, None, None
    with torch.no_grad():
        if "prompt_3" in names:  # Stable Diffusion 3
            tokens, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
        elif "max_sequence_length" in names:  # PixArt, Sana
            tokens, mask, _, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
            tokens = tokens[mask.bool()][None]
        else:
            longest = pipeline.text_encoder.config.max_position_embeddings
            length = {"padding": "max_length", "max_length": min(num_tokens, longest), "truncation": True}
            ids = pipeline.tokenizer("", return_tensors="pt", **length)["input_ids"]
            tokens = pipeline.text_encoder(input_ids=ids).last_hidden_state
    if mask is None and num_tokens > tokens.shape[1]:
        raise ValueError(
            f"The image decoder has {num_tokens} condition tokens, but the diffusion model's text encoder reads at "
            f"most {tokens.shape[1]}. Use num_image_tokens <= {tokens.shape[1]}, or that many num_queries in the decoder's "
            "perceiver_config."
        )
    return tokens[:, torch.arange(num_tokens) % tokens.shape[1]], pooled


def load_encoder(vision: str) -> PreTrainedModel:
    """The vision encoder of a checkpoint; of a CLIP-like pair the half that sees."""
    encoder = AutoModel.from_pretrained(vision)
    if hasattr(encoder.config, "text_config") and hasattr(encoder.config, "vision_config"):
        encoder = encoder.vision_model
    is_staged(encoder.config)  # raises for families that do not fit
    return encoder


def encoder_image_size(vision: str) -> int:
    """Side, in pixels, of the images that a checkpoint's image processor makes (they are square for DEEM).

    Raises:
        ValueError: it names no size.
    """
    # As plain values: some image processors exist for torchvision only.
    settings, _ = ImageProcessingMixin.get_image_processor_dict(vision)
    cropped = settings.get("do_center_crop") and settings.get("crop_size")
    size = cropped or settings.get("size") or {}
    size = {"height": size} if isinstance(size, int) else size
    if side := size.get("height") or size.get("shortest_edge"):
        return side
    if "max_num_patches" in settings:  # SigLIP 2 keeps proportions; of a square image it makes
        return math.isqrt(settings["max_num_patches"]) * settings["patch_size"]
    raise ValueError(f"The image processor of {vision} names no size: {settings}. Give image_size.")


class _PartOfPipeline(diffusers.ConfigMixin):
    """Reads the configs of parts; diffusers' AutoModel, once it has loaded one, reads the pipeline's instead."""

    config_name = "config.json"


def drawn_size(diffusion: str) -> int:
    """Side of the images, in pixels, that a diffusers pipeline folder draws."""
    denoiser = "transformer" if "transformer" in diffusers.DiffusionPipeline.load_config(diffusion) else "unet"
    configs = {name: _PartOfPipeline.load_config(diffusion, subfolder=name) for name in (denoiser, "vae")}
    return DeemImageDecoderConfig(denoiser=configs[denoiser], vae=configs["vae"]).target_size


def joint_sizes(width: int) -> dict[str, Any]:
    """Fields of `DeemConfig` for what joins the parts, from the width of the encoder's last map.

    Heads are 64 wide, or a quarter of a width below 256. For 1024 (the released ConvNeXt-B) these are the published sizes.
    """
    head = 64 if width >= 256 else math.ceil(width / 4)
    heads = math.ceil(width / head)
    queries = math.ceil(3 * heads / 4)  # heads of the perceiver
    return {
        "feature_size": heads * head,
        "image_attention_heads": heads,
        "perceiver_config": {
            "hidden_size": queries * head,
            "num_attention_heads": queries,
            "intermediate_size": 4 * queries * head,
            "num_hidden_layers": min(max(queries, 2), 12),
        },
        "image_decoder_config": {"fusion_size": heads * head, "fusion_heads": heads},
    }


def compose_config(
    encoder: PreTrainedModel,
    language_model: PreTrainedModel,
    pipeline: "diffusers.DiffusionPipeline",
    tokenizer: PreTrainedTokenizerBase,
    image_size: int,
    num_image_tokens: int,
    overrides: dict[str, Any],
) -> DeemConfig:
    """What the parts say, then what the caller says; see `from_vision_text_diffusion_pretrained`.

    Raises:
        ValueError: the tokenizer lacks the image tokens, or a part is of no supported kind.
    """
    text_config = language_model.config
    text_config.vocab_size = max(len(language_model.get_input_embeddings().weight), len(tokenizer))
    sides = pyramid_sides(encoder.config, image_size)
    width = encoder.config.hidden_size if not is_staged(encoder.config) else stage_widths(encoder.config)[-1]
    sizes = joint_sizes(overrides.get("feature_size", width))
    perceiver_config = sizes.pop("perceiver_config") | {"num_queries": num_image_tokens}
    perceiver_config |= overrides.pop("perceiver_config", {})
    decoder_config = {
        **sizes.pop("image_decoder_config"),
        "denoiser": diffusers_config(denoiser_of(pipeline)),
        "vae": diffusers_config(pipeline.vae),
        "scheduler": diffusers_config(build_scheduler(training_config(diffusers_config(pipeline.scheduler)))),
        "feature_sides": sides,
        **overrides.pop("image_decoder_config", {}),
    }
    size = DeemImageDecoderConfig(denoiser=decoder_config["denoiser"]).condition_size
    decoder_config["perceiver_config"] = {
        **{"num_queries": perceiver_config["num_queries"], "hidden_size": size, "intermediate_size": 3 * size},
        **{"num_hidden_layers": 1, "num_attention_heads": max(1, size // 64)},
        **{"cross_attention_frequency": 1, "qk_norm": False},
        **decoder_config.get("perceiver_config", {}),
    }
    if missing := [token for token in NEW_TOKENS[:2] if token not in tokenizer.get_vocab()]:
        raise ValueError(
            f"The tokenizer lacks {' and '.join(missing)}. Give the tokenizer of a DeemProcessor, or none to have "
            "them added."
        )
    start, image = tokenizer.convert_tokens_to_ids(NEW_TOKENS[:2])
    return DeemConfig(
        vision_config=encoder.config,
        text_config=text_config,
        perceiver_config=perceiver_config,
        image_decoder_config=decoder_config,
        start_of_image_token_id=start,
        image_token_id=image,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        position_grid_side=sides[2],
        image_attention_sides=sides[1:],
        image_attention_base_side=sides[2],
        **{**sizes, **overrides},
    )


def add_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The language model's own tokenizer with `NEW_TOKENS`.

    Raises:
        ValueError: it has no bos, eos or pad of its own, or one token for two of them: a processor adds what is missing,
            and model and processor must agree on its ids.
    """
    own = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad")}
    if None in own.values() or own["bos"] == own["eos"]:
        raise ValueError(
            f"The language model's tokenizer has the tokens {own}; DEEM needs all three, bos unlike eos. Make the processor "
            "first, DeemProcessor.from_parts(image_processor, tokenizer, num_image_tokens, target_size), and give this call "
            "its tokenizer: tokenizer=processor.tokenizer."
        )
    tokenizer.add_special_tokens({"extra_special_tokens": list(NEW_TOKENS)}, replace_extra_special_tokens=False)
    return tokenizer


def denoiser_of(pipeline: "diffusers.DiffusionPipeline") -> nn.Module:
    return getattr(pipeline, "transformer", None) or pipeline.unet


def text_weights(language_model: PreTrainedModel, config: DeemConfig, new: torch.Tensor) -> dict[str, torch.Tensor]:
    """The language model's tensors under their new names, embedding and head grown to the vocabulary of `config`.

    Args:
        new: ids of the tokens that the language model does not know.
    """
    body, output = language_model.base_model, language_model.get_output_embeddings()
    state = {f"model.language_model.{name}": tensor for name, tensor in body.state_dict().items()}
    state |= {f"lm_head.{name}": tensor for name, tensor in output.state_dict().items()}
    embeddings = f"model.language_model.{embedding_name(body)}.weight"
    head, bias = "lm_head.weight", "lm_head.bias"
    old, width = state[embeddings].shape
    grown = config.text_config.vocab_size - old
    state[embeddings] = F.pad(state[embeddings], (0, 0, 0, grown))
    state[embeddings][new] = (
        torch.randn(len(new), width).mul(config.text_config.initializer_range).to(state[embeddings])
    )
    if config.tie_word_embeddings:
        state[head] = state[embeddings]
    else:
        state[head] = F.pad(state[head], (0, 0, 0, grown))
        state[head][new] = 0.0
    if config.lm_head_bias:
        state[bias] = F.pad(state.get(bias, torch.zeros(old)), (0, grown))
        state[bias][new] = NEW_TOKEN_BIAS
    return state


def diffusion_weights(pipeline: "diffusers.DiffusionPipeline", num_tokens: int) -> dict[str, torch.Tensor]:
    """Denoiser and VAE under their new names, and the empty prompt as the null condition of `num_tokens` tokens."""
    state = {}
    for part, module in {"denoiser": denoiser_of(pipeline), "vae": pipeline.vae}.items():
        state |= {f"image_decoder.{part}.{name}": tensor for name, tensor in module.state_dict().items()}
    tokens, pooled = empty_prompt(pipeline, num_tokens)
    state["image_decoder.null_condition"] = tokens.float()
    if pooled is not None:  # at first every image has that of the empty prompt
        state["image_decoder.pooled_projector.weight"] = torch.zeros(pooled.shape[1], tokens.shape[2])
        state["image_decoder.pooled_projector.bias"] = pooled[0].float()
    return state


def load_parts(cls, config: DeemConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A model of class `cls` with the tensors of `state`; what is missing is initialized.

    Raises:
        ValueError: a tensor has no place or another shape.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the joints are newly initialized is the point
    try:
        model, report = cls.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, dtype=dtype
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"The parts do not fit together: no place for {sorted(report['unexpected_keys'])[:5]}, other shapes for "
            f"{sorted(report['mismatched_keys'])[:5]}."
        )
    return model


class ComposeMixin:
    @classmethod
    def from_vision_text_diffusion_pretrained(
        cls,
        vision: str,
        text: str,
        diffusion: str,
        num_image_tokens: int = 77,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_size: int | None = None,
        dtype: torch.dtype | None = None,
        freeze: Sequence[str] = ("model.language_model", "image_decoder.denoiser"),
        **config_overrides,
    ):
        """Composes a model from three checkpoints or folders; everything that joins them starts fresh.

        With gates and fusion convolutions at zero, it writes as the language model and denoises as the denoiser.

        Args:
            vision: an encoder of a supported family, alone or in a CLIP-like pair, with its image processor.
            text: a causal language model with its tokenizer.
            diffusion: a diffusers pipeline: Stable Diffusion 1, 2 or 3, PixArt or Sana, with its text encoders.
            num_image_tokens: Q, image tokens per image and condition tokens of the image decoder.
            tokenizer: the processor's; by default the language model's own, if it has bos, eos and pad, with `NEW_TOKENS`.
                New tokens start with embeddings N(0, initializer_range), output weights 0 and output bias -5.
            image_size: side of the encoder's images in pixels; by default that of its image processor.
            dtype: of the model; by default the language model's. The VAE stays in float32.
            freeze: parts that do not train; by default as in stage 1 of the paper. A loaded model trains whole again.
            config_overrides: further fields of `DeemConfig`; dicts are merged into what follows from the parts. Sizes of
                what joins them follow the encoder's width, see `joint_sizes`.

        Returns:
            The model, in evaluation mode. Its processor: `DeemProcessor.from_parts`.
        """
        encoder = load_encoder(vision)
        language_model = AutoModelForCausalLM.from_pretrained(text)
        layer_shape(language_model.config)  # raises for families that do not fit
        pipeline = diffusers.DiffusionPipeline.from_pretrained(diffusion)
        known = AutoTokenizer.from_pretrained(text)
        tokenizer = add_tokens(AutoTokenizer.from_pretrained(text)) if tokenizer is None else tokenizer
        sizes = (image_size or encoder_image_size(vision), num_image_tokens)
        config = compose_config(encoder, language_model, pipeline, tokenizer, *sizes, config_overrides)

        # The parts under their new names; what is missing is initialized by the model.
        new = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(known.get_vocab().values())))
        state = {f"model.vision_tower.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
        state |= text_weights(language_model, config, new)
        state |= diffusion_weights(pipeline, config.image_decoder_config.perceiver_config.num_queries)
        model = load_parts(cls, config, state, dtype or language_model.dtype)
        for part in freeze:
            model.get_submodule(part).requires_grad_(False)
        model.generation_config.bos_token_id = config.bos_token_id
        model.generation_config.eos_token_id = [config.eos_token_id, config.start_of_image_token_id]
        model.generation_config.pad_token_id = config.pad_token_id
        return model

    def export_encoder(self, folder: str | os.PathLike, processor: ProcessorMixin | BaseImageProcessor) -> None:
        """Save the vision encoder and an image processor of transformers' own, to be loaded without this package.

        `AutoModel.from_pretrained(folder)` and `AutoImageProcessor.from_pretrained(folder)` give what this model sees: the
        same pixels, but for images that DEEM's center crop (`do_center_crop`) first halves, and for SigLIP 2, whose image
        processor keeps proportions.

        Args:
            processor: the model's, or its image processor: its size, mean, standard deviation and filter are written.
        """
        from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil, ViTImageProcessorPil

        images, encoder = getattr(processor, "image_processor", processor), self.model.vision_tower.encoder
        numbers = {"image_mean": images.image_mean, "image_std": images.image_std, "resample": images.resample}
        size = dict(images.size)
        if encoder.config.model_type == "siglip2_vision_model":
            patch = encoder.config.patch_size
            patches = (size["height"] // patch) * (size["width"] // patch)
            own = Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=patches, **numbers)
        elif images.do_center_crop:
            own = CLIPImageProcessorPil(size={"shortest_edge": size["height"]}, crop_size=size, **numbers)
        else:
            own = ViTImageProcessorPil(size=size, do_convert_rgb=True, **numbers)
        encoder.save_pretrained(folder)
        own.save_pretrained(folder)
