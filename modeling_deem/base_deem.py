# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Base class of all DEEM models: how every tensor starts, and what transformers may do with the models."""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .attention_deem import DeemFeatureSynchronizer, DeemImageAttention
from .configuration_deem import DeemConfig
from .fusion_deem import DeemFusionBlock
from .perceiver_deem import DeemPerceiver
from .vision_deem import DeemVisionTower, has_attention

logger = logging.get_logger(__name__)


def mark_upstream(module: nn.Module) -> None:
    """Tell `_init_weights` that a part built by another library starts as that library starts it.

    transformers would otherwise re-initialize every diffusers module to N(0, 0.02), and leave buffers that no
    checkpoint holds (PixArt's position table) as memory happens to be.
    """
    fixed: dict[str, torch.Tensor] = {}
    if any(part._non_persistent_buffers_set for part in module.modules()):
        with torch.device("cpu"), init_empty_weights(include_buffers=False):
            fixed = dict(type(module).from_config(module.config).named_buffers())
    for prefix, part in module.named_modules():
        names = part._non_persistent_buffers_set
        part._fixed_buffers = {name: fixed[f"{prefix}.{name}".removeprefix(".")] for name in names}


# Quantizers convert every linear layer unless told otherwise: these see images, draw them, and choose the next token.
# Each in the two names it has, in DeemModel and in DeemForConditionalGeneration.
_UNQUANTIZED = ["vision_tower", "perceiver", "projector", "image_attention", "lm_head", "image_decoder"]
UNQUANTIZED = _UNQUANTIZED + [f"model.{part}" for part in _UNQUANTIZED[:4]]


def quantize_language_model_only(config: QuantizationConfigMixin | dict[str, Any]) -> QuantizationConfigMixin:
    """A copy of a quantization config that skips all but the language model, unless it has a list of its own.

    The list is called `llm_int8_skip_modules` by bitsandbytes, `modules_to_not_convert` by torchao and most others.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):
        if hasattr(config, name) and getattr(config, name) in (None, ["lm_head"]):
            setattr(config, name, list(UNQUANTIZED))
    return config


class DeemPreTrainedModel(PreTrainedModel):
    """Base of `DeemModel`, `DeemForConditionalGeneration` and `DeemImageDecoder`."""

    config: DeemConfig
    config_class = DeemConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # the steps of generation
    _skip_keys_device_placement = ["past_key_values", "fusion"]
    _no_split_modules = ["DeemImageAttention", "DeemFusionBlock", "DeemPerceiverLayer"]

    @classmethod
    def from_pretrained(cls, *args, quantization_config: QuantizationConfigMixin | dict | None = None, **kwargs):
        """As in transformers, whose loader makes every tensor trainable; what DEEM never trains is frozen again.

        Args:
            quantization_config: of any method; what it does not say to skip is, except for the language model, see
                `quantize_language_model_only`.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = quantize_language_model_only(quantization_config)
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_fixed_parts()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """As in transformers, and `code_digests.json`: the SHA-256 of each code file the model ran with."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            path = Path(save_directory) / "code_digests.json"
            digests = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            for file in Path(__file__).parent.glob("*_deem.py"):
                if file.stem not in ("adapters_deem", "training_deem") and not file.stem.startswith("feedback_"):
                    # no DEEM runs those
                    digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            path.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As in transformers; one name for the whole model is set where it applies: ConvNeXt attends to nothing."""
        if isinstance(attn_implementation, str):
            towers = [module for module in self.modules() if isinstance(module, DeemVisionTower)]
            left_out = {"vision_config" for one in towers if not has_attention(type(one.encoder), attn_implementation)}
            parts = {"", *self.config.sub_configs} - left_out
            attn_implementation = dict.fromkeys(parts, attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        # Image features reach the layers beside their positional arguments, where reentrant checkpointing loses their
        # gradient.
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if options.get("use_reentrant"):
            logger.warning_once(
                "DEEM checkpoints activations with use_reentrant=False; use_reentrant=True is ignored."
            )
            gradient_checkpointing_func = partial(checkpoint, **{**options, "use_reentrant": False})
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def smart_apply(self, fn: Callable, is_custom_code: bool) -> nn.Module:
        # transformers' walk of initialize_weights. For code from outside it passes over modules without tensors of their
        # own, for fear of writes that overlook what is loaded already. Ours heed it, and CLIP starts its weights there.
        return super().smart_apply(fn, is_custom_code=False)

    def freeze_fixed_parts(self) -> None:
        """No gradients for the VAE and for the null values of the UNet side (spec section 9)."""
        for module in self.modules():
            for part in getattr(module, "fixed_parts", list)():
                part.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values (spec section 1, "Initialization"):

        | tensor | start |
        |---|---|
        | linear and conv weights, queries | N(0, initializer_range of the config, in perceivers of theirs), bias 0 |
        | projections of image tokens to language and condition width | N(0, 1e-3), bias 0 |
        | gates, fusion convolutions, start_of_image, null values, offset weights | 0 |
        | offset biases | U(-offset_range, offset_range) |
        | value and output projections of the synchronizer | Xavier uniform |
        | relative-position table | truncated N(0, 0.02) |
        | sin-cos tables | computed |
        | diffusers parts | as diffusers starts them |
        """
        if hasattr(module, "_fixed_buffers"):  # a part of another library
            own = [p for p in module.parameters(recurse=False) if not getattr(p, "_is_hf_initialized", False)]
            if own and hasattr(module, "reset_parameters"):  # under ZeRO-3 what is loaded already has no shape here
                module.reset_parameters()
            elif own:
                for parameter in own:  # scale and shift tables of transformers
                    init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            for name, value in module._fixed_buffers.items():
                init.copy_(getattr(module, name), value)
            return
        if (std := getattr(module, "_init_std", None)) is not None:
            init.normal_(module.weight, std=std) if std > 0 else init.zeros_(module.weight)
            init.zeros_(module.bias)
            return
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeemFeatureSynchronizer):
            init.zeros_(module.sampling_offsets.weight)
            init.uniform_(module.sampling_offsets.bias, -module.offset_range, module.offset_range)
            for projection in (module.value_projection, module.output_projection):
                init.xavier_uniform_(projection.weight)
            init.trunc_normal_(module.image_positions, std=0.02)
            init.zeros_(module.null_value)
        elif isinstance(module, DeemImageAttention):
            init.zeros_(module.gate)
        elif isinstance(module, DeemPerceiver):
            init.normal_(module.queries, std=module.initializer_range)
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    init.normal_(linear.weight, std=module.initializer_range)
        elif isinstance(module, DeemVisionTower | DeemFusionBlock):
            init.copy_(module.positions, module.compute_positions())
        if hasattr(module, "start_of_image"):
            init.zeros_(module.start_of_image)
        if hasattr(module, "null_condition"):
            init.normal_(module.null_condition, std=std)
