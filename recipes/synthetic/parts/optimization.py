# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The training loop of the parts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup


def train(
    name: str,
    modules: list[nn.Module],
    loss_of: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    after_step: Callable[[], None] | None = None,
) -> float:
    """Train modules by AdamW with warm-up and cosine decay.

    Args:
        name: of the progress bar.
        loss_of: draws a batch and returns its loss.
        after_step: called after each step.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=min(50, steps // 10), num_training_steps=steps
    )
    losses = []
    for module in modules:
        module.train()
    for _ in (bar := tqdm(range(steps), desc=name, unit=" steps")):
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    for module in modules:
        module.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
