# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Objects in the forms that annotation files have: masks, boxes, categories, referring expressions."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools import mask as coco

from recipes.synthetic.drawing import run_lengths
from recipes.synthetic.scenes import SceneObject


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Return a mask as COCO polygons that fill exactly its pixels: one rectangle per run of equal rows."""
    found: list[list[int]] = []
    open_runs: dict[tuple[int, int], int] = {}  # (first column, last column + 1) -> first row
    for row in range(mask.shape[0] + 1):
        edges = np.flatnonzero(np.diff(mask[row].astype(int), prepend=0, append=0)) if row < len(mask) else []
        runs = {(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)}
        for run in [run for run in open_runs if run not in runs]:
            (left, right), top = run, open_runs.pop(run)
            found.append([left, top, right, top, right, row, left, row])
        for run in runs:
            open_runs.setdefault(run, row)
    return found


def compressed(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask as COCO's compressed run lengths."""
    runs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def segmentation(mask: np.ndarray, number: int) -> Any:
    """Return a mask in one of the three forms of COCO, by turns."""
    return (polygons, run_lengths, compressed)[number % 3](mask)


def bounding_box(mask: np.ndarray) -> list[int]:
    """Return x, y, width, height of a mask in pixels."""
    rows, columns = np.nonzero(mask)
    return [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def expression(thing: SceneObject) -> str:
    """Return what tells an object from the others of its image; colors never repeat within one."""
    return f"the {thing.size} {thing.color} {thing.kind} at {thing.position}"


def categories(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return COCO's list of categories, numbered from 1."""
    return [{"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(names, start=1)]


def visual_genome_name(image_id: int) -> str:
    """Return the path of an image below Visual Genome's folder: its two halves by turns."""
    return f"{'VG_100K_2' if image_id % 2 == 0 else 'VG_100K'}/{image_id}.jpg"
