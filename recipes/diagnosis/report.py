# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`diagnosis.html`: the numbers of recipes/diagnose.py as one page of pictures."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from modeling_deem import DeemImageError
from recipes.diagnosis.images import Images
from recipes.diagnosis.scores import SCORES
from recipes.evaluation.page import write_html
from recipes.run_report.markup import inline, section, table
from recipes.whole_files import whole_file

COLORS = ("#2f5bea", "#d97706", "#7c3aed", "#12805c", "#b42318", "#667085")
SHOWN = 8  # images of the sheet
LEAK = (
    "The error at the timesteps of the loss. If features alone do as well as both, the denoiser sees past the tokens, and "
    "little of the loss teaches them. If the tokens of another image cost nothing, nothing does."
)
TIMESTEPS = (
    "Gray: the timesteps of the loss. Told apart is the share of images that are redrawn better from their own tokens than "
    "from another's; half is chance. Timesteps at half teach the tokens nothing."
)
GRADIENT = (
    "Means over batches. Shares add up to 1; one below 0 works against the others. Agreement is the cosine of a loss's "
    "gradients on two batches: near 0 it is mostly noise."
)
TOKENS = "How much the error grows when one token is left out. Bars: 95 % interval over images."
SCORED = (
    "Area under the ROC curve [95 % interval]; 0.5 tells nothing, below it the score tells the opposite. The bare error knows "
    "nothing of what the encoder made of the image: what it tells is how hard the picture is to denoise."
)
ADAPTED = "Change of the share of right answers, in points, behind a few steps on the redrawing of an image."
SHEET = "Rows: image, error from its own tokens, what the tokens of another image cost at each cell (red: worse)."


def write_diagnosis(out: Path, found: Mapping[str, Any], images: Images, errors: Mapping[str, DeemImageError]) -> Path:
    """Write `diagnosis.html` and its pictures; return the page's path.

    Args:
        found: what recipes/diagnose.py found.
        images, errors: what the sheet shows, see `condition_errors`.
    """
    pictures = {"leak": plot_leak(found), "timesteps": plot_timesteps(found), "sheet": plot_sheet(images, errors)}
    if "tokens" in found:
        pictures["tokens"] = plot_tokens(found["tokens"])
    tags = {}
    for name, figure in pictures.items():
        with whole_file(out / f"{name}.png") as unfinished:
            figure.savefig(unfinished, format="png")
        plt.close(figure)
        tags[name] = f'<div class="card scroll">{inline(out / f"{name}.png", name)}</div>'
    blocks = [
        section("Leak test", LEAK, tags["leak"], leak_table(found)),
        section("Timesteps", TIMESTEPS, tags["timesteps"]),
        section("Gradient", GRADIENT, *gradient_tables(found.get("gradients"))),
        section("Tokens", TOKENS, tags.get("tokens", ""), token_table(found)),
        section("Scores", SCORED, *score_tables(found.get("scores"))),
        section("Adapting at test time", ADAPTED, adapt_table(found.get("adapting"))),
        section("Images", SHEET, tags["sheet"]),
    ]
    subtitle = f"{found['model']}, {found['images']} images"
    return write_html(out / "diagnosis.html", "Diagnosis", subtitle, blocks, "recipes/diagnose.py")


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for a cell, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def area(found: Mapping[str, float] | None) -> str:
    """Return an AUROC with its interval and numbers for a cell."""
    if found is None:
        return "– (fewer than 2 of a kind)"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def points(found: Mapping[str, float]) -> str:
    """Return a share in percent with its interval for a cell."""
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def leak_table(found: Mapping[str, Any]) -> str:
    """Return the leak test as a table."""
    rows = [
        (
            escape(found["conditions"][name]),
            number(one["error"]),
            f"{number(one['more'])} [{number(one['low'])}, {number(one['high'])}]",
            f"{100 * one['share']:+.1f} %",
        )
        for name, one in found["leak"].items()
    ]
    return table(("redrawn from", "error", "more than own [95 %]", "share"), rows)


def gradient_tables(found: Mapping[str, Any] | None) -> list[str]:
    """Return losses and angles as tables."""
    if not found:
        return []
    rows = [
        (escape(name), number(one["norm"]), number(one["share"]), number(one["agreement"]))
        for name, one in found["losses"].items()
    ]
    angles = [(escape(name), number(value)) for name, value in found["cosines"].items()]
    heads = (("loss, times its weight", "norm", "share", "agreement"), ("losses", "cosine"))
    return [table(heads[0], rows), table(heads[1], angles)]


def token_table(found: Mapping[str, Any]) -> str:
    """Return how many tokens are used, and how much they differ."""
    spread = found["spread"]
    rows = [
        ("variance of tokens that is between images", f"{100 * spread['of_images']:.1f} %"),
        ("effective number of directions in which images differ", f"{spread['directions']:.1f}"),
        ("mean cosine of two tokens of an image, without what all images share", f"{spread['alike']:.2f}"),
    ]
    if "tokens" in found:
        total = len(found["tokens"]["effects"])
        rows.append(("tokens without which images are redrawn worse", f"{found['tokens']['used']} of {total}"))
        rows.append(("effective number of tokens used", f"{found['tokens']['effective']:.1f} of {total}"))
    return table(("", ""), rows)


