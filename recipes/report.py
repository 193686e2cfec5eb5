# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""One self-contained `report.html` per run: losses, what the encoder sees, answers, parameters, time, memory, data.

    python recipes/report.py --run runs/demo                      # all stages of a demo, with its evaluation
    python recipes/report.py --run runs/train                     # a single training run

Reads the files that the other recipes leave in the run's folder, and leaves out what is not there:

    trainer_state.json   (or that of the newest checkpoint)      curves, time and memory per step
    parts.json                                                   parameters trained and frozen per part
    data_report.json                                             samples read and skipped per source
    metrics.json, samples/samples.json                           figures, sample sheet and answers

A run of several stages has them in folders of its own, one level below; `evaluation/` is one of them. The pictures of
the report also lie as PNG files in `report/`.
"""

import base64
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from trl import TrlParser

matplotlib.use("Agg")

import matplotlib.pyplot as plt

CURVES = {
    "text_loss": "text loss",
    "image_loss": "image loss",
    "consistency_loss": "consistency loss",
    "loss": "weighted sum",
    "learning_rate": "learning rate",
    "step_seconds": "seconds per step",
}
ROLES = {"input": "input", "reconstruction": "what the encoder sees", "drawn": "drawn from the caption"}
WINDOWS = 20  # the strong line is an exponential mean over about 1/20 of the run


@dataclass
class ReportArguments:
    """Options of `recipes/report.py`."""

    run: str = field(default="runs/demo", metadata={"help": "Folder of a run, or of a run's stages."})
    title: str | None = field(default=None, metadata={"help": "Headline; the folder's name by default."})


@dataclass
class Stage:
    """What one training stage left behind: its name, log entries, parts and data counts."""

    name: str
    history: list[dict[str, float]]
    parts: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one logged quantity."""
        points = [(entry["step"], entry[key]) for entry in self.history if math.isfinite(entry.get(key, math.nan))]
        return [step for step, _ in points], [value for _, value in points]


def read_json(path: Path) -> Any:
    """Content of a JSON file, or an empty dict where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def trainer_state(folder: Path) -> Path | None:
    """The newest trainer_state.json of a training run's folder: its own, or that of the last checkpoint."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    states = [path / "trainer_state.json" for path in (folder, *reversed(checkpoints))]
    return next((path for path in states if path.is_file()), None)


def find_stages(run: Path) -> list[Stage]:
    """The training stages of a run, in the order in which they ended: the folder itself, or the folders in it."""
    folders = [run] if trainer_state(run) else [path for path in run.iterdir() if path.is_dir()]
    states = {folder: state for folder in folders if (state := trainer_state(folder))}
    return [
        Stage(
            folder.name,
            read_json(states[folder])["log_history"],
            read_json(folder / "parts.json"),
            read_json(folder / "data_report.json"),
        )
        for folder in sorted(states, key=lambda folder: states[folder].stat().st_mtime)
    ]


# ---- pictures ----


def plot_curve(steps: Sequence[float], values: Sequence[float], title: str, path: Path) -> Path:
    """Draw one logged quantity over the steps: raw values pale, their exponential mean (unbiased) strong."""
    keep = max(0.0, 1 - WINDOWS / len(values))
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    figure, axes = plt.subplots(figsize=(4, 2.5), dpi=200, layout="constrained")
    axes.plot(steps, values, color="#2f5bea", alpha=0.3, linewidth=0.8, marker="." if len(steps) == 1 else None)
    axes.plot(steps, smooth, color="#2f5bea", linewidth=1.6)
    axes.set_title(f"{title}: {smooth[-1]:.3g} at the end", fontsize=9, loc="left", color="#1c2430")
    axes.set_xlabel("step", fontsize=8, color="#667085")
    axes.tick_params(labelsize=7.5, colors="#667085", length=0)
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    axes.spines[:].set_visible(False)
    figure.savefig(path)
    plt.close(figure)
    return path


def plot_sheet(samples: Sequence[dict[str, str]], folder: Path, path: Path) -> Path:
    """Draw the sample sheet: a row per sample, a column per role."""
    size = (1.6 * len(ROLES), 1.6 * len(samples) + 0.3)
    figure, grid = plt.subplots(len(samples), len(ROLES), figsize=size, dpi=150, layout="constrained", squeeze=False)
    for row, sample in zip(grid, samples, strict=True):
        for axes, (role, label) in zip(row, ROLES.items(), strict=True):
            axes.imshow(plt.imread(folder / sample[role]), interpolation="nearest")
            axes.set_axis_off()
            if row is grid[0]:
                axes.set_title(label, fontsize=8)
    figure.savefig(path)
    plt.close(figure)
    return path


