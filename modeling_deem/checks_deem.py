# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a batch must be for the model to compute with it; said in words before anything is computed."""

from typing import Any

import torch

# name -> (dimensions, whether it holds whole numbers, what it is)
TENSORS = {
    "input_ids": (2, True, "token ids (B, T)"),
    "labels": (2, True, "target ids (B, T)"),
    "inputs_embeds": (3, False, "embeddings (B, T, D)"),
    "pixel_values": (4, False, "images (N, 3, h, h)"),
    "target_pixel_values": (4, False, "images (N, 3, H, H) in [-1, 1]"),
    "target_latents": (4, False, "latents (N, C, s, s)"),
    "region_masks": (4, None, "masks (N, 1, h, h) in {0, 1}"),
}
MADE_BY_PROCESSOR = "Both come of processor.image_processor(images, return_targets=True, return_tensors='pt')."


def check_inputs(**given: Any) -> None:
    """Check kinds, dimensions and lengths of what `forward` is given, by name; None passes.

    Raises:
        ValueError: a tensor of another kind or shape than `TENSORS` says, or texts of different lengths.
    """
    for name, (dimensions, whole, meaning) in TENSORS.items():
        value = given.get(name)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{name} is {str(value)[:80]!r} of type {type(value).__name__}; expected a tensor: {meaning}."
            )
        if value.dim() != dimensions:
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}; expected {dimensions} dimensions: {meaning}."
            )
        fits = value.dtype in (torch.int64, torch.int32) if whole else value.is_floating_point() or whole is None
        if not fits:
            kind = "whole numbers (torch.long)" if whole else "floating-point numbers"
            raise ValueError(f"{name} is of type {value.dtype}; expected {kind}: {meaning}.")
        if "images" in meaning and (value.shape[1] != 3 or value.shape[2] != value.shape[3]):
            raise ValueError(
                f"{name} has the shape {tuple(value.shape)}; expected squares of three channels: {meaning}."
            )
    text = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    mask, labels = given.get("attention_mask"), given.get("labels")
    masks = [one for one in (mask.values() if isinstance(mask, dict) else [mask]) if one is not None]
    if (mask is not None and not masks) or not all(isinstance(one, torch.Tensor) for one in masks):
        raise ValueError(
            f"attention_mask is {str(mask)[:80]!r}; expected a tensor (B, T), 1 for tokens and 0 for padding."
        )
    if isinstance(mask, torch.Tensor) and text is not None and given.get("past_key_values") is None:
        if mask.dim() == 1 or (mask.dim() == 2 and mask.shape != text.shape[:2]):
            raise ValueError(
                f"attention_mask has the shape {tuple(mask.shape)} for a text of {tuple(text.shape[:2])} tokens."
            )
    if labels is not None and text is not None and labels.shape != text.shape[:2]:
        raise ValueError(f"labels have the shape {tuple(labels.shape)} for a text of {tuple(text.shape[:2])} tokens.")


def check_targets(targets: torch.Tensor, mend: str, pixel_values: torch.Tensor | None = None) -> None:
    """Check images to be redrawn, (N, 3, H, H) in [-1, 1]; with the encoder's input (N, 3, h, w), that they are others.

    Args:
        mend: a sentence that says what makes them.

    Raises:
        ValueError: none, another number than images, the encoder's input itself, or outside of [-1, 1].
    """
    count = len(targets) if pixel_values is None else len(pixel_values)
    if len(targets) != count or not count:
        raise ValueError(
            f"{len(targets)} target images for {count} images: give one or more images, and one target for each, in the "
            f"same order. {mend}"
        )
    low, high = (float(edge) for edge in targets.aminmax())
    if targets is pixel_values or not (-1.001 <= low and high <= 1.001):
        raise ValueError(
            f"target_pixel_values lie in [{low:.2f}, {high:.2f}]; expected the same images in [-1, 1], apart from the "
            f"encoder's input, which is normalized for the encoder. {mend}"
        )
