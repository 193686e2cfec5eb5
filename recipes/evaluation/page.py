# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`evaluation.html`: one page that needs no other file, with the figures and the worst samples of each benchmark."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.data.faults import BadSample
from recipes.data.readers.images import open_image
from recipes.evaluation.benchmark import ImageSource, Line, stable_number
from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.predictions import PREDICTIONS, read_lines
from recipes.evaluation.sources import DataSource
from recipes.run_report import page as report_page
from recipes.run_report.markup import cards, section, table
from recipes.whole_files import write_whole

PAGE = "evaluation.html"
WORST = 12  # samples shown per benchmark
MOST_IMAGES = 2  # of a sample: both of a pair, a drawing and the real one
SIDE = 224  # of an image on the page, in pixels, at most
Images = Mapping[str, Sequence[ImageSource]]  # by the sample's id


def write_page(out: Path, results: dict[str, dict[str, Any]], sources: Mapping[str, DataSource]) -> Path:
    """Write the page of an evaluation.

    Args:
        out: folder with the predictions of each benchmark.
        results: as `score` returns them.
        sources: where the data is, for images that are no files.

    Returns:
        Its path.
    """
    blocks = []
    for name, result in results.items():
        lines = read_lines(out / name / PREDICTIONS)
        images = images_of(name, sources.get(name))
        blocks.append(
            section(
                name,
                _about(result),
                figure_table(result["figures"], result["headline"]),
                cards("answers", (failure(one) for one in result["failed"])),
                cards("sheet", (sample_card(line, images) for line in worst(lines) or some_drawings(lines))),
            )
        )
    title = "Evaluation (partial)" if any(result["partial"] for result in results.values()) else "Evaluation"
    return write_html(out / PAGE, title, " · ".join(results), blocks, "recipes/evaluate.py")


def write_html(path: Path, title: str, subtitle: str, blocks: Iterable[str], writer: str) -> Path:
    """Write a page in the style of the run report."""
    style = Path(report_page.__file__).with_suffix(".css").read_text(encoding="utf-8")
    head = f"<header><h1>{escape(title)}</h1><p>DEEM · {escape(subtitle)}</p></header>"
    write_whole(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{head}"
        f"{''.join(blocks)}<footer>Written by {writer}</footer></main></body></html>\n",
    )
    return path


def figure_table(figures: Mapping[str, Mapping[str, Any]], headline: str) -> str:
    """Return the figures as a table, the headline first."""
    ordered = sorted(figures.items(), key=lambda item: item[0] != headline)
    head = ("figure", "value", "95 % interval", "chance", "samples", "clusters")
    rows = [
        (
            escape(name),
            f"{figure['value']:.4f}",
            "" if figure["low"] is None else f"{figure['low']:.4f} – {figure['high']:.4f}",
            "" if figure["chance"] is None else f"{figure['chance']:.4f}",
            str(figure["count"]),
            str(figure["clusters"]),
        )
        for name, figure in ordered
    ]
    return table(head, rows)


def worst(lines: Sequence[Line]) -> list[Line]:
    """Return the samples of the lowest score, wrong ones alone; of equal ones some at random, always the same."""
    wrong = [line for line in lines if line["score"] < 1 and not line.get("error")]
    return sorted(wrong, key=lambda line: (line["score"], stable_number(0, line["id"])))[:WORST]


def some_drawings(lines: Sequence[Line]) -> list[Line]:
    """Return some of the drawings at random, always the same; none where nothing was drawn."""
    drawn = [line for line in lines if line["images"] and line["images"][0]["name"] == line["raw"]]
    return sorted(drawn, key=lambda line: stable_number(0, line["id"]))[:WORST]


def images_of(name: str, source: DataSource | None) -> Images:
    """Return the images of all samples where they do not lie in files of their own; nothing without a source."""
    if source is None or source.row_folder is None and source.folders:
        return {}
    return {sample.id: sample.images for sample in benchmark_named(name).load(source).samples}


def sample_card(line: Line, images: Images) -> str:
    """Return a sample's image, prompt, answer and truth."""
    return (
        f"<h3>{escape(line['id'])}</h3>{sample_image(line, images)}"
        + said("prompt", line["prompt"])
        + said("raw answer", line["raw"])
        + said("parsed", line["parsed"])
        + said("truth", line["truth"])
        + said("score", line["score"])
    )


def said(what: str, value: Any) -> str:
    """Return a named value as a paragraph."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<p><span>{escape(what)}</span> {escape(text[:600])}</p>"


def failure(failed: Mapping[str, str]) -> str:
    """Return a failed sample: counted as wrong, not replaced."""
    return f'<p class="bad">{escape(failed["id"])}</p>{said("failed", failed["error"])}'


def sample_image(line: Line, images: Images) -> str:
    """Return the images of a sample, two of them at most, made small, in the page itself; the name of what cannot be
    opened."""
    shown = list(
        {image["name"]: (place, image) for place, image in reversed(list(enumerate(line["images"])))}.values()
    )
    return "".join(_sample_image(line, images, *one) for one in sorted(shown, key=lambda one: one[0])[:MOST_IMAGES])


def _sample_image(line: Line, images: Images, place: int, about: Mapping[str, Any]) -> str:
    """Return the image at a place of a sample."""
    try:
        if about.get("file"):
            image = open_image(Path(about["file"]), about["name"])
        elif line["id"] in images:
            image = images[line["id"]][place].read()[0]
        else:
            return said("image", about["name"])
    except BadSample as error:
        return said("image", str(error))
    return inline_image(image, about["name"])


def inline_image(image: Image.Image, name: str) -> str:
    """Return an image as a tag that carries it."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    small.save(data, "PNG" if max(small.size) <= 64 else "JPEG", quality=85)
    kind = "png" if max(small.size) <= 64 else "jpeg"
    code = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/{kind};base64,{code}" width="{min(SIDE, max(small.size))}">'


def _about(result: Mapping[str, Any]) -> str:
    manifest = result["manifest"]
    parts = [f"{manifest['protocol']} protocol", f"{result['samples']} samples"]
    if result["partial"]:
        parts[-1] = f"partial: {result['samples']} of {manifest['samples_of_the_benchmark']} samples"
    if manifest["without_images"]:
        parts.append("without images")
    if result["failed"]:
        parts.append(f"{len(result['failed'])} failed, counted as wrong")
    return "; ".join((*parts, *result["notes"]))
