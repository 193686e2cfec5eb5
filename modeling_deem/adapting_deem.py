# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A few steps on the feedback of the very images that a model is asked about, taken back afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def adapted(
    model: nn.Module, loss: Callable[[], torch.Tensor], parameters: str, steps: int, learning_rate: float
) -> Iterator[nn.Module]:
    """Let a part of a model learn from `loss` for some steps of AdamW, and restore the model on leaving, bit for bit.

    Tensors, buffers, gradients, modes and what trains are then as before, also behind an exception.

    Args:
        loss: computes the loss anew, a scalar; its random draws are its own.
        parameters: name of the part, whole components of the parameters' names.

    Raises:
        ValueError: no parameter of that name, or one that is quantized or offloaded.
    """
    named = {name: one for name, one in model.named_parameters() if f".{parameters}." in f".{name}."}
    if not named:
        parts = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
        raise ValueError(f"parameters={parameters!r} names no parameter of the model. Parts: {', '.join(parts)}.")
    for name, one in named.items():
        if not one.is_floating_point() or one.device.type == "meta" or type(one) is not nn.Parameter:
            raise ValueError(
                f"{name} is quantized, sharded or offloaded ({type(one).__name__}, {one.dtype}, {one.device.type}) and "
                "cannot be adapted and restored. Name a part that is held whole, or load the model without."
            )
    modes = {module: module.training for module in model.modules()}
    flags = {one: (one.requires_grad, one.grad) for one in model.parameters()}
    saved = {one: one.detach().clone() for one in [*named.values(), *model.buffers()]}
    try:
        model.eval().requires_grad_(False)
        for one in flags:
            one.grad = None
        for one in named.values():
            one.requires_grad_(True)
        optimizer = torch.optim.AdamW(named.values(), learning_rate, weight_decay=0.0)
        for _ in range(steps):
            with torch.enable_grad():  # of these parameters alone: a feedback beside the model may train too
                found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
            for one, grad in zip(named.values(), found, strict=True):
                one.grad = grad
            optimizer.step()
        optimizer.zero_grad()
        yield model
    finally:
        with torch.no_grad():
            for one, value in saved.items():
                one.copy_(value)
        for one, (flag, grad) in flags.items():
            one.requires_grad_(flag)
            one.grad = grad
        for module, training in modes.items():
            module.training = training


class AdaptMixin:
    """`adapted_to` of a DEEM."""

    def adapted_to(
        self,
        pixel_values: torch.Tensor,
        target_pixel_values: torch.Tensor,
        steps: int = 5,
        learning_rate: float = 4e-6,
        parameters: str = "vision_tower",
        generator: torch.Generator | None = None,
    ):
        """Return a context in which the model has learned from redrawing these very images; on leaving it is as before.

            with model.adapted_to(pixel_values, target_pixel_values) as adapted:
                adapted.generate(...)

        Args:
            pixel_values, target_pixel_values: as in `consistency_loss`.
            parameters: name of the part that learns.
        """

        def loss() -> torch.Tensor:
            return self.consistency_loss(pixel_values, target_pixel_values, generator=generator)

        return adapted(self, loss, parameters, steps, learning_rate)
