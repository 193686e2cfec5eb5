# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What peft is told about DEEM: which layers take adapters, and what trains whole beside them. No model needs this file.

`target_modules="all-linear"` would reach the denoiser and the VAE, and peft cannot wrap the containers of image attention.
"""

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

LANGUAGE_MODEL, ENCODER, DENOISER = "model.language_model", "model.vision_tower.encoder", "image_decoder.denoiser"
# peft cannot wrap these containers; and the modules of the image decoder are saved one by one.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_NEVER_WHOLE = ("model", "image_decoder")


def adapter_targets(model: nn.Module, parts: Sequence[str] = (LANGUAGE_MODEL,)) -> str:
    """Return `LoraConfig.target_modules`: a pattern of all linear layers in the given parts, whatever their layer number.

    Raises:
        ValueError: a part has no linear layers (a ResNet).
    """
    targets = set()
    for part in parts:
        names = {name for name, module in model.get_submodule(part).named_modules() if isinstance(module, nn.Linear)}
        if not names:
            raise ValueError(f"{part} has no linear layer to adapt. Leave it out, and train it or freeze it.")
        targets |= {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(f"{part}.{name}")) for name in names}
    return "|".join(sorted(targets))


def modules_to_save(model: PreTrainedModel, frozen: Sequence[str] = (LANGUAGE_MODEL, DENOISER)) -> list[str]:
    """Return `LoraConfig.modules_to_save`: the largest modules that train whole, so that peft copies and saves them.

    Tensors that DEEM never trains do not count. Two tensors belong to no module, and peft cannot save them: the
    start-of-image vector (train the embedding of its token, `trainable_token_indices`) and the null condition.

    Args:
        frozen: parts that do not train, or have adapters instead, besides those without gradients.
    """
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    model.freeze_fixed_parts()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name])
    inside = tuple(f"{part}." for part in frozen)

    def walk(module: nn.Module, prefix: str) -> list[str]:
        found = []
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            names = [f"{path}.{inner}" for inner, _ in child.named_parameters()]
            trains = [before[key] and not key.startswith(inside) for key in names if key in trainable]
            if all(trains) and trains and path not in _NEVER_WHOLE and not isinstance(child, _CONTAINERS):
                found.append(path)
            elif any(trains):
                found += walk(child, f"{path}.")
        return found

    return walk(model, "")
