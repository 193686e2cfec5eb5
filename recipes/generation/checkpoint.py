# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A checkpoint, and the scheduler to draw with, made ready for inference."""

from pathlib import Path

import diffusers
import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

import modeling_deem  # noqa: F401  (registers the classes with AutoModel and AutoProcessor)
from recipes.training.resuming import load_sound

# Of the recipes, which draw with DDIM. The model's own default is that of its configuration: 250 as released, where the
# sampler (DDPM) adds noise at each step.
DRAWING_STEPS = 25


def load_for_inference(checkpoint: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load model and processor, on the GPU if there is one.

    Args:
        checkpoint: folder that `save_pretrained` (or a recipe) wrote, or Hub id.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        ValueError: there is no checkpoint; names the newest intermediate one if the folder holds some. Or it is damaged.
    """
    folder = Path(checkpoint)
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    mend = f"the run was not finished, take {steps[-1]}" if steps else "`make demo` trains one in runs/demo/sft"
    try:
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(folder / "config.json")
        model = load_sound(checkpoint)
        processor = AutoProcessor.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(
            f"No checkpoint to load at {str(checkpoint)!r}: expected a folder with config.json, model.safetensors and "
            f"processor_config.json ({mend}), or the id of a Hub repository."
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def make_scheduler(model: PreTrainedModel, name: str | None = None) -> diffusers.SchedulerMixin:
    """Return the diffusers scheduler of class `name`, set up like the noise schedule that the model was trained with.

    Args:
        name: DDIM by default, which needs few steps and adds no noise; for flow matching the model's own.

    Raises:
        ValueError: diffusers has no such scheduler, or it is of another kind than the model's (flow matching against
            denoising); lists those that fit.
    """
    own = model.image_decoder.scheduler
    default = "DDIMScheduler" if isinstance(own, diffusers.DDPMScheduler) else type(own).__name__
    return model.image_decoder.make_scheduler(name or default)
