# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The reductions of DEEM's three losses, as pure functions (paper: L_NTP, L_NIP, L_CSR)."""

import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss


def text_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Next-token cross entropy in float32 (L_NTP).

    Args:
        logits: (B, T, V).
        labels: (B, T), unshifted, -100 where nothing is to be learned.
        num_items_in_batch: targets of the whole optimizer step (gradient accumulation, ranks); without it the mean
            over the targets given here. No target at all gives 0.
        shift_labels: (B, T), targets already aligned with the logits; they take the place of `labels`.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != -100).sum().clamp(min=1)
    return ForCausalLMLoss(logits, None, logits.shape[-1], num_items_in_batch, shift_labels=shift_labels)


def region_mean(errors: torch.Tensor, regions: torch.Tensor | None) -> torch.Tensor:
    """Mean error inside each image's region, averaged over images (L_CSR; spec section 2, step 10).

    Args:
        errors: (N, C, s, s) squared errors.
        regions: (N, 1, s, s) in {0, 1}; None for whole images.
    """
    if regions is None:
        return errors.mean()
    cells = errors.shape[-2] * errors.shape[-1]
    return (errors * regions * cells / (regions.sum((1, 2, 3), keepdim=True) + 1e-8)).mean()


def supervised_mean(errors: torch.Tensor, supervised: torch.Tensor, reduction: str = "supervised") -> torch.Tensor:
    """Mean error over supervised images (L_NIP; spec section 7).

    Args:
        errors: (N, C, s, s) squared errors.
        supervised: bool (N,).
        reduction: "supervised" divides by the supervised images, "all" by every image (the released rule).
    """
    per_image = errors.flatten(1).mean(1) * supervised.to(errors.dtype)
    if reduction == "all":
        return per_image.mean()
    return per_image.sum() / supervised.sum().clamp(min=1)
