# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The entry point by which lmms-eval finds DEEM (`--model deem`); pyproject.toml names `manifest`."""

from typing import Any

_MODELS = "recipes.evaluation.harnesses.lmms_models"


def manifest() -> Any:
    """Return lmms-eval's manifest: the chat model, and with `--force_simple` the simple one."""
    from lmms_eval.models.registry_v2 import ModelManifest  # only where lmms-eval asks

    return ModelManifest("deem", simple_class_path=f"{_MODELS}.DeemSimple", chat_class_path=f"{_MODELS}.DeemChat")
