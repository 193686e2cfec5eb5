# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which loss moves the vision tower: each one's share of the gradient, and whether they pull the same way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import nn

from modeling_deem import DeemForConditionalGeneration
from recipes.diagnosis.images import Batch

LOSSES = ("text_loss", "image_loss", "consistency_loss")


@contextmanager
def learning(model: nn.Module, part: str) -> Iterator[list[nn.Parameter]]:
    """Let the parameters of one part have gradients, and no others, without dropout; as it was before on leaving.

    Raises:
        ValueError: the part has no parameters.
    """
    named = {name: one for name, one in model.named_parameters() if f".{part}." in f".{name}."}
    if not named:
        parts = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
        raise ValueError(f"part={part!r} names no parameter of the model. Parts: {', '.join(parts)}.")
    flags = {one: one.requires_grad for one in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval().requires_grad_(False)
        for one in named.values():
            one.requires_grad_(True)
        yield list(named.values())
    finally:
        for one, flag in flags.items():
            one.requires_grad_(flag)
        for module, training in modes.items():
            module.training = training


def gradients(
    model: DeemForConditionalGeneration, batch: Batch, parameters: Sequence[nn.Parameter], seed: int
) -> dict[str, torch.Tensor]:
    """Return the gradient of each loss that a batch has, times its weight, as one float32 vector on the CPU."""
    outputs = model(**batch, generator=torch.Generator(model.device).manual_seed(seed))
    found = {}
    for name in LOSSES:
        weight, loss = getattr(model.config, f"{name}_weight"), outputs[name] if name in outputs else None
        if loss is None or not loss.requires_grad or not weight:
            continue
        pieces = torch.autograd.grad(weight * loss, parameters, retain_graph=True, materialize_grads=True)
        found[name] = torch.cat([piece.float().flatten().cpu() for piece in pieces])
    return found


def cosine(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Return the cosine of the angle between two vectors; None where one is zero."""
    lengths = first.double().norm() * second.double().norm()
    return float(first.double() @ second.double() / lengths) if lengths > 0 else None


def gradient_report(
    model: DeemForConditionalGeneration, batches: Sequence[Batch], part: str = "vision_tower", seed: int = 0
) -> dict[str, Any]:
    """Return, as means over batches, what each loss does to a part.

    Args:
        seed: of the noise; each batch has its own.

    Returns:
        `losses`: per loss its `norm`; `share`, of the squared length of the sum, what its projection onto the sum gives
        (shares add up to 1; below 0 it works against the others); `agreement`, the cosine with its own gradient on the
        batch before. `cosines`: of pairs of losses, "text_loss, image_loss" and so on. `batches`: how many were counted.
    """
    norms, shares, agreements, angles = ({} for _ in range(4))
    before: dict[str, torch.Tensor] = {}
    with learning(model, part) as parameters:
        for number, batch in enumerate(batches):
            given = {name: one.to(model.device) if torch.is_tensor(one) else one for name, one in batch.items()}
            found = gradients(model, given, parameters, seed + number)
            total = sum(found.values())
            for name, one in found.items():
                norms.setdefault(name, []).append(float(one.norm()))
                if float(total.norm()):
                    shares.setdefault(name, []).append(
                        float(one.double() @ total.double() / total.double().square().sum())
                    )
                if name in before:
                    agreements.setdefault(name, []).append(cosine(one, before[name]))
            for first, second in combinations(found, 2):
                angles.setdefault(f"{first}, {second}", []).append(cosine(found[first], found[second]))
            before = found
    losses = {
        name: {"norm": mean(norms[name]), "share": mean(shares.get(name)), "agreement": mean(agreements.get(name))}
        for name in norms
    }
    return {
        "losses": losses,
        "cosines": {name: mean(values) for name, values in angles.items()},
        "batches": len(batches),
    }


def mean(values: Sequence[float | None] | None) -> float | None:
    """Return the mean of those values that there are; None for none."""
    known = [one for one in values or () if one is not None]
    return sum(known) / len(known) if known else None
