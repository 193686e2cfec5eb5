# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The sections of a run report."""

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from recipes.evaluation.figures import format_each
from recipes.run_report.markup import cards, inline, section, table
from recipes.run_report.plots import ROLES, plot_curve
from recipes.run_report.stages import StageLog

CURVES = {
    "text_loss": "text loss",
    "image_loss": "image loss",
    "consistency_loss": "consistency loss",
    "loss": "weighted sum",
    "learning_rate": "learning rate",
    "step_seconds": "seconds per step",
}


def figure_tiles(metrics: dict[str, dict[str, Any]]) -> str:
    """Return the figures of `metrics.json`, each beside its aim and what chance gives."""
    contents = []
    for figure in metrics.values():
        aim = figure["aim"]
        reached = "" if aim is None else "good" if figure["value"] >= aim else "bad"
        beside = [] if aim is None else [f"aim {aim:.0%}"]
        beside += [f"chance {figure['chance']:.0%}"] if "chance" in figure else []
        beside += [f"{figure['loss']:.3f} against {figure['reference']:.3f}"] if "reference" in figure else []
        beside += [f"real images {figure['on_real']:.0%}"] if "on_real" in figure else []
        each = f"<br><small>{escape(format_each(figure))}</small>" if "each" in figure else ""
        contents.append(
            f'<b class="{reached}">{figure["value"]:.1%}</b>{escape(figure["what"])}<br>'
            f"<small>{' · '.join(beside)} · {figure['count']} images</small>{each}"
        )
    return cards("tiles", contents, "tile")


def sheet_cards(samples: Sequence[dict[str, str]], folder: Path) -> str:
    """Return input, reconstruction and drawn image of each sample, with the model's caption beside the true one."""
    contents = []
    for sample in samples:
        images = "".join(
            f"<figure>{inline(folder / sample[role], label)}<figcaption>{label}</figcaption></figure>"
            for role, label in ROLES.items()
        )
        contents.append(
            f'<div class="triple">{images}</div><p><span>caption</span> {escape(sample["caption"])}<br>'
            f"<span>truth</span> {escape(sample['truth'])}</p>"
        )
    return cards("sheet", contents)


def drawing_cards(drawings: Sequence[dict[str, Any]], folder: Path) -> str:
    """Return the drawings with their prompts beneath, and whether the color asked for is the dominant one."""
    contents = []
    for drawing in drawings:
        right = drawing["dominant"] == drawing["color"]
        found = "✓" if right else f"✗ {drawing['dominant'] or 'no color'}"
        note = "" if drawing["trained"] else "<br><span>never trained on</span>"
        contents.append(
            f"{inline(folder / drawing['file'], drawing['prompt'])}<p>{escape(drawing['prompt'])} "
            f'<b class="{"good" if right else "bad"}">{found}</b>{note}</p>'
        )
    return cards("drawings", contents, "drawing")


def answer_cards(samples: Sequence[dict[str, str]], folder: Path) -> str:
    """Return the questions, with the model's answer beside the right one."""
    contents = []
    for sample in samples:
        if "question" not in sample:
            continue
        right = sample["answer"].lower().strip(" .") == sample["right_answer"].lower()
        contents.append(
            f"{inline(folder / sample['input'], 'input')}<div><p>{escape(sample['question'])}</p>"
            f'<p class="{"good" if right else "bad"}">{"✓" if right else "✗"} {escape(sample["answer"])}</p>'
            f"<p><span>truth</span> {escape(sample['right_answer'])}</p></div>"
        )
    return cards("answers", contents, "answer")


def parameter_table(parts: dict[str, dict[str, Any]]) -> str:
    """Return the table of parameters trained and frozen per part, with the share that trains as a bar."""
    if not parts:
        return ""
    totals = {key: sum(part[key] for part in parts.values()) for key in ("trainable", "frozen")}
    rows = []
    for name, part in (parts | {"total": totals}).items():
        share = 100 * part["trainable"] / max(part["trainable"] + part["frozen"], 1)
        rates = ", ".join(f"{rate:g}" for rate in part.get("lr", ()))
        bar = f'<span class="bar"><i style="width:{share:.0f}%"></i></span>'
        rows.append([escape(name), bar, f"{part['trainable']:,}", f"{part['frozen']:,}", rates])
    return table(["part", "share trained", "trained", "frozen", "learning rate"], rows, last_is_total=True)


def cost_row(stage: StageLog) -> list[str]:
    """Return steps, median time per step, whole time and peak memory of a stage."""
    _, seconds = stage.curve("step_seconds")
    _, memory = stage.curve("peak_memory_gb")
    _, runtime = stage.curve("train_runtime")
    return [
        escape(stage.name),
        f"{max(entry['step'] for entry in stage.history):,}" if stage.history else "0",
        f"{statistics.median(seconds):.3f} s" if seconds else "",
        f"{sum(runtime) / 60:.1f} min" if runtime else "",
        f"{max(memory):.2f} GB" if memory else "",
    ]


def data_rows(stage: StageLog) -> list[list[str]]:
    """Return the samples read, left out by the format's rules, and skipped, per source."""
    rows = []
    for source, counts in stage.data.items():
        faults = [
            f"{fault['count']} × {reason} ({', '.join(fault['examples'][:2])})"
            for reason, fault in counts["skipped"].items()
        ]
        skipped = sum(fault["count"] for fault in counts["skipped"].values())
        dropped = f"{counts['dropped_by_rule']:,}"
        rows.append([escape(f"{stage.name}: {source}"), f"{counts['read']:,}", dropped, f"{skipped:,}"])
        rows[-1].append(escape("; ".join(faults)))
    return rows


def stage_curves(stage: StageLog, folder: Path) -> str:
    """Return the curves of a stage; they are also written into `folder` as PNG files."""
    drawn = []
    for key, label in CURVES.items():
        steps, values = stage.curve(key)
        if steps:
            drawn.append(inline(plot_curve(steps, values, label, folder / f"{stage.name}_{key}.png"), label))
    return f"<h3>{escape(stage.name)}</h3>{cards('curves', drawn)}" if drawn else ""


def sample_sections(samples: Sequence[dict[str, str]], drawings: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """Return the sections of the drawings, of what the encoder sees and of the answers."""
    asked = "Each drawn from the words beneath it alone; ✓ where most of its vivid pixels have the color asked for."
    order = (
        "Left to right: the input; the image redrawn from its own image tokens; an image drawn from the true caption."
    )
    return [
        section("Drawings", asked, drawing_cards(drawings, folder)),
        section("What the encoder sees", order, sheet_cards(samples, folder)),
        section("Answers", "One question per image.", answer_cards(samples, folder)),
    ]


def stage_sections(stages: Sequence[StageLog]) -> list[str]:
    """Return the sections of parameters, costs and data."""
    parts = [f"<h3>{escape(stage.name)}</h3>{parameter_table(stage.parts)}" for stage in stages if stage.parts]
    costs = table(["stage", "steps", "per step (median)", "in all", "peak memory"], map(cost_row, stages))
    data = table(
        ["source", "read", "left out", "skipped", "why"], [row for stage in stages for row in data_rows(stage)]
    )
    return [
        section("Parameters", "What trained and what stayed as it was, per part.", *parts),
        section("Time and memory", "Of the training process.", costs),
        section("Data", "Samples used in training, left out by the format's rules, and skipped as unusable.", data),
    ]
