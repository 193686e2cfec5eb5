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
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != -100).sum()
    count = torch.as_tensor(num_items_in_batch, device=shift_labels.device).clamp(min=1)
    shift_labels = shift_labels.long()
    return ForCausalLMLoss(logits, None, logits.shape[-1], count, shift_labels=shift_labels)


def weighted_sum(
    losses: dict[str, torch.Tensor | None],
    weights: dict[str, float],
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The total loss, None where no loss was computed. Arguments as in `text_loss`.

    Trainer adds up the totals of the micro-batches of a step when it gives `num_items_in_batch`. The text loss is then a
    share of the step's; those over images, means of the micro-batch, count by the same share of text targets: exact where
    the images of each micro-batch are in proportion to its targets. `DeemTrainer` is exact always.
    """
    share = 1.0
    if num_items_in_batch is not None and (labels is not None or shift_labels is not None):
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        share = (targets != -100).sum() / torch.as_tensor(num_items_in_batch, device=targets.device).clamp(min=1)
    shares = dict.fromkeys(losses, share) | {"text_loss": 1.0}
    total = [weights[name] * shares[name] * loss for name, loss in losses.items() if loss is not None]
    return sum(total) if total else None


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
