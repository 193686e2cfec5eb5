# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Parts of a model by name: which are frozen, which learn at what rate, and the table of both."""

import difflib
import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

OLD_ROWS = "lm_head.old_rows"
# What peft adds to names. Where it trains a copy of a module, the name stands for the copy.
_OF_PEFT = re.compile(
    r"^base_model\.model\.|\.(original_module|modules_to_save\.default|base_layer|token_adapter)(?=\.)"
)


def match_parameters(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that contain `pattern` as whole dotted components; `*` and `?` stand for anything within it.

    `gate` matches `model.image_attention.0.gate`, not `mlp.gate_proj.weight`; `gate*` matches both.

    Raises:
        ValueError: nothing matches; the message offers near names.
    """
    names = list(names)
    inner = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    regex = re.compile(rf"(?:.*\.)?{inner}(?:\..*)?\Z")
    found = [name for name in names if regex.match(name)]
    if not found:
        known = {
            ".".join(parts[i:j])
            for parts in map(lambda name: name.split("."), names)
            for i in range(len(parts))
            for j in range(i + 1, len(parts) + 1)
        }
        near = difflib.get_close_matches(pattern, sorted(known, key=len), n=3, cutoff=0.5)
        hint = (
            f"Did you mean {', '.join(map(repr, near))}?"
            if near
            else f"Parts: {', '.join(sorted(set(map(part_of, names))))}."
        )
        raise ValueError(f"The name {pattern!r} matches none of the {len(names)} parameters of the model. {hint}")
    return found


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by the names they have without adapters."""
    return {_OF_PEFT.sub("", name): parameter for name, parameter in model.named_parameters()}


def part_of(name: str) -> str:
    """Return the part a parameter belongs to: a child of the model, or of the image decoder."""
    pieces = name.removeprefix("model.").split(".")
    return ".".join(pieces[: 2 if pieces[0] == "image_decoder" else 1])


def freeze_parts(model: PreTrainedModel, patterns: Collection[str]) -> None:
    """Switch off the gradients of all parameters that a pattern names.

    `lm_head.old_rows` names the rows of the output head that the language model brought along; those of the tokens that
    DEEM added go on training (see `train_only_new_rows`). With a frozen language model that is so in any case, unless
    `lm_head` is named.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = [pattern for pattern in patterns if pattern != OLD_ROWS]
    frozen = {name for pattern in whole for name in match_parameters(pattern, parameters)}
    for name in frozen:
        parameters[name].requires_grad_(False)
    language_model_is_frozen = not any(p.requires_grad for p in model.model.language_model.parameters())
    if "lm_head.weight" not in frozen and (language_model_is_frozen or OLD_ROWS in patterns):
        train_only_new_rows(model, first_new_token(model))


def first_new_token(model: PreTrainedModel) -> int:
    """Return the size of the language model's own vocabulary: DEEM's tokens were added behind it."""
    return min(model.config.image_token_id, model.config.start_of_image_token_id)


class _OldRowsFixed(torch.autograd.Function):
    """Identity whose gradient is zero in the first rows."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, first_new_row: int) -> torch.Tensor:
        ctx.first_new_row = first_new_row
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone()
        gradient[: ctx.first_new_row] = 0
        return gradient, None


# A rule within the forward holds under DDP, FSDP2, DeepSpeed and PEFT too, which replace parameters; hooks do not.
class _NewRowsLinear(nn.Linear):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else _OldRowsFixed.apply(self.bias, self.first_new_row)
        return F.linear(inputs, _OldRowsFixed.apply(self.weight, self.first_new_row), bias)


class _NewRowsEmbedding(nn.Embedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, _OldRowsFixed.apply(self.weight, self.first_new_row), self.padding_idx)


def train_only_new_rows(model: PreTrainedModel, first_new_row: int) -> None:
    """Let rows from `first_new_row` on of the output head train, and keep the others bit for bit as they are.

    The gradient of the old rows is zero, so AdamW's moments for them stay 0. Weight decay would still move them:
    `parameter_groups` gives these parameters none. An embedding tied to the head is treated alike.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for module, kind in ((head, _NewRowsLinear), (embedding, _NewRowsEmbedding)):
        if module is head or module.weight is head.weight:
            own = type(module)  # embeddings that scale call the forward of nn.Embedding, and so that of `kind`
            if not issubclass(own, kind):
                module.__class__ = kind if own is kind.__base__ else type(own.__name__, (own, kind), {})
            module.first_new_row = first_new_row
            module.requires_grad_(True)


def new_rows(model: nn.Module) -> dict[str, int]:
    """Return the first trained row, by name, of the parameters of which only the last rows train."""
    return {
        _OF_PEFT.sub("", name): module.first_new_row
        for prefix, module in model.named_modules()
        if hasattr(module, "first_new_row")
        for name, _ in module.named_parameters(prefix, recurse=False)
    }


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the names of biases, and of all parameters of normalization layers."""
    return {
        _OF_PEFT.sub("", name)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(prefix, recurse=False)
        if name.endswith("bias") or "norm" in type(module).__name__.lower()
    }


def parameter_groups(
    model: nn.Module, groups: dict[str, dict[str, float]] | None, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the optimizer groups of the trainable parameters; the first matching name wins.

    Args:
        groups: `{pattern: {"lr": float, "weight_decay": float}}`, each value optional.
        lr, weight_decay: of the parameters that no pattern matches.

    Returns:
        groups with `params`, `names`, `lr`, `weight_decay`. Parameters of equal settings share a group.

    Raises:
        ValueError: a pattern matches no parameter, or a setting is unknown.
    """
    parameters = parameters_by_name(model)
    settings = dict.fromkeys(parameters, (lr, weight_decay))
    for pattern, setting in reversed((groups or {}).items()):
        if not isinstance(setting, dict):
            raise ValueError(
                f"Group {pattern!r} is {setting!r}: give a mapping, such as {{lr: 1.0e-4, weight_decay: 0.0}}."
            )
        if unknown := set(setting) - {"lr", "weight_decay"}:
            raise ValueError(f"Group {pattern!r} has unknown settings {sorted(unknown)}: give lr and/or weight_decay.")
        chosen = (float(setting.get("lr", lr)), float(setting.get("weight_decay", weight_decay)))
        settings.update(dict.fromkeys(match_parameters(pattern, parameters), chosen))
    no_decay = no_decay_names(model) | set(new_rows(model))
    collected: dict[tuple[float, float], dict[str, Any]] = {(lr, weight_decay): {"params": [], "names": []}}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        rate, decay = settings[name]
        key = (rate, 0.0 if name in no_decay else decay)
        group = collected.setdefault(key, {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [
        {**group, "lr": rate, "weight_decay": decay} for (rate, decay), group in collected.items() if group["params"]
    ]


def parts_table(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return `{part: {"trainable": int, "frozen": int, "lr": [...], "weight_decay": [...]}}`, parameters counted once."""
    setting = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    first = new_rows(model)
    table: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters_by_name(model).items():
        row = table.setdefault(part_of(name), {"trainable": 0, "frozen": 0, "lr": set(), "weight_decay": set()})
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 only DeepSpeed knows the whole shape
        size = math.prod(shape)
        old = math.prod(shape[1:]) * first[name] if name in first else 0
        row["trainable"] += (size - old) * (name in setting)
        row["frozen"] += size if name not in setting else old
        if name in setting:
            row["lr"].add(setting[name][0])
            row["weight_decay"].add(setting[name][1])
    return {
        part: {key: sorted(value) if isinstance(value, set) else value for key, value in row.items()}
        for part, row in table.items()
    }


def format_parts(table: dict[str, dict[str, Any]]) -> str:
    """Return the table of parts as aligned text, with totals."""
    rows = [("part", "trainable", "frozen", "lr", "weight decay")]
    for part, row in table.items():
        rates, decays = (", ".join(f"{value:g}" for value in row[key]) or "-" for key in ("lr", "weight_decay"))
        rows.append((part, f"{row['trainable']:,}", f"{row['frozen']:,}", rates, decays))
    totals = (f"{sum(row[key] for row in table.values()):,}" for key in ("trainable", "frozen"))
    rows.append(("total", *totals, "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if 0 < i < 3 else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
