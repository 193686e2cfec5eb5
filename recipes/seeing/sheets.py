# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Sheets of views as PNG files, and the sections of HTML that show them."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.run_report.markup import inline, section
from recipes.seeing.maps import overlay, sheet
from recipes.seeing.views import View
from recipes.whole_files import whole_file, write_whole

INSPECTION = "inspection.json"
REDRAWN = (
    "First row: the image, and redrawn from its own tokens with each seed. Second row: the error of redrawing over the image, "
    "mean of all timesteps and then each; bright cells are redrawn badly. Two checkpoints have the same noise and scale."
)
TOKENS = (
    "One map per image token: which cells get worse (red) or better (blue) when it alone is left out. Tokens that say the same "
    "have the same map; a pale one is not missed."
)


def redrawn_sheet(views: Sequence[View], side: int) -> Image.Image:
    """One image under one or more models: image and redrawings, then the mean map and those of each timestep, per model.

    Args:
        views: of the same image, one per model; their maps have one scale.
        side: of an image on the sheet, in pixels.
    """
    most = max(view.most for view in views)
    rows = []
    for view in views:
        timesteps = [None, *view.error.timesteps.tolist()]
        rows.append([view.image, *view.redrawn])
        rows.append([overlay(view.image, view.error_map(t), most) for t in timesteps])
    return sheet([[image.resize((side, side), Image.Resampling.NEAREST) for image in row] for row in rows])


def token_sheet(views: Sequence[View], side: int) -> Image.Image:
    """The map of each image token, a row of eight per model; see `redrawn_sheet`."""
    most = max(float(view.error.token_error_maps.abs().max()) for view in views)
    rows = []
    for view in views:
        length = view.error.token_error_maps.shape[1]
        maps = [overlay(view.image, view.token_map(token), most, signed=True) for token in range(length)]
        rows += [maps[start : start + 8] for start in range(0, length, 8)]
    return sheet([[image.resize((side, side), Image.Resampling.NEAREST) for image in row] for row in rows])


def write_inspection(out: Path, views: Mapping[str, Sequence[View]], names: Sequence[str], side: int = 160) -> Path:
    """Write sheets and figures of images; return the path of `inspection.json`.

    Args:
        out: folder that is there.
        views: of the same images, by the name of the checkpoint.
        names: of the images.
        side: of an image on the sheets, in pixels.
    """
    lines = []
    for index, name in enumerate(names):
        own = [of_model[index] for of_model in views.values()]
        files = {"redrawn": redrawn_sheet(own, side)}
        if all(view.error.token_error_maps is not None for view in own):
            files["tokens"] = token_sheet(own, side)
        line: dict[str, Any] = {"image": name, "seeds": own[0].seeds}
        line["figures"] = {model: view.figures() for model, view in zip(views, own, strict=True)}
        for kind, image in files.items():
            line[kind] = f"{index}_{kind}.png"
            with whole_file(out / line[kind]) as unfinished:
                image.save(unfinished, format="png")
        lines.append(line)
    write_whole(out / INSPECTION, json.dumps(lines, indent=1) + "\n")
    return out / INSPECTION


def inspection_sections(folder: Path) -> list[str]:
    """The sections of HTML for what `write_inspection` wrote into a folder; none where it has written nothing."""
    if not (folder / INSPECTION).is_file():
        return []
    lines = json.loads((folder / INSPECTION).read_text(encoding="utf-8"))
    pictures = {kind: [_card(folder, line, kind) for line in lines if kind in line] for kind in ("redrawn", "tokens")}
    return [
        section("Redrawn from its own tokens", REDRAWN, *pictures["redrawn"]),
        section("What each token holds", TOKENS, *pictures["tokens"]),
    ]


def _card(folder: Path, line: Mapping[str, Any], kind: str) -> str:
    """One sheet, and whose errors it shows."""
    errors = [f"{escape(model)}: error {figures['error']:.4f}" for model, figures in line["figures"].items()]
    said = f"<p>{escape(line['image'])} · {' · '.join(errors)}</p>"
    return f'<div class="card scroll">{inline(folder / line[kind], line["image"])}{said}</div>'
