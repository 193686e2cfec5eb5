# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The contrastive objective of the feedback (DCR, CVPR 2026): does it matter whose tokens an image is redrawn from?

Letters: N images, K other images that each is contrasted with, D elements of a prediction.
"""

import torch
import torch.nn.functional as F


def contrastive_losses(
    own: torch.Tensor,
    target: torch.Tensor,
    others: torch.Tensor,
    view: torch.Tensor | None = None,
    temperature: float = 0.1,
) -> torch.Tensor:
    """InfoNCE between predictions of a denoiser for the same noisy latents, (N,) float32.

    With s the cosine similarity to the prediction under an image's own tokens, divided by the temperature, and Z the sum of
    all exp(s): the mean of -log(exp(s) / Z) over the positives, the true target and the prediction under the tokens of an
    augmented view.

    Args:
        own: (N, ...), under the image's own tokens; view: under those of an augmented view, None for no such positive.
        target: (N, ...), what was to be predicted.
        others: (N, K, ...), under the tokens of other images.
    """
    anchor = F.normalize(own.flatten(1).float(), dim=-1)  # [N, D]
    positives = torch.stack([one.flatten(1).float() for one in (target, view) if one is not None], dim=1)
    candidates = F.normalize(torch.cat([positives, others.flatten(2).float()], dim=1), dim=-1)  # [N, 1 or 2 + K, D]
    similarity = torch.einsum("nd,nkd->nk", anchor, candidates) / temperature
    return similarity.logsumexp(1) - similarity[:, : positives.shape[1]].mean(1)


def choose_others(
    count: int, num_others: int | None, device: torch.device, generator: torch.Generator | None = None
) -> torch.Tensor:
    """int64 (N, K): for each of N images K others, all N - 1 where None or more are asked for.

    Raises:
        ValueError: there is no other.
    """
    if count < 2:
        raise ValueError(
            "The contrastive objective needs at least 2 images in a batch. Use a larger batch, or objective='denoise'."
        )
    index = torch.arange(count)[:, None]
    if num_others is None or num_others >= count - 1:
        others = torch.arange(count - 1).expand(count, -1)
    else:
        where = generator.device if generator is not None else "cpu"
        others = torch.rand(count, count - 1, generator=generator, device=where).argsort(1)[:, :num_others].cpu()
    return (others + (others >= index)).to(device)
