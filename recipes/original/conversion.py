# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A state dict of the original or its relatives -> one of this package, with every tensor accounted for."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from recipes.original.names import (
    FRESH,
    HEAD,
    HEAD_NEW,
    RECOMPUTED,
    RULES,
    UNUSED,
    UNUSED_WITHOUT_DIFFUSION,
    convert_value,
    find,
    rename,
)


@dataclass
class Conversion:
    """What became of every tensor.

    Attributes:
        state: target name -> tensor.
        sources: source name -> [outcome, target or reason]; outcomes: converted, merged, duplicate, recomputed, unused.
        fresh: target name -> why no source tensor gives it; it keeps its random initialization.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the counts as text, with the source tensors that were not simply converted, grouped by reason."""
        counts = Counter(outcome for outcome, _ in self.sources.values())
        lines = [f"{len(self.sources)} source tensors: " + ", ".join(f"{n} {name}" for name, n in counts.items())]
        other: dict[str, list[str]] = {}
        for name, (outcome, what) in self.sources.items():
            if outcome not in ("converted", "merged"):
                other.setdefault(f"{outcome}: {what}", []).append(name)
        for name, reason in self.fresh.items():
            other.setdefault(f"fresh: {reason}", []).append(name)
        for reason, names in other.items():
            shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            lines.append(f"  {reason}\n    {shown}")
        lines.append(
            f"{len(self.state) + len(self.fresh)} target tensors: {len(self.state)} filled, {len(self.fresh)} fresh"
        )
        return "\n".join(lines)


def convert(
    weights: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    source: str = "official",
    expected: Iterable[str] = (),
    new_tokens: int | None = None,
) -> Conversion:
    """Rename and reshape the tensors of a source's state dict.

    Args:
        weights: source name -> tensor.
        shapes: target name -> shape, of the model to fill.
        source: a key of `recipes.original.names.RULES`.
        expected: source names that must be there, where they are known.
        new_tokens: how many rows the head of new tokens must have, where it is known.

    Raises:
        ValueError: naming the tensor, if it has no place in the model, is missing, has another shape, or differs from
            what the model computes (position tables) or from its duplicate.
    """
    unused = UNUSED[source]
    if not any(name.startswith("image_decoder.") for name in shapes):
        unused = unused + UNUSED_WITHOUT_DIFFUSION
    check_present(weights, source, expected)
    result, added, came_from = Conversion(), {}, {}
    for name, tensor in weights.items():
        if (compute := find(name, RECOMPUTED)) is not None:
            check_recomputed(name, tensor, compute(tensor))
            result.sources[name] = ["recomputed", "equal to what the model computes"]
            continue
        if (reason := find(name, unused)) is not None:
            result.sources[name] = ["unused", reason]
            continue
        target = rename(name, RULES[source])
        if target not in shapes:
            raise ValueError(
                f"Unexpected tensor {name!r} {tuple(tensor.shape)}: its place would be {target!r}, which the model of "
                "this config does not have. Check that --source and --config belong to the weights."
            )
        if HEAD_NEW.match(name):
            added[name] = target
            result.sources[name] = ["merged", f"added to the last rows of {target}"]
            continue
        value = convert_value(name, tensor, shapes[target])
        check_shape(name, tensor, value.shape, target, shapes[target])
        if target in result.state:
            if not torch.equal(value, result.state[target]):
                raise ValueError(f"{name!r} and {came_from[target]!r} should be one tensor, but their values differ.")
            result.sources[name] = ["duplicate", f"of {came_from[target]}"]
            continue
        result.state[target], came_from[target] = value.contiguous().clone(), name
        result.sources[name] = ["converted", target]
    for name, target in added.items():
        add_new_rows(result.state[target], name, weights[name], target, new_tokens)
    result.fresh = started_anew(result.state, shapes, source)
    return result


def check_present(weights: dict[str, torch.Tensor], source: str, expected: Iterable[str]) -> None:
    """Raise a ValueError for weights that lack an expected tensor, or the new rows of their head."""
    given = {rename(name, RULES[source]) for name in weights if not HEAD_NEW.match(name)}
    expected = set(expected) | {name.replace(".head.", ".head_new.") for name in weights if HEAD.match(name)}
    absent = sorted(
        name
        for name in expected - weights.keys()
        if HEAD_NEW.match(name) or rename(name, RULES[source]) not in given  # under its other name
    )
    if absent:
        raise ValueError(
            f"{len(absent)} tensors are missing from the weights: {shorten(absent)}. Give the file that holds them "
            "with --extra."
        )


def add_new_rows(
    whole: torch.Tensor, name: str, rows: torch.Tensor, target: str, new_tokens: int | None = None
) -> None:
    """Add the rows of the new tokens to the last rows of the whole head, in place."""
    given = whole[-(len(rows) if new_tokens is None else new_tokens) :]
    check_shape(name, rows, rows.shape, f"the last rows of {target}", given.shape)
    merged = whole[-len(rows) :].float() + rows.float()
    whole[-len(rows) :] = merged.to(whole.dtype)


def started_anew(state: dict[str, torch.Tensor], shapes: dict[str, torch.Size], source: str) -> dict[str, str]:
    """Return the tensors of the model that the source does not have, with the reason.

    Raises:
        ValueError: if another tensor is missing.
    """
    missing = [name for name in shapes if name not in state]
    fresh = {name: reason for name in missing if (reason := find(name, FRESH[source])) is not None}
    if lost := [name for name in missing if name not in fresh]:
        raise ValueError(
            f"{len(lost)} tensors of the model are missing from the weights (under our names): {shorten(lost)}. "
            "Give the file that holds them with --extra, or the config that belongs to the weights."
        )
    return fresh


def shorten(names: list[str]) -> str:
    """Return at most eight names as text."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def check_shape(name: str, tensor: torch.Tensor, given: torch.Size, target: str, expected: torch.Size) -> None:
    """Raise a ValueError if a converted tensor does not have the shape of its target."""
    if given != expected:
        raise ValueError(
            f"{name!r} has shape {tuple(tensor.shape)}, but {target!r} needs {tuple(expected)}"
            f"{f' (it gives {tuple(given)})' if given != tensor.shape else ''}. The config does not belong to the weights."
        )


def check_recomputed(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise a ValueError if a stored tensor is not the one that the model computes."""
    tolerance = 2 * max(torch.finfo(tensor.dtype).eps, 1e-6)
    if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, rtol=0, atol=tolerance):
        off = (
            f"by {(tensor.float() - expected).abs().max():.2e}"
            if tensor.shape == expected.shape
            else f"in shape: {tuple(tensor.shape)} instead of {tuple(expected.shape)}"
        )
        raise ValueError(f"{name!r} differs from what the model computes {off}. It was trained or made otherwise.")
