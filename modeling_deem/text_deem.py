# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Any decoder-only language model that AutoModel builds, with gated image attention in every k-th layer.

The language model stays the library's own class. Three hooks per layer add the residual between self-attention and MLP:
two note the layer's input and take the image states from self-attention's arguments, the third adds the residual to
what self-attention contributes. Letters: B sequences, T tokens, n images per sequence at most, N images, Q image tokens.
"""

import threading

import torch
from torch import nn
from transformers import AutoModel

from .attention_deem import DeemImageStates

# Of each family the child of a decoder layer whose output is self-attention's contribution to the residual stream.
# What image attention adds to it, the MLP of the same layer reads; only GPT-NeoX, whose MLP runs beside self-attention
# (use_parallel_residual), passes it to the next layer.
ATTENTION_OUTPUT = {
    "gemma": "self_attn",
    "gemma3_text": "post_attention_layernorm",  # normalizes what self-attention gives, not what the MLP reads
    "gpt_neox": "post_attention_dropout",
    "llama": "self_attn",
    "mistral": "self_attn",
    "olmo2": "post_attention_layernorm",  # as Gemma 3
    "olmo3": "post_attention_layernorm",
    "phi3": "resid_attn_dropout",
    "qwen2": "self_attn",
    "qwen3": "self_attn",
    "smollm3": "self_attn",
}


class _Held(threading.local):
    """What one thread carries through the decoder layer that it is in."""

    residual: torch.Tensor | None = None
    states: DeemImageStates | None = None


_HELD = _Held()


def _let_go(*given) -> None:
    if not torch.compiler.is_compiling():
        _HELD.residual = _HELD.states = None


class _ImageAttentionHooks:
    """The way of the image states through one decoder layer, from its entry to the end of its self-attention.

    The states travel as an argument down to self-attention. All three hooks lie inside the layer's forward, so that
    activation checkpointing, which recomputes the forward and not the layer's own hooks, runs them again.
    """

    def __init__(self, layer: nn.Module, layer_idx: int, output_name: str):
        self.key = str(layer_idx)
        self.residual: torch.Tensor | None = None
        self.states: DeemImageStates | None = None
        self.has_norm = hasattr(layer, "input_layernorm")
        if self.has_norm:
            layer.input_layernorm.register_forward_pre_hook(self.enter_layer)
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        attention.register_forward_pre_hook(self.enter_attention, with_kwargs=True)
        getattr(layer, output_name).register_forward_hook(self.add)

    def held(self):
        """Where to keep both: per thread, since threads share the hooks; in a trace, which knows no threads, here."""
        return self if torch.compiler.is_compiling() else _HELD

    def enter_layer(self, norm: nn.Module, args: tuple) -> None:
        self.held().residual = args[0]

    def enter_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        held = self.held()
        held.states = kwargs.pop("image_states", None)
        if not self.has_norm:  # families whose self-attention reads the residual stream itself
            held.residual = args[0] if args else kwargs["hidden_states"]
        return args, kwargs

    def add(self, module: nn.Module, args: tuple, output):
        held = self.held()
        (residual, states), held.residual, held.states = (held.residual, held.states), None, None
        if states is None or self.key not in states.blocks.modules:
            return output
        attended = output[0] if isinstance(output, tuple) else output
        attended = attended + states.blocks.modules[self.key](residual + attended, states)
        return (attended, *output[1:]) if isinstance(output, tuple) else attended


def attention_output_name(text_config) -> str:
    """The child of this family's decoder layers whose output is the self-attention's contribution.

    Raises:
        ValueError: a family whose layers are not known to fit, or an output head that is more than a linear layer.
    """
    name = ATTENTION_OUTPUT.get(text_config.model_type)
    if name is None:
        raise ValueError(
            f"Language models of type {text_config.model_type!r} are not supported. Supported: "
            f"{', '.join(sorted(ATTENTION_OUTPUT))}. To add a family, name in ATTENTION_OUTPUT the child of its "
            "decoder layer whose output is the self-attention's contribution."
        )
    if cap := getattr(text_config, "final_logit_softcapping", None):
        raise ValueError(
            f"The {text_config.model_type!r} language model caps its logits (final_logit_softcapping = {cap}); DEEM's "
            "output head is linear. Use a model without it, such as any Gemma 3."
        )
    return name


def embedding_name(language_model: nn.Module) -> str:
    """Name of the input embedding within the bare language model, "embed_tokens" for most families."""
    embedding = language_model.get_input_embeddings()
    return next(name for name, module in language_model.named_modules() if module is embedding)


def build_language_model(text_config) -> nn.Module:
    """The bare language model of `text_config`, ready to take `image_states` in its forward."""
    name = attention_output_name(text_config)
    language_model = AutoModel.from_config(text_config)
    for idx, layer in enumerate(language_model.layers):
        _ImageAttentionHooks(layer, idx, name)
    language_model.register_forward_hook(_let_go, always_call=True)  # also after an exception
    return language_model


def last_document_start(is_bos: torch.Tensor) -> torch.Tensor:
    """bool (B, T) -> int64 (B, T), the column of the latest bos at or before each token, -1 before the first."""
    columns = torch.arange(is_bos.shape[1], device=is_bos.device)
    return torch.where(is_bos, columns, -1).cummax(dim=1).values


def locate_images(
    is_image: torch.Tensor, is_bos: torch.Tensor, num_image_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images each row has, and which of them each token sees (spec section 3, cross-attention mask).

    A token sees an image from the image's first token on, until the next document starts.

    Args:
        is_image: bool (B, T), image tokens; every Q of them in a row are one image.
        is_bos: bool (B, T), document starts.

    Returns:
        index int64 (B, n): flat number of the k-th image of each row, 0 where a row has fewer;
        visible bool (B, T, n).
    """
    batch, length = is_image.shape
    order = is_image.cumsum(1)
    rows, columns = (is_image & (order % num_image_tokens == (1 % num_image_tokens))).nonzero(as_tuple=True)
    place = (order[rows, columns] - 1) // num_image_tokens
    most = int(place.max()) + 1 if len(place) else 0

    index = rows.new_zeros(batch, most)
    first_column = rows.new_full((batch, most), length)  # an absent image never begins
    index[rows, place] = torch.arange(len(rows), device=rows.device)
    first_column[rows, place] = columns

    token = torch.arange(length, device=is_image.device)[None, :, None]
    first_column = first_column[:, None]
    visible = (first_column <= token) & (first_column > last_document_start(is_bos)[..., None])
    return index, visible


__all__ = [
    "ATTENTION_OUTPUT",
    "attention_output_name",
    "build_language_model",
    "embedding_name",
    "last_document_start",
    "locate_images",
]
