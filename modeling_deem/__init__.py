# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""DEEM for transformers: importing this package (or `processing`) registers model type "deem" with the Auto classes."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .adapters_deem import adapter_targets, modules_to_save
from .composing_deem import drawn_size
from .configuration_deem import DeemConfig, DeemImageDecoderConfig, DeemPerceiverConfig
from .feedback_configuration_deem import DeemFeedbackConfig
from .feedback_deem import DeemFeedback
from .image_decoder_deem import DeemImageDecoder
from .image_error_deem import DeemImageError
from .modeling_deem import DeemForConditionalGeneration, DeemModel, DeemOutput

AutoConfig.register("deem", DeemConfig, exist_ok=True)
AutoConfig.register("deem_feedback", DeemFeedbackConfig, exist_ok=True)
AutoConfig.register("deem_image_decoder", DeemImageDecoderConfig, exist_ok=True)
AutoModel.register(DeemConfig, DeemForConditionalGeneration, exist_ok=True)  # a loaded DEEM can always generate
AutoModel.register(DeemFeedbackConfig, DeemFeedback, exist_ok=True)
AutoModel.register(DeemImageDecoderConfig, DeemImageDecoder, exist_ok=True)
AutoModelForImageTextToText.register(DeemConfig, DeemForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(DeemConfig, DeemForConditionalGeneration, exist_ok=True)

from processing import DeemImageProcessor, DeemImageProcessorPil, DeemProcessor  # noqa: E402

_classes = {"pil": DeemImageProcessorPil, "torchvision": DeemImageProcessor}
AutoImageProcessor.register(DeemConfig, image_processor_classes=_classes, exist_ok=True)
AutoProcessor.register(DeemConfig, DeemProcessor, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Import the trainers where they are asked for: a model that only answers needs no `transformers.Trainer`."""
    if name == "ConsistencyLossMixin":
        from .feedback_training_deem import ConsistencyLossMixin

        return ConsistencyLossMixin
    if name != "DeemTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .training_deem import DeemTrainer

    return DeemTrainer


__version__ = "0.1.0"
__all__ = [
    "ConsistencyLossMixin",
    "DeemConfig",
    "DeemFeedback",
    "DeemFeedbackConfig",
    "DeemForConditionalGeneration",
    "DeemImageDecoder",
    "DeemImageDecoderConfig",
    "DeemImageError",
    "DeemImageProcessor",
    "DeemImageProcessorPil",
    "DeemModel",
    "DeemOutput",
    "DeemPerceiverConfig",
    "DeemProcessor",
    "DeemTrainer",
    "adapter_targets",
    "drawn_size",
    "modules_to_save",
]
