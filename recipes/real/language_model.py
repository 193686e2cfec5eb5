# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A language model of a GGUF file as a folder that any recipe loads as a part."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.parts import whole_folder


def write_language_model(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as an ordinary checkpoint, its quantized weights as float32.

    Args:
        gguf: of a family whose GGUF files transformers reads.
        folder: appears when it is whole.

    Raises:
        ValueError: the package `gguf` is missing, or the file is of no such family.
    """
    where = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, **where)
    except ImportError as error:
        raise ValueError(f"{gguf.name} is read by the package gguf: pip install gguf. {error}") from error
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):  # a model that was quantized is not saved
        if hasattr(config, name):
            delattr(config, name)
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
