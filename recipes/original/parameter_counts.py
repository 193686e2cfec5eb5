# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""How many parameters a configuration has and what each stage trains, from shapes alone."""

from typing import Any

import torch

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from recipes.original.published import CLIP_WIDTH, STAGES, TrainingStage
from recipes.training.parameter_groups import freeze_parts, parameter_groups, parts_table


def build(config: DeemConfig) -> DeemForConditionalGeneration:
    """Build the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return DeemForConditionalGeneration(config)


def stage_table(fields: dict[str, Any], stage: TrainingStage) -> dict[str, dict[str, Any]]:
    """Count trainable and frozen parameters of each part in one stage, as `parts_table` returns them."""
    model = build(DeemConfig(**{**fields, **stage.changes}))
    freeze_parts(model, stage.freeze)
    return parts_table(model, parameter_groups(model, None, lr=1e-4, weight_decay=0.05))


def format_stages(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a table in millions: a row per part; columns for its parameters and for what each stage trains of them."""
    names = list(dict.fromkeys(part for table in tables.values() for part in table))
    columns = [("part", ">"), ("parameters", ">"), *((f"stage {name}", ">") for name in tables)]
    rows = []
    for part in [*names, "total"]:
        cells, total = [], 0
        for table in tables.values():
            chosen = list(table.values()) if part == "total" else [table[part]] if part in table else []
            cells.append(sum(row["trainable"] for row in chosen))
            total = max(total, sum(row["trainable"] + row["frozen"] for row in chosen))
        rows.append((part, *(f"{count / 1e6:,.2f}" for count in (total, *cells))))
    widths = [max(len(title), *(len(row[i]) for row in rows)) for i, (title, _) in enumerate(columns)]
    lines = ["  ".join(f"{title:>{width}}" for (title, _), width in zip(columns, widths, strict=True))]
    lines += ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def explain(model: DeemForConditionalGeneration, first: int, second: int) -> str:
    """Return the sum that leads from our count to the paper's: parameters that the original has and this package has not.

    Args:
        first: parameters trained in stage 1.
        second: parameters trained in stage 2.
    """
    # Of every group of K + 1 weights the original computes the last and discards it.
    unused_points = sum(
        parameter.numel() // model.config.image_attention_points
        for name, parameter in model.named_parameters()
        if ".attention_weights." in name
    )
    width = model.config.vision_config.hidden_sizes[-1]
    clip_head = width * 2 * CLIP_WIDTH + 2 * CLIP_WIDTH + 2 * CLIP_WIDTH * CLIP_WIDTH
    null_condition = model.image_decoder.null_condition.numel()
    sums = [
        ("this package, stage 1", first),
        ("+ weights of the (K+1)-th point of the synchronizers: computed and discarded", unused_points),
        ("+ CLIP's projection head: trainable, but not in the forward", clip_head),
        ("+ null condition, a second time under its second name", null_condition),
    ]
    lines = [f"  {count / 1e6:10.3f} M  {what}" for what, count in sums]
    total = sum(count for _, count in sums)
    lines.append(f"  {total / 1e6:10.3f} M  = {total / 1e6:.1f} M; the paper says {STAGES[0].paper}")
    lines.append(
        f"  {second / 1e6:10.3f} M  this package, stage 2: {second / 1e9:.2f} B; the paper says {STAGES[1].paper}"
    )
    return "\n".join(lines)
