# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Real sizes on paper: what a configuration holds and what each training stage trains, without its memory.

python recipes/inspect_model.py --config official-7b      # the paper's model, next to the paper's figures
python recipes/inspect_model.py --config FOLDER            # any DEEM checkpoint's config.json
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from recipes.training.parameter_groups import OLD_ROWS, freeze_parts, parameter_groups, parts_table

# ConvNeXt-B-CLIP, Vicuna-7B-v1.5 with 6 new tokens, SD-2.1-base; all else are the defaults of `DeemConfig`: 77 tokens,
# 12-layer perceiver, image attention in every 4th layer.
OFFICIAL_7B: dict[str, Any] = {
    "vision_config": {
        "model_type": "convnext",
        "depths": [3, 3, 27, 3],
        "hidden_sizes": [128, 256, 512, 1024],
        "layer_norm_eps": 1e-6,
        "image_size": 256,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32006,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    },
    "image_decoder_config": {},
}
SIZES = {"official-7b": OFFICIAL_7B}
CLIP_WIDTH = 640  # of ConvNeXt-B-CLIP's joint space; its projection head is an MLP of twice that width


@dataclass
class Stage:
    """A training stage of the paper.

    Attributes:
        freeze: parts that do not train, as in the recipes.
        changes: fields of the configuration that differ from the first stage's.
        paper: trained parameters according to the paper.
    """

    name: str
    freeze: list[str]
    paper: str
    changes: dict[str, Any] = field(default_factory=dict)


STAGES = [
    Stage("1 alignment", ["model.language_model", "image_decoder.denoiser", "image_decoder.vae"], "494.9 M"),
    Stage(
        "2 image-text SFT",
        ["model.vision_tower.encoder", "image_decoder.denoiser", "image_decoder.vae", OLD_ROWS],
        "about 7 B",
    ),
    Stage(
        "3 mask-text SFT",
        ["model.vision_tower.encoder", OLD_ROWS],
        "about 7 B",
        {"use_region_tokens": True, "image_decoder_config": None},
    ),
]


def build(config: DeemConfig) -> DeemForConditionalGeneration:
    """The model on the meta device: shapes, no memory."""
    with torch.device("meta"):
        return DeemForConditionalGeneration(config)


def stage_table(fields: dict[str, Any], stage: Stage) -> dict[str, dict[str, Any]]:
    """Trainable and frozen parameters of each part in one stage."""
    model = build(DeemConfig(**{**fields, **stage.changes}))
    freeze_parts(model, stage.freeze)
    return parts_table(model, parameter_groups(model, None, lr=1e-4, weight_decay=0.05))


def format_stages(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Parts in rows; parameters, and what each stage trains of them, in columns, all in millions."""
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
    """The way from our count to the paper's, in parameters that the original has and this package has not."""
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


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="official-7b", help="official-7b, or a folder with a DEEM config.json")
    args = parser.parse_args(argv)
    official = args.config == "official-7b"
    if official:
        fields = OFFICIAL_7B
    elif (Path(args.config) / "config.json").exists():
        fields = DeemConfig.from_pretrained(args.config).to_dict()
        fields = {name: value for name, value in fields.items() if name in DeemConfig.__dataclass_fields__}
    else:
        raise SystemExit(f"error: --config {args.config} is neither official-7b nor a folder with a config.json.")

    tables = {stage.name: stage_table(fields, stage) for stage in STAGES}
    print("Parameters and what each stage trains, in millions. Of lm_head only the rows of new tokens train.")
    print(format_stages(tables))
    if official:
        trained = [sum(row["trainable"] for row in table.values()) for table in tables.values()]
        print("\nThe paper's figures:")
        print(explain(build(DeemConfig(**OFFICIAL_7B)), *trained[:2]))
    return tables


if __name__ == "__main__":
    main()
