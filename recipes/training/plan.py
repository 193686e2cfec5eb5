# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The plan of a training run, computed from shapes alone: parts, groups, steps, memory of each rank."""

from typing import Any

import torch
from torch import nn

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from recipes.training.parameter_groups import format_parts, parameter_groups, parts_table
from recipes.training.trainer import DeemTrainingArguments, prepare_parts

# Bytes of optimizer state per trained parameter.
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "sgd": 0,
}
STRATEGIES = ("DDP", "ZeRO-1", "FSDP2")


def build(config: DeemConfig) -> DeemForConditionalGeneration:
    """Build the model on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return DeemForConditionalGeneration(config)


def memory(model: nn.Module, args: DeemTrainingArguments, strategy: str, ranks: int) -> dict[str, float]:
    """Return the bytes that one rank holds between two steps, and the gradients; activations are not counted.

    | | parameters | gradients | optimizer state |
    |---|---|---|---|
    | DDP | whole | whole, twice (its buckets) | whole |
    | ZeRO-1 | whole, half precision; a float32 copy of the trained ones shared out | whole | shared out |
    | FSDP2 | shared out, and twice the largest unit that is gathered | shared out | shared out |

    Without half precision (`bf16`, `fp16`) ZeRO-1 keeps all as it is, without a copy.

    Raises:
        ValueError: the optimizer or the strategy is not known.
    """
    state_bytes = OPTIMIZER_BYTES.get(args.optim.value)
    if state_bytes is None:
        raise ValueError(
            f"The memory of optim {args.optim.value!r} is not known. Known: {', '.join(OPTIMIZER_BYTES)}. Run without "
            "--dry_run, or with another."
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    frozen_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    if strategy == "DDP":
        sizes = (frozen_bytes + trained_bytes, 2 * trained_bytes if ranks > 1 else trained_bytes, state_bytes * count)
    elif strategy == "ZeRO-1":
        half = args.bf16 or args.fp16
        whole = 2 * sum(p.numel() for p in model.parameters()) if half else frozen_bytes + trained_bytes
        sizes = (whole + half * 4 * count / ranks, (2 if half else 4) * count, state_bytes * count / ranks)
    elif strategy == "FSDP2":
        gathered = 2 * max(unit_bytes(model), default=0) if ranks > 1 else 0
        sizes = (
            (frozen_bytes + trained_bytes) / ranks + gathered,
            trained_bytes / ranks,
            state_bytes * count / ranks,
        )
    else:
        raise ValueError(f"Unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}.")
    return dict(zip(("parameters", "gradients", "optimizer"), sizes, strict=True))


def unit_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of each unit that FSDP2 gathers at once: each layer that must not be split, and all the rest."""
    names = set(model._no_split_modules or [])
    unit_of: dict[nn.Parameter, nn.Module] = dict.fromkeys(model.parameters(), model)
    for module in model.modules():  # outer modules before inner ones, which keep their own
        if type(module).__name__ in names:
            unit_of.update(dict.fromkeys(module.parameters(), module))
    sizes: dict[nn.Module, int] = {}
    for parameter, unit in unit_of.items():
        sizes[unit] = sizes.get(unit, 0) + parameter.numel() * parameter.element_size()
    return list(sizes.values())


def format_memory(model: nn.Module, args: DeemTrainingArguments, ranks: int) -> str:
    """Return the estimated memory of each rank as a table, in 10^9 bytes."""
    lines = [f"{'GB, estimated':14}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'total':>12}"]
    for strategy in STRATEGIES:
        row = memory(model, args, strategy, ranks)
        cells = "".join(f"{value / 1e9:12.2f}" for value in (*row.values(), sum(row.values())))
        lines.append(f"{strategy:14}{cells}")
    return "\n".join(lines)


def format_groups(groups: list[dict[str, Any]]) -> str:
    """Return a table with one line per optimizer group."""
    lines = [f"{'lr':>8}  {'decay':>6}  {'tensors':>8}  {'parameters':>14}  first"]
    for group in groups:
        count = sum(p.numel() for p in group["params"])
        lines.append(
            f"{group['lr']:8g}  {group['weight_decay']:6g}  {len(group['names']):8}  {count:14,}  {group['names'][0]}"
        )
    return "\n".join(lines)


def make_plan(
    config: DeemConfig,
    args: DeemTrainingArguments,
    pack_length: int,
    ranks: tuple[int, ...] = (1, 8, 32),
    without_vae: bool = False,
) -> str:
    """Return the plan of a run as text.

    Args:
        config: of the model, which is built on the meta device.
        pack_length: tokens per sequence, 0 if sequences are not packed.
        ranks: numbers of processes that memory is computed for.
        without_vae: latents come from a cache.
    """
    model = build(config)
    model = prepare_parts(model, args)
    if without_vae and model.image_decoder is not None:
        model.image_decoder.vae = nn.Identity()
    groups = parameter_groups(model, args.groups, args.learning_rate, args.weight_decay)
    processes = max(args.world_size, 1)
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    tokens = f", up to {sequences * pack_length:,} tokens" if pack_length else ""
    weights = ", ".join(f"{name.removesuffix('_loss')} {weight:g}" for name, weight in model.loss_weights().items())
    lines = [
        "Plan (from shapes alone; nothing is run)",
        "",
        format_parts(parts_table(model, groups)),
        "",
        format_groups(groups),
        "",
        f"steps       {args.max_steps:,}, warm-up {args.warmup_steps:g}, "
        f"{args.lr_scheduler_type.value} schedule, {args.optim.value}",
        f"per step    {sequences:,} sequences ({args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        f"accumulated x {processes} processes){tokens}",
        f"losses      {weights}",
        "",
    ]
    for count in ranks:
        lines += [f"{count} ranks" if count > 1 else "1 rank", format_memory(model, args, count), ""]
    length = pack_length or "T"
    lines.append(
        "Memory is estimated from counts of parameters, without activations. These come on top: among them the logits, "
        f"{args.per_device_train_batch_size} x {length} x {config.text_config.vocab_size:,} in float32, three times."
    )
    return "\n".join(lines)
