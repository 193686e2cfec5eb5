# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The report of a run: one page that needs no other file."""

from html import escape
from pathlib import Path

from recipes.run_report.markup import section
from recipes.run_report.plots import plot_drawings, plot_sheet
from recipes.run_report.sections import figure_tiles, sample_sections, stage_curves, stage_sections
from recipes.run_report.stages import find_stages, read_json
from recipes.seeing.sheets import inspection_sections
from recipes.whole_files import check_writable, write_whole


def write_report(run: str | Path, title: str | None = None) -> Path:
    """Write `report.html` and the PNG files of `report/` for a run.

    Args:
        run: folder of one training run, or of a run's stages (see recipes/report.py).
        title: headline; the folder's name by default.

    Returns:
        Path of `report.html`.

    Raises:
        ValueError: nothing in the folder can be reported.
        OSError: nothing can be written to it.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"There is no run to report at {str(run)!r}: give the output folder of a training recipe.")
    stages = find_stages(run)
    evaluation = run / "evaluation" if (run / "evaluation").is_dir() else run
    metrics, samples = read_json(evaluation / "metrics.json"), read_json(evaluation / "samples" / "samples.json")
    drawings = read_json(evaluation / "samples" / "drawings.json")
    if not stages and not metrics and not samples:
        raise ValueError(
            f"Nothing to report in {str(run)!r}: expected a trainer_state.json there, in a checkpoint-* folder or one "
            "level below (recipes/pretrain.py and recipes/sft.py write it), or a metrics.json (recipes/evaluate.py)."
        )
    plots = run / "report"
    check_writable(plots)
    if samples:
        plot_sheet(samples, evaluation / "samples", plots / "sheet.png")
    if drawings:
        plot_drawings(drawings, evaluation / "samples", plots / "drawings.png")
    title = title or f"Run {run.resolve().name}"
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    body = "".join(
        [
            section("Figures", "On images that the model was not trained on.", figure_tiles(metrics)),
            section(
                "Losses",
                "Pale: as logged. Strong: exponential mean over a twentieth of the run.",
                *(stage_curves(stage, plots) for stage in stages),
            ),
            *sample_sections(samples, drawings, evaluation / "samples"),
            *inspection_sections(run / "seen"),
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
    write_whole(path, html)
    return path
