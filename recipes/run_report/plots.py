# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Curves and the sample sheet, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from recipes.whole_files import whole_file

ROLES = {"input": "input", "reconstruction": "what the encoder sees", "drawn": "drawn from the caption"}
WINDOWS = 20  # the strong line is an exponential mean over about 1/20 of the run


def plot_curve(steps: Sequence[float], values: Sequence[float], title: str, path: Path) -> Path:
    """Plot one logged quantity over the steps: values pale, their exponential mean (unbiased) strong."""
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
    return _saved(figure, path)


def plot_sheet(samples: Sequence[dict[str, str]], folder: Path, path: Path) -> Path:
    """Plot the sample sheet: a row per sample, a column per role."""
    size = (1.6 * len(ROLES), 1.6 * len(samples) + 0.3)
    figure, grid = plt.subplots(len(samples), len(ROLES), figsize=size, dpi=150, layout="constrained", squeeze=False)
    for row, sample in zip(grid, samples, strict=True):
        for axes, (role, label) in zip(row, ROLES.items(), strict=True):
            axes.imshow(plt.imread(folder / sample[role]), interpolation="nearest")
            axes.set_axis_off()
            if row is grid[0]:
                axes.set_title(label, fontsize=8)
    return _saved(figure, path)


def plot_drawings(drawings: Sequence[dict[str, str]], folder: Path, path: Path) -> Path:
    """Plot the contact sheet: a row of drawings per color, the prompt under each."""
    colors = list(dict.fromkeys(drawing["color"] for drawing in drawings))
    rows = [[drawing for drawing in drawings if drawing["color"] == color] for color in colors]
    size = (1.5 * max(map(len, rows)), 1.7 * len(rows))
    figure, grid = plt.subplots(
        len(rows), max(map(len, rows)), figsize=size, dpi=150, layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for places, row in zip(grid, rows, strict=True):
        for axes, drawing in zip(places, row, strict=False):
            axes.imshow(plt.imread(folder / drawing["file"]), interpolation="nearest")
            axes.set_title(drawing["prompt"], fontsize=8, y=-0.16)
    return _saved(figure, path)


def _saved(figure: Figure, path: Path) -> Path:
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:])
    plt.close(figure)
    return path
