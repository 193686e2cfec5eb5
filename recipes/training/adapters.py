# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LoRA by one entry of a recipe's configuration (peft): adapters in the language model, the rest trains as before.

    lora: {r: 16, lora_alpha: 32, lora_dropout: 0.05}                 # the language model
    lora: {r: 16, lora_alpha: 32, vision: true}                       # and the vision encoder

What has adapters is frozen. Everything else that `freeze` leaves trainable is trained whole, in copies that peft saves
beside the adapters (`modules_to_save`).
"""

import re
import warnings
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from modeling_deem.text_deem import embedding_name

LANGUAGE_MODEL, ENCODER = "model.language_model", "model.vision_tower.encoder"
# peft cannot wrap these containers; and the modules of the image decoder are saved one by one.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_NEVER_WHOLE = ("model", "image_decoder")


def adapted_parts(lora: dict[str, Any] | None) -> list[str]:
    """Return the names of the parts that get adapters instead of being trained, for `freeze_parts`."""
    if lora is None:
        return []
    return [LANGUAGE_MODEL, ENCODER] if lora.get("vision") else [LANGUAGE_MODEL]


def adapter_targets(model: nn.Module, parts: list[str]) -> str:
    """Return a pattern of the names of all linear layers in the given parts, whatever their layer number.

    Raises:
        ValueError: a part has no linear layers (a ResNet).
    """
    targets = set()
    for part in parts:
        names = {name for name, module in model.get_submodule(part).named_modules() if isinstance(module, nn.Linear)}
        if not names:
            raise ValueError(
                f"{part} has no linear layer to adapt. Leave vision out of lora, and train it or freeze it."
            )
        targets |= {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(f"{part}.{name}")) for name in names}
    return "|".join(sorted(targets))


def trained_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the largest modules that train as a whole, apart from tensors that DEEM never trains."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    model.freeze_fixed_parts()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])

    def walk(module: nn.Module, prefix: str) -> list[str]:
        found = []
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            trains = [
                before[key] for key in (f"{path}.{inner}" for inner, _ in child.named_parameters()) if key in trainable
            ]
            if all(trains) and trains and path not in _NEVER_WHOLE and not isinstance(child, _CONTAINERS):
                found.append(path)
            elif any(trains):
                found += walk(child, f"{path}.")
        return found

    return walk(model, "")


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
    embedding, saved = (
        f"{LANGUAGE_MODEL}.{embedding_name(model.get_submodule(LANGUAGE_MODEL))}",
        trained_modules(model),
    )
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
