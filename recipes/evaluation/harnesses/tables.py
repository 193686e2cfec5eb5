# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Benchmarks of ours as rows that other harnesses read: each sample with its images, question and truth in one row."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from recipes.data.faults import BadSample, printable
from recipes.data.samples import IMAGE
from recipes.evaluation.benchmark import Benchmark, ImageSource, Line, Sample, scored
from recipes.evaluation.harnesses.requests import pieces_row

REGION_QUESTION = "Provide a short description for this region."  # as lmms-eval asks about outlined regions
OUTLINE, WIDTH = (255, 0, 0), 2  # of a region: red, pixels


@dataclass(frozen=True)
class Row:
    """A sample as a row.

    Attributes:
        names, images: of its images, and their files' bytes; a region is outlined on its image.
        columns: what else the row holds, texts alone.
    """

    names: tuple[str, ...]
    images: tuple[bytes, ...]
    columns: dict[str, str]


def make_row(benchmark: Benchmark, sample: Sample, protocol: str, known: dict[str, bytes]) -> Row:
    """Return a sample as a row.

    Args:
        protocol: whose prompts `question` and `pieces` hold, and whose rules score the answers.
        known: files of images by name, which are read once; added to.

    Raises:
        BadSample: it cannot be asked.
    """
    if sample.fault:
        raise BadSample("unusable row", sample.fault)
    request = benchmark.request(sample, protocol)
    texts = [piece for piece in request.pieces if piece is not IMAGE]
    columns = {
        "id": sample.id,
        "question": REGION_QUESTION if benchmark.takes_regions else "".join(texts).strip(),
        "truth": json.dumps(sample.truth),
        "cluster": sample.cluster,
        "group": sample.group,
        "about": json.dumps(sample.about),
        "protocol": protocol,
        **pieces_row(request),
    }
    if benchmark.takes_regions:
        shown = [source for source in sample.images if source.segmentation is not None]
        return Row(tuple(f"{source.name} {sample.id}" for source in shown), tuple(map(outlined, shown)), columns)
    for source in sample.images:
        if source.name not in known:
            known[source.name] = _file_of(source)
    names = tuple(source.name for source in sample.images)
    return Row(names, tuple(known[name] for name in names), columns)


def line_of(row: dict[str, Any], raw: str) -> Line:
    """Return what a harness's answer to a row is as a line of predictions, not yet scored."""
    return {
        "id": row["id"],
        "group": row["group"],
        "cluster": row["cluster"],
        "protocol": row["protocol"],
        "raw": raw,
        "truth": json.loads(row["truth"]),
        "about": json.loads(row["about"]),
    }


def scored_row(benchmark: Benchmark, row: dict[str, Any], raw: str) -> Line:
    """Return the line of a harness's answer, parsed and scored by the benchmark's rules."""
    return scored(benchmark, line_of(row, raw))


def rows_of(benchmark: Benchmark, samples: Sequence[Sample], protocol: str) -> tuple[list[Row], list[str]]:
    """Return the rows of all samples that can be asked, and what is wrong with the others, a line each."""
    rows: list[Row] = []
    faults: list[str] = []
    known: dict[str, bytes] = {}
    for sample in samples:
        try:
            rows.append(make_row(benchmark, sample, protocol, known))
        except BadSample as error:
            faults.append(f"{sample.id}: {printable(str(error))}")
    return rows, faults


def outlined(source: ImageSource) -> bytes:
    """Return the image of a region as PNG with the region's border in red."""
    image, _ = source.read()
    try:
        mask = np.asarray(source.mask(image)) > 0
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadSample("broken mask", source.name) from error
    inner, padded = mask.copy(), np.pad(mask, WIDTH)
    for down, right in ((WIDTH, 0), (-WIDTH, 0), (0, WIDTH), (0, -WIDTH)):
        top, left = WIDTH + down, WIDTH + right
        inner &= padded[top : top + mask.shape[0], left : left + mask.shape[1]]
    pixels = np.array(image)
    pixels[mask & ~inner] = OUTLINE
    return _png(Image.fromarray(pixels))


def _file_of(source: ImageSource) -> bytes:
    """Return an image's file as it is, once it is known to be readable; as PNG where it has none."""
    if callable(source.where):
        stored = source.where()
        image, _ = ImageSource(source.name, lambda: stored).read()
        return stored if isinstance(stored, bytes) else _png(image)
    source.read()
    return source.where.read_bytes()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