def inline(path: Path, alternative: str) -> str:
    """An `<img>` that carries its PNG in itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


# ---- sections ----


def section(title: str, note: str, *blocks: str) -> str:
    """A headed section, or nothing if none of its blocks has content."""
    if not any(blocks):
        return ""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{"".join(blocks)}</section>'


def cards(kind: str, contents: Iterable[str], card: str = "") -> str:
    """A grid of cards, or nothing if there is none."""
    items = "".join(f'<div class="card {card}">{content}</div>' for content in contents)
    return f'<div class="grid {kind}">{items}</div>' if items else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], last_is_total: bool = False) -> str:
    """A table that scrolls sideways on narrow screens; cells are HTML. Nothing if there are no rows."""
    rows = list(rows)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if rows else []
    for number, row in enumerate(rows, 1):
        kind = ' class="total"' if last_is_total and number == len(rows) else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f'<div class="card scroll"><table>{"".join(lines)}</table></div>' if rows else ""


def figure_tiles(metrics: dict[str, dict[str, Any]]) -> str:
    """The figures of `metrics.json`, each beside its aim and what chance gives."""
    contents = []
    for figure in metrics.values():
        aim = figure["aim"]
        reached = "" if aim is None else "good" if figure["value"] >= aim else "bad"
        beside = [] if aim is None else [f"aim {aim:.0%}"]
        beside += [f"chance {figure['chance']:.0%}"] if "chance" in figure else []
        beside += [f"{figure['loss']:.3f} against {figure['reference']:.3f}"] if "reference" in figure else []
        contents.append(
            f'<b class="{reached}">{figure["value"]:.1%}</b>{escape(figure["what"])}<br>'
            f"<small>{' · '.join(beside)} · {figure['count']} pictures</small>"
        )
    return cards("tiles", contents, "tile")


def sheet_cards(samples: Sequence[dict[str, str]], folder: Path) -> str:
    """Input, reconstruction and drawn picture of each sample, with the model's caption beside the true one."""
    contents = []
    for sample in samples:
        pictures = "".join(
            f"<figure>{inline(folder / sample[role], label)}<figcaption>{label}</figcaption></figure>"
            for role, label in ROLES.items()
        )
        contents.append(
            f'<div class="triple">{pictures}</div><p><span>caption</span> {escape(sample["caption"])}<br>'
            f"<span>truth</span> {escape(sample['truth'])}</p>"
        )
    return cards("sheet", contents)


def answer_cards(samples: Sequence[dict[str, str]], folder: Path) -> str:
    """Questions with the model's answer beside the right one."""
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


def parts_table(parts: dict[str, dict[str, Any]]) -> str:
    """Parameters trained and frozen per part, with the share that trains as a bar."""
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


def cost_row(stage: Stage) -> list[str]:
    """Steps, median time per step, whole time and peak memory of a stage."""
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


def data_rows(stage: Stage) -> list[list[str]]:
    """Samples read, left out by the format's rules, and skipped, per source."""
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


def write_report(run: str | Path, title: str | None = None) -> Path:
    """Write `report.html` and the PNG files of `report/` for a run.

    Args:
        run: folder of one training run, or of a run's stages (see the text at the top).
        title: headline; the folder's name by default.

    Returns:
        Path of `report.html`.

    Raises:
        ValueError: nothing in the folder can be reported.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"There is no run to report at {str(run)!r}: give the output folder of a training recipe.")
    stages = find_stages(run)
    evaluation = run / "evaluation" if (run / "evaluation").is_dir() else run
    metrics, samples = read_json(evaluation / "metrics.json"), read_json(evaluation / "samples" / "samples.json")
    if not stages and not metrics and not samples:
        raise ValueError(
            f"Nothing to report in {str(run)!r}: expected a trainer_state.json there, in a checkpoint-* folder or one "
            "level below (recipes/pretrain.py and recipes/sft.py write it), or a metrics.json (recipes/evaluate.py)."
        )
    pictures = run / "report"
    pictures.mkdir(exist_ok=True)
    if samples:
        plot_sheet(samples, evaluation / "samples", pictures / "sheet.png")
    title = title or f"Run {run.resolve().name}"
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    body = "".join(
        [
            section("Figures", "On pictures that the model was not trained on.", figure_tiles(metrics)),
            section(
                "Losses",
                "Pale: as logged. Strong: exponential mean over a twentieth of the run.",
                *(stage_curves(stage, pictures) for stage in stages),
            ),
            *sample_sections(samples, evaluation / "samples"),
            *stage_sections(stages),
        ]
    )
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>DEEM · {' → '.join(escape(stage.name) for stage in stages)}</p></header>"
        f"{body}<footer>Written by recipes/report.py</footer></main></body></html>\n"
    )
    path = run / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def stage_curves(stage: Stage, pictures: Path) -> str:
    """The loss curves of a stage, also written as PNG files."""
    drawn = []
    for key, label in CURVES.items():
        steps, values = stage.curve(key)
        if steps:
            drawn.append(inline(plot_curve(steps, values, label, pictures / f"{stage.name}_{key}.png"), label))
    return f"<h3>{escape(stage.name)}</h3>{cards('curves', drawn)}" if drawn else ""


def sample_sections(samples: Sequence[dict[str, str]], folder: Path) -> list[str]:
    """What the encoder sees, and the answers."""
    order = "Left to right: the input; the picture redrawn from its own image tokens; a picture drawn from the true caption."
    return [
        section("What the encoder sees", order, sheet_cards(samples, folder)),
        section("Answers", "One question per picture.", answer_cards(samples, folder)),
    ]


def stage_sections(stages: Sequence[Stage]) -> list[str]:
    """Parameters, costs and data of the stages."""
    parts = [f"<h3>{escape(stage.name)}</h3>{parts_table(stage.parts)}" for stage in stages if stage.parts]
    costs = table(["stage", "steps", "per step (median)", "in all", "peak memory"], map(cost_row, stages))
    data = table(
        ["source", "read", "left out", "skipped", "why"], [row for stage in stages for row in data_rows(stage)]
    )
    return [
        section("Parameters", "What trained and what stayed as it was, per part.", *parts),
        section("Time and memory", "Of the training process.", costs),
        section("Data", "Samples used in training, left out by the format's rules, and skipped as unusable.", data),
    ]


def main(arguments: ReportArguments) -> None:
    """Write the report and say where it lies."""
    print(f"report: {write_report(arguments.run, arguments.title)}")


if __name__ == "__main__":
    main(*TrlParser(ReportArguments, allow_abbrev=False).parse_args_and_config())
