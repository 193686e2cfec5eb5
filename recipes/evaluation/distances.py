# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Features of real and drawn images, kept beside the drawings, and the distances that are made of them.

    <out>/<benchmark>/features/<name>.npz     ids, real and drawn features by rule, those of the captions, facts

The word FID is for Inception's features alone; distances by others are called fd_<name>. Definitions: scoring/frechet.py.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipes.data.readers.images import open_image
from recipes.evaluation.benchmark import Figure, Figures, Line
from recipes.evaluation.benchmarks.shares import figure_of
from recipes.evaluation.extractors import Extractor
from recipes.evaluation.predictions import digest
from recipes.evaluation.scoring.frechet import cmmd, frechet_distance, kid, precision_recall, similarities
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.whole_files import whole_file

FEATURES = "features"
NEIGHBORS = 5  # of precision and recall


def extract(folder: Path, lines: Sequence[Line], extractor: Extractor, batch_size: int = 50) -> Path:
    """Write the features of all drawn and real images; what is there already, of the same images, stays.

    Args:
        folder: of the benchmark's predictions.

    Raises:
        ValueError: a drawing is not there any more, or is another.
    """
    file = folder / FEATURES / f"{extractor.name}.npz"
    drawn = [line for line in lines if not line.get("error")]
    facts = json.dumps(extractor.facts, sort_keys=True)
    marks = [_mark(line) for line in drawn]
    if file.is_file():
        with np.load(file) as saved:
            if saved["marks"].tolist() == marks and str(saved["facts"]) == facts:
                return file
    columns: dict[str, list[np.ndarray]] = {}
    starts = range(0, len(drawn), batch_size)
    for start in tqdm(starts, desc=f"features: {extractor.name}"):
        for name, values in _batch(folder, drawn[start : start + batch_size], extractor):
            columns.setdefault(name, []).append(values)
    if not drawn:
        raise ValueError(f"{folder} holds no drawings to take features of.")
    with whole_file(file) as unfinished, open(unfinished, "wb") as stream:
        joined: dict[str, Any] = {name: np.concatenate(values) for name, values in columns.items()}
        np.savez(stream, marks=np.array(marks), facts=np.array(facts), **joined)
    return file


def _mark(line: Line) -> str:
    """Return what a line's features depend on: its id, its images, its caption."""
    return " ".join([line["id"], *(image["sha256"] for image in line["images"]), line["asked"]])


def _batch(folder: Path, lines: Sequence[Line], extractor: Extractor) -> Iterator[tuple[str, np.ndarray]]:
    for line in lines:
        file = folder / line["raw"]
        if not file.is_file() or digest(file) != line["images"][0]["sha256"]:
            raise ValueError(
                f"The drawing {file} of sample {line['id']} is gone or another. Remove its line from the predictions, and "
                "the same command draws it again."
            )
    drawn = [open_image(folder / line["raw"], line["raw"]) for line in lines]
    real = [open_image(Path(line["images"][1]["file"]), line["images"][1]["name"]) for line in lines]
    for which, images in (("drawn", drawn), ("real", real)):
        for rule, values in extractor.images(images).items():
            yield f"{which}/{rule}", values
    if (texts := extractor.texts([line["asked"] for line in lines])) is not None:
        yield "text", texts


def saved_figures(folder: Path, lines: Sequence[Line]) -> tuple[Figures, list[str]]:
    """Return the figures of all features in a folder, and what a reader must know of them."""
    figures: Figures = {}
    notes: list[str] = []
    marks = [_mark(line) for line in lines if not line.get("error")]
    clusters = [line["cluster"] for line in lines if not line.get("error")]
    for file in sorted((folder / FEATURES).glob("*.npz")):
        with np.load(file) as saved:
            if saved["marks"].tolist() != marks:
                notes.append(
                    f"{file.name} is of other drawings, and left out: give --extractors {file.stem}=... again"
                )
                continue
            facts = json.loads(str(saved["facts"]))
            notes.append(f"{file.stem}: {_words(facts)}; {len(marks)} real and drawn images each")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                figures |= _of_features(file.stem, facts["kind"], saved, clusters)
            notes += [f"{file.stem}: {warning.message}" for warning in caught]
    return dict(sorted(figures.items(), key=lambda item: not item[0].startswith("fid"))), list(dict.fromkeys(notes))


def _words(facts: dict[str, Any]) -> str:
    """Return the facts of an extractor in a few words."""
    words = [facts["kind"], facts.get("resize", "")]
    if "usual_file" in facts:
        usual = (
            "the usual weights" if facts["usual_file"] else "NOT the usual weights, so that this is no published FID"
        )
        words += [usual, f"sha256 {facts['sha256'][:12]}"]
    return ", ".join(word for word in words if word)


def _of_features(name: str, kind: str, saved: Any, clusters: Sequence[str]) -> Figures:
    """Return the figures of one file of features."""
    figures: Figures = {}
    for rule in sorted(key.removeprefix("real/") for key in saved if key.startswith("real/")):
        real, drawn = (saved[f"{which}/{rule}"] for which in ("real", "drawn"))
        ending = f"_{rule}" if rule else ""
        if len(real) < 2:
            warnings.warn("a distance needs two images or more", stacklevel=2)
            continue
        base = "fid" if kind == "inception" else f"fd_{name}"
        figures[f"{base}{ending}"] = Figure(frechet_distance(real, drawn), count=len(real))
        if rule:
            continue
        spread = kid(real, drawn)
        figures[f"kid_{name}"] = Figure(spread.value, count=len(real))
        figures[f"kid_{name}_spread"] = Figure(spread.spread, count=len(real))
        if len(real) > NEIGHBORS:
            shares = precision_recall(real, drawn, NEIGHBORS)
            figures |= {f"{one}_{name}": Figure(value, count=len(real)) for one, value in shares.items()}
        if kind == "towers":
            figures[f"cmmd_{name}"] = Figure(cmmd(real, drawn), count=len(real))
            figures |= _by_cosine(name, saved, clusters)
    return figures


def _by_cosine(name: str, saved: Any, clusters: Sequence[str]) -> Figures:
    """Return how well drawings fit their captions (0 to 100) and the real images (cosine)."""
    fit = 100 * np.maximum(similarities(saved["text"], saved["drawn/"]), 0)
    near = similarities(saved["real/"], saved["drawn/"])
    return {
        f"clip_score_{name}": figure_of(mean_interval(fit.tolist(), clusters, (0.0, 100.0))),
        f"clip_similarity_{name}": figure_of(mean_interval(near.tolist(), clusters, (-1.0, 1.0))),
    }
