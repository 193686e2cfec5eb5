# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LoRA by one entry of a recipe's configuration (peft): adapters in the language model, the rest trains as before.

    lora: {r: 16, lora_alpha: 32, lora_dropout: 0.05}                 # the language model
    lora: {r: 16, lora_alpha: 32, vision: true}                       # and the vision encoder

What has adapters is frozen. Everything else that `freeze` leaves trainable is trained whole, in copies that peft saves
beside the adapters (`modules_to_save`).
"""

import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from modeling_deem import adapter_targets, modules_to_save
from modeling_deem.adapters_deem import ENCODER, LANGUAGE_MODEL
from modeling_deem.text_deem import embedding_name


def adapted_parts(lora: dict[str, Any] | None) -> list[str]:
    """Return the names of the parts that get adapters instead of being trained, for `freeze_parts`."""
    if lora is None:
        return []
    return [LANGUAGE_MODEL, ENCODER] if lora.get("vision") else [LANGUAGE_MODEL]


def add_adapters(model: PreTrainedModel, lora: dict[str, Any]) -> PeftModel:
    """Return `model` with adapters, and with copies to train of all else that trains; freeze `adapted_parts` before.

    Two tensors belong to no module. The start-of-image vector does not train: the embedding of its token, to which it is
    added, trains in its stead. The null condition of the image decoder stays as it is.

    Args:
        lora: `vision`, whether the encoder gets adapters too, and fields of `peft.LoraConfig`.

    Raises:
        ValueError: `lora` has fields that LoraConfig does not know.
    """
    options = {name: value for name, value in lora.items() if name != "vision"}
    if unknown := set(options) - set(LoraConfig.__dataclass_fields__):
        raise ValueError(f"lora has unknown fields {sorted(unknown)}: give vision, or fields of peft.LoraConfig.")
    embedding = f"{LANGUAGE_MODEL}.{embedding_name(model.get_submodule(LANGUAGE_MODEL))}"
    saved = modules_to_save(model, frozen=())
    if embedding not in saved:
        options = {"trainable_token_indices": {embedding: [model.config.start_of_image_token_id]}, **options}
    targets = adapter_targets(model, adapted_parts(lora))
    with warnings.catch_warnings():  # peft would tie a head without bias
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        adapted = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=saved, **options))
    if embedding in saved and "lm_head" in saved:  # tied before, and so are the copies
        head, table = (model.get_submodule(name).modules_to_save["default"] for name in ("lm_head", embedding))
        head.weight = table.weight
    model.freeze_fixed_parts()  # in the copies too
    return adapted


def merge_adapters(adapted: PeftModel) -> PreTrainedModel:
    """Return the plain model again, with everything that was learned in its own weights."""
    return adapted.merge_and_unload()


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return isinstance(model, PeftModel)
