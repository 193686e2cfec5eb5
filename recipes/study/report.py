# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`evidence.html` and `evidence.json`: the tables, curves, sheets and sentences of the experiment."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from recipes.evaluation.page import images_of, said, sample_image, write_html
from recipes.evaluation.predictions import PREDICTIONS, read_lines
from recipes.evaluation.sources import DataSource
from recipes.run_report.markup import cards, inline, section, table
from recipes.study.photographs import PHOTOGRAPH_MEASURES, read_photograph_results
from recipes.study.questions import BENCHMARKS
from recipes.study.settings import ARMS, EvidenceArguments
from recipes.study.start import read_images
from recipes.study.summary import GROUPS, TESTED_GRADES, Results, points, read_results, said_of, summarize, table_of
from recipes.whole_files import whole_file, write_whole

COLORS = ("#667085", "#2f5bea", "#d97706", "#12805c", "#b42318", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#111827")
CURVES = (*GROUPS, "robustvqa choice", "mmvp pairs", "probe color")
EXAMPLES, SHOWN, ZOOM = 12, 12, 2  # images of a grade, questions shown, pixels of a pixel
MARK = {"holds": "good", "does not hold": "bad"}


def write_report(arguments: EvidenceArguments) -> dict[str, Any]:
    """Write both files for the results that are there; return what `evidence.json` holds.

    Raises:
        ValueError: there are no results.
    """
    results = read_results(arguments)
    if not results:
        raise ValueError(f"No results in {arguments.out}: run the same command without --job.")
    summary = summarize(arguments, results)
    summary["said"] = said_of(summary)
    real = read_photograph_results(arguments)
    summary["photographs"] = {"arms": list(real), "table": {"0": table_of(real, PHOTOGRAPH_MEASURES, "0")}}
    out = Path(arguments.out)
    write_whole(out / "evidence.json", json.dumps(summary, indent=1))
    (out / "report").mkdir(exist_ok=True)
    seed = min(min(seeds) for seeds in results.values())
    verdicts = [
        f'<p><b class="{MARK.get(verdict, "")}">{verdict}</b>: {escape(text)}</p>' for verdict, text in summary["said"]
    ]
    blocks = [section("What holds and what does not", "By the intervals alone; written from the numbers.", *verdicts)]
    for grade in TESTED_GRADES:
        note = f"Mean of {len(arguments.seeds)} seeds ({', '.join(map(str, arguments.seeds))}), each seed below it."
        blocks.append(section(f"Grade {grade}", note, *measure_tables(summary, grade)))
    blocks += [
        section(
            "Over the grades of shift",
            "Means over seeds; bars from the lowest to the highest seed.",
            _image(plot_curves(summary, out), "curves"),
        ),
        section(
            "The grades",
            "A row each, from what is trained on down to the furthest.",
            _image(examples(arguments, seed), "grades"),
        ),
        *redrawn_sections(arguments, results, seed),
        section(
            "Answered rightly with feedback alone",
            "Both others are wrong; grade 0.",
            *only_with_feedback(arguments, results, seed),
        ),
        *photograph_section(summary),
        section(
            "Cost",
            "Means over seeds, in seconds of one CPU core; the training of the arm is `train`. Memory: the most of all seeds, "
            "until the end of training.",
            cost_table(summary),
        ),
        section("The arms", "", table(("arm", "what it is"), [(name, escape(ARMS[name].says)) for name in results])),
    ]
    write_html(
        out / "evidence.html", "Does the feedback keep what captions omit?", "evidence", blocks, "recipes/evidence.py"
    )
    return summary


def _image(path: Path, alternative: str) -> str:
    return f'<div class="card scroll">{inline(path, alternative)}</div>'


def measure_tables(summary: dict[str, Any], grade: str) -> list[str]:
    """Return two tables of a grade: what each arm has, and what lies between two arms."""
    rows = summary["table"].get(grade, {})
    arms = summary["arms"]
    shares, gains = [], []
    names = list(next(iter(rows.values()))["differences"]) if rows else []
    for measure, row in rows.items():
        strong = "<b>{}</b>" if measure in GROUPS else "{}"
        shares.append((strong.format(escape(measure)), *(_share(row["arms"].get(arm)) for arm in arms)))
        gains.append((strong.format(escape(measure)), *(_gain(row["differences"].get(name)) for name in names)))
    heads = [("measure", *arms), ("measure, points [95 %], p by Holm", *names)]
    return [table(heads[0], shares), table(heads[1], gains)]


def _share(row: dict[str, Any] | None) -> str:
    if not row:
        return ""
    seeds = " ".join(f"{100 * value:.1f}" for value in row["seeds"].values())
    return f'{100 * row["value"]:.1f}<br><small class="note">{seeds}</small>'


def _gain(row: dict[str, Any] | None) -> str:
    if not row:
        return ""
    kind = "good" if row["low"] > 0 else "bad" if row["high"] < 0 else ""
    return f'<span class="{kind}">{points(row)}</span><br><small class="note">p {row.get("corrected", 1):.2g}</small>'


def photograph_section(summary: dict[str, Any]) -> list[str]:
    """Return the tables of the photographs, where they were part of the run."""
    if not summary["photographs"]["arms"]:
        return []
    note = (
        "An encoder that is told groups of classes, and probes of its last map on photographs that it was not trained on; "
        "`before` is where all arms begin. Few photographs: mind the intervals."
    )
    return [section("Photographs", note, *measure_tables(summary["photographs"], "0"))]


def plot_curves(summary: dict[str, Any], out: Path) -> Path:
    """Plot measures over the grades, a line per arm."""
    grades = [grade for grade in summary["table"] if summary["table"][grade]]
    shown = [one for one in CURVES if any(one in summary["table"][grade] for grade in grades)]
    height = 2.6 * -(-len(shown) // 3)
    figure, grid = plt.subplots(
        -(-len(shown) // 3), 3, figsize=(10.5, height), dpi=150, layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, measure in zip(grid.flat, shown, strict=False):
        for arm, color in zip(summary["arms"], COLORS, strict=False):
            found = [(int(g), summary["table"][g].get(measure, {}).get("arms", {}).get(arm)) for g in grades]
            found = [(grade, row) for grade, row in found if row]
            seeds = [list(row["seeds"].values()) for _, row in found]
            values = [100 * row["value"] for _, row in found]
            bars = [
                [value - 100 * min(own) for value, own in zip(values, seeds, strict=True)],
                [100 * max(own) - value for value, own in zip(values, seeds, strict=True)],
            ]
            bars = np.clip(bars, 0, None)
            axes.errorbar(
                [grade for grade, _ in found], values, bars, color=color, label=arm, linewidth=1.4, capsize=2
            )
        axes.set_title(measure, fontsize=8.5, loc="left", color="#1c2430")
        axes.set_xticks([int(grade) for grade in grades])
        axes.tick_params(labelsize=7.5, colors="#667085", length=0)
        axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
        axes.spines[:].set_visible(False)
    grid.flat[0].legend(fontsize=7, frameon=False)
    path = out / "report" / "curves.png"
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")
    plt.close(figure)
    return path


def sheet(rows: Sequence[Sequence[Image.Image]], path: Path) -> Path:
    """Write rows of images as one PNG, each enlarged."""
    side = ZOOM * rows[0][0].width + 4
    whole = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image.resize((side - 4, side - 4), Image.Resampling.NEAREST), (x * side, y * side))
    with whole_file(path) as unfinished:
        whole.save(unfinished, format="PNG")
    return path


def examples(arguments: EvidenceArguments, seed: int) -> Path:
    """Write the sheet of grades."""
    start = arguments.folder(seed, "start")
    rows = [read_images(start, f"tested{grade}")[:EXAMPLES] for grade in sorted(arguments.grades)]
    return sheet(rows, Path(arguments.out, "report", "grades.png"))


def redrawn_sections(arguments: EvidenceArguments, results: Results, seed: int) -> list[str]:
    """Return the sheets of images redrawn from the tokens of each arm."""
    found = []
    for grade in (0, 2):
        files = {arm: arguments.folder(seed, arm) / f"redrawn{grade}.npy" for arm in results}
        files = {arm: file for arm, file in files.items() if file.is_file()}
        if not files or grade not in arguments.grades:
            continue
        rows = [read_images(arguments.folder(seed, "start"), f"tested{grade}")[: arguments.num_redrawn]]
        rows += [[Image.fromarray(pixels) for pixels in np.load(file)] for file in files.values()]
        path = sheet(rows, Path(arguments.out, "report", f"redrawn{grade}.png"))
        note = (
            f"Rows: the image, then redrawn from the tokens of {', '.join(files)}, at the same noise. For every arm a new "
            "connector of equal size was trained on its frozen tokens; the denoiser is the same frozen one."
        )
        found.append(section(f"What the tokens hold, grade {grade}", note, _image(path, "redrawn images")))
    return found


def only_with_feedback(arguments: EvidenceArguments, results: Results, seed: int) -> list[str]:
    """Return cards of questions that the arm with feedback answers rightly, and neither of the others."""
    arms = [arm for arm in ("text", "exchanged") if arm in results and seed in results[arm]]
    if not arms or seed not in results.get("consistency", {}):
        return []
    made = []
    for name in BENCHMARKS:
        folders = [
            arguments.folder(seed, arm) / "answers" / "0" / name / PREDICTIONS for arm in ("consistency", *arms)
        ]
        if not all(folder.is_file() for folder in folders):
            continue
        lines = [{line["id"]: line for line in read_lines(folder)} for folder in folders]
        alone = [
            one for one, line in lines[0].items() if line["score"] == 1 and not any(o[one]["score"] for o in lines[1:])
        ]
        where = arguments.folder(seed, "start") / "questions" / "tested0" / name
        images = images_of(name, DataSource(name, str(where)))
        made.append(f"<p>{name}: {len(alone)} of {len(lines[0])}</p>")
        shown = []
        for identity in alone[:: max(1, len(alone) // (SHOWN // 3))][: SHOWN // 3]:
            line = lines[0][identity]
            answers = [
                said(arm, str(o[identity]["raw"])) for arm, o in zip(("consistency", *arms), lines, strict=True)
            ]
            shown.append(sample_image(line, images) + said("asked", line["asked"]) + "".join(answers))
        made.append(cards("sheet", shown))
    return made


def cost_table(summary: dict[str, Any]) -> str:
    """Return CPU seconds and memory of each arm, and its connector's loss on frozen tokens."""
    names = list({name: 0 for cost in summary["cost"].values() for name in cost})
    rows = []
    for arm, cost in summary["cost"].items():
        losses = list(summary["redrawing"][arm].values())
        rows.append(
            (
                escape(arm),
                *(f"{cost[name]:.0f}" if name in cost else "" for name in names),
                f"{sum(losses) / len(losses):.4f}",
            )
        )
    return table(("arm", *names, "loss of redrawing from frozen tokens"), rows)


def headline(summary: dict[str, Any], grade: str = "0", title: str = "") -> str:
    """Return the headline table as aligned text: what each arm has, and the two differences, in percent and points."""
    arms = summary["arms"]
    names = ("consistency - text", "consistency - exchanged")
    lines = [
        f"{title or 'grade ' + grade:36s}"
        + "".join(f"{arm:>12s}" for arm in arms)
        + "".join(f"{name:>25s}" for name in names)
    ]
    for measure, row in summary["table"].get(grade, {}).items():
        shares = (row["arms"].get(arm) for arm in arms)
        gains = (row["differences"].get(name) for name in names)
        cells = "".join(f"{100 * one['value']:12.1f}" if one else " " * 12 for one in shares)
        lines.append(f"{measure:36s}{cells}" + "".join(f"{points(one) if one else '':>25s}" for one in gains))
    return "\n".join(lines)
