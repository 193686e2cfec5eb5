# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Any decoder-only language model that AutoModel builds, with gated image attention in every k-th layer.

The language model stays the library's own class, and so do its layers: those with image attention get a forward that
adds one line between self-attention and MLP, one forward per layer shape. Letters: B sequences, T tokens, D width.
"""

from functools import cache

import torch
from torch import nn
from transformers import AutoModel

from .image_states_deem import DeemImageStates


class ImageLayerMixin:
    """Base of the layer shapes below.

    Attributes:
        image_attention: the model's `DeemImageAttention` of every such layer, by layer number. Not registered here: the
            tensors belong to the model, whose checkpoints name them once. Held as a whole, so that a module that takes
            the place of one (an adapter) takes part.
        layer_key: this layer's number.
    """

    image_attention: nn.ModuleDict
    layer_key: str

    def with_images(
        self, hidden_states: torch.Tensor, attended: torch.Tensor, image_states: DeemImageStates | None
    ) -> torch.Tensor:
        """What self-attention adds to the hidden states, (B, T, D), and with it what the images add to both."""
        if image_states is None:
            return attended
        return attended + self.image_attention[self.layer_key](hidden_states + attended, image_states)


class PreNormLayer(ImageLayerMixin):
    """Llama, Mistral, Qwen 2 and 3, SmolLM3, Gemma."""

    def forward(self, hidden_states: torch.Tensor, image_states: DeemImageStates | None = None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.with_images(hidden_states, attended, image_states)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DropoutLayer(ImageLayerMixin):
    """Phi-3: pre-norm with dropout on what each part adds."""

    def forward(self, hidden_states: torch.Tensor, image_states: DeemImageStates | None = None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        attended = self.resid_attn_dropout(attended)
        hidden_states = hidden_states + self.with_images(hidden_states, attended, image_states)
        return hidden_states + self.resid_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class PostNormLayer(ImageLayerMixin):
    """OLMo 2 and 3: norms behind self-attention and MLP."""

    def forward(self, hidden_states: torch.Tensor, image_states: DeemImageStates | None = None, **kwargs):
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        attended = self.post_attention_layernorm(attended)
        hidden_states = hidden_states + self.with_images(hidden_states, attended, image_states)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


class SandwichNormLayer(ImageLayerMixin):
    """Gemma 3: norms before and behind self-attention and MLP."""

    def forward(self, hidden_states: torch.Tensor, image_states: DeemImageStates | None = None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        attended = self.post_attention_layernorm(attended)
        hidden_states = hidden_states + self.with_images(hidden_states, attended, image_states)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden_states)))


class ParallelLayer(ImageLayerMixin):
    """GPT-NeoX: the MLP runs beside self-attention, so that the next layer is the first to read what images add."""

    def forward(self, hidden_states: torch.Tensor, image_states: DeemImageStates | None = None, **kwargs):
        attended, _ = self.attention(self.input_layernorm(hidden_states), **kwargs)
        attended = self.with_images(hidden_states, self.post_attention_dropout(attended), image_states)
        if self.use_parallel_residual:
            update = self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
            return update + attended + hidden_states
        hidden_states = attended + hidden_states
        return self.post_mlp_dropout(self.mlp(self.post_attention_layernorm(hidden_states))) + hidden_states


# The layer shape of each family.
LAYERS: dict[str, type[ImageLayerMixin]] = {
    "gemma": PreNormLayer,
    "gemma3_text": SandwichNormLayer,
    "gpt_neox": ParallelLayer,
    "llama": PreNormLayer,
    "mistral": PreNormLayer,
    "olmo2": PostNormLayer,
    "olmo3": PostNormLayer,
    "phi3": DropoutLayer,
    "qwen2": PreNormLayer,
    "qwen3": PreNormLayer,
    "smollm3": PreNormLayer,
}


def layer_shape(text_config) -> type[ImageLayerMixin]:
    """Return the forward that the layers of this language model get.

    Raises:
        ValueError: a family whose layers are not known to fit, or an output head that is more than a linear layer.
    """
    shape = LAYERS.get(text_config.model_type)
    if shape is None:
        raise ValueError(
            f"Language models of type {text_config.model_type!r} are not supported. Supported: "
            f"{', '.join(sorted(LAYERS))}. To add a family, name the shape of its decoder layers in LAYERS."
        )
    if cap := getattr(text_config, "final_logit_softcapping", None):
        raise ValueError(
            f"The {text_config.model_type!r} language model caps its logits (final_logit_softcapping = {cap}); DEEM's "
            "output head is linear. Use a model without it, such as any Gemma 3."
        )
    return shape


@cache
def _mixed_class(shape: type[ImageLayerMixin], layer_class: type[nn.Module]) -> type[nn.Module]:
    # Under the library's own name, by which FSDP, device maps and activation checkpointing know their layers.
    return type(layer_class.__name__, (shape, layer_class), {"__module__": layer_class.__module__})


def embedding_name(language_model: nn.Module) -> str:
    """Return the name of the input embedding within the bare language model, "embed_tokens" for most families."""
    embedding = language_model.get_input_embeddings()
    return next(name for name, module in language_model.named_modules() if module is embedding)


def build_language_model(text_config, image_attention: nn.ModuleDict) -> nn.Module:
    """Return the bare language model of `text_config`, whose forward also takes `image_states`.

    Args:
        image_attention: `DeemImageAttention` by layer number; only these layers are touched.
    """
    shape = layer_shape(text_config)
    language_model = AutoModel.from_config(text_config)
    for key in image_attention:
        layer = language_model.layers[int(key)]
        layer.__class__ = _mixed_class(shape, type(layer))
        layer.layer_key = key
        object.__setattr__(layer, "image_attention", image_attention)  # past nn.Module, which would register it
    return language_model
