# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Read files of weights, and write a converted model."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import logging as transformers_logging

from modeling_deem import DeemForConditionalGeneration
from recipes.original.conversion import Conversion

REPORT = "conversion.json"


def load_weights(paths: Iterable[str | Path], allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Read the tensors of one or several files, sorted by name.

    Raises:
        ValueError: for a pickle without `allow_pickle`, another kind of file, or a name with two values.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in map(Path, paths):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.suffix in (".bin", ".pt", ".pth"):
            if not allow_pickle:
                raise ValueError(
                    f"{path} is a pickle. Convert it to .safetensors, or read it with --allow-pickle (only tensors "
                    "are unpickled, nothing is executed)."
                )
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
            if others := [name for name, value in tensors.items() if not torch.is_tensor(value)]:
                raise ValueError(f"{path} holds more than tensors: {others[:5]}. Expected a state dict.")
        else:
            raise ValueError(f"{path} is neither .safetensors nor .bin.")
        for name, tensor in tensors.items():
            if name in weights and not torch.equal(weights[name], tensor):
                raise ValueError(f"{name!r} of {path} has another value in an earlier file. Leave one of them out.")
        weights |= tensors
    return dict(sorted(weights.items()))


def largest_dtype(state: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the floating type of most elements."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
    return sizes.most_common(1)[0][0]


def shapes_of(build: Callable[[], torch.nn.Module]) -> dict[str, torch.Size]:
    """Return names and shapes of a model's state, without allocating it."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def save_model(model_class: type, config: Any, conversion: Conversion, out: Path) -> torch.nn.Module:
    """Write the model and the account of its conversion (`conversion.json`)."""
    verbosity = transformers_logging.get_verbosity()
    if conversion.fresh:
        transformers_logging.set_verbosity_error()  # listed by the summary, with reasons
    torch.manual_seed(0)  # fresh tensors are the same each time
    try:
        model = model_class.from_pretrained(
            None, config=config, state_dict=dict(conversion.state), dtype=largest_dtype(conversion.state)
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if model_class is DeemForConditionalGeneration:
        model.generation_config.bos_token_id = config.bos_token_id
        model.generation_config.eos_token_id = [config.eos_token_id, config.start_of_image_token_id]
        model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(out)
    account = {"sources": conversion.sources, "fresh": conversion.fresh}
    (out / REPORT).write_text(json.dumps(account, indent=1) + "\n")
    return model