def score_tables(found: Mapping[str, Any] | None) -> list[str]:
    """Return the AUROCs as tables: of shifted images, of wrong answers."""
    if not found:
        return []
    grades = list(found["shifted"])
    rows = [
        (escape(words), *(area(found["shifted"][grade][name]) for grade in grades)) for name, words in SCORES.items()
    ]
    shifted = table(("shifted against familiar images", *(f"grade {grade}" for grade in grades)), rows)
    columns = [(grade, one) for grade in found["wrong"] for one in found["wrong"][grade]]
    rows = [
        (escape(words), *(area(found["wrong"][grade][one][name]) for grade, one in columns))
        for name, words in SCORES.items()
    ]
    rows.append(("error less doubt", *(area(found["better"][grade][one]) for grade, one in columns)))
    right = (found["right"][grade][one] for grade, one in columns)
    rows.append(("answers that are right", *(f"{100 * one['value']:.1f} %" for one in right)))
    heads = ("wrong against right answers", *(f"{one}, grade {grade}" for grade, one in columns))
    return [shifted, table(heads, rows)]


def adapt_table(found: Mapping[str, Any] | None) -> str:
    """Return what adapting did as a table."""
    if not found:
        return ""
    names = list(found["before"])
    rows = [("before", "", "", *(f"{100 * found['before'][name]['value']:.1f} %" for name in names))]
    for rate, kinds in found["rates"].items():
        for kind, one in kinds.items():
            learned = "the image itself" if kind == "own" else "another image"
            rows.append((rate, learned, points(one["error"]), *(points(one["change"][name]) for name in names)))
    return table(("rate", "learned from", "error, %", *names), rows)


# ---- pictures ----


def blank(width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure of one plot in the style of the run report."""
    figure, axes = plt.subplots(figsize=(width, height), dpi=150, layout="constrained")
    axes.tick_params(labelsize=8, colors="#667085", length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color="#e4e7ec", linewidth=0.8)
    return figure, axes


def plot_leak(found: Mapping[str, Any]) -> Figure:
    """Plot the error of each condition."""
    figure, axes = blank(7, 0.4 * len(found["leak"]) + 0.8)
    axes.grid(False)
    names = list(found["leak"])[::-1]
    bars = axes.barh(
        [found["conditions"][name] for name in names],
        [found["leak"][name]["error"] for name in names],
        color=COLORS[0],
    )
    axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=3)
    axes.set_xlabel("error", fontsize=8)
    return figure


def plot_timesteps(found: Mapping[str, Any]) -> Figure:
    """Plot the errors by timestep, and how well each tells tokens apart."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), dpi=150, layout="constrained")
    one = found["timesteps"]
    for color, (name, values) in zip(COLORS, one["errors"].items(), strict=False):
        left.plot(one["timesteps"], values, color=color, label=name, linewidth=1.4, marker=".", markersize=4)
    left.set_yscale("log")
    left.legend(fontsize=7, frameon=False)
    left.set_title("error", fontsize=9, loc="left")
    right.plot(one["timesteps"], one["told_apart"], color=COLORS[0], marker=".")
    right.fill_between(one["timesteps"], one["low"], one["high"], color=COLORS[0], alpha=0.15)
    right.axhline(0.5, color="#667085", linewidth=0.8, linestyle=":")
    right.set_title("share of images told apart by their tokens", fontsize=9, loc="left")
    for axes in (left, right):
        axes.axvspan(*found["window"], color="#e4e7ec", alpha=0.5, linewidth=0)
        axes.set_xlabel("timestep", fontsize=8)
        axes.tick_params(labelsize=8, colors="#667085", length=0)
        axes.spines[:].set_visible(False)
    return figure


def plot_tokens(found: Mapping[str, Any]) -> Figure:
    """Plot the effect of leaving out each token."""
    figure, axes = blank(10, 2.6)
    effects = found["effects"]
    below, above = (
        [abs(end - one) for end, one in zip(found[name], effects, strict=True)] for name in ("low", "high")
    )
    axes.bar(range(len(effects)), effects, color=COLORS[0])
    axes.errorbar(range(len(effects)), effects, [below, above], fmt="none", ecolor="#667085", linewidth=0.8)
    axes.set_xlabel("token", fontsize=8)
    axes.set_title("growth of the error without this token", fontsize=9, loc="left")
    return figure


def plot_sheet(images: Images, errors: Mapping[str, DeemImageError]) -> Figure:
    """Plot images, their error maps, and what the tokens of another image cost at each cell."""
    count = min(SHOWN, len(images))
    figure, grid = plt.subplots(3, count, figsize=(1.3 * count, 4.1), dpi=150, layout="constrained", squeeze=False)
    own, other = (errors[name].error_maps[:count].float().cpu() for name in ("own", "other tokens"))
    shown = (images.target_pixel_values[:count].float().cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    reach = float((other - own).abs().max()) or 1.0
    for place in range(count):
        grid[0, place].imshow(shown[place].numpy(), interpolation="nearest")
        grid[1, place].imshow(own[place].numpy(), cmap="viridis", vmin=0, vmax=float(own.max()))
        grid[2, place].imshow((other - own)[place].numpy(), cmap="coolwarm", vmin=-reach, vmax=reach)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure
