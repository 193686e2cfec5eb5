# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Boxes that a model names for a phrase: reading them from its answer, overlap, and accuracy.

Definitions: data_and_evaluation.md section 3.11. How a box is written is `box_text` in `recipes.data.readers.grounding`.
"""

import re
from collections.abc import Sequence

import numpy as np

from recipes.data.readers.grounding import SCALE, Box

RULES = ("deem", "relative")
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\({_NUMBER},{_NUMBER}\)")
_LIST = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def parse_box(text: str, rule: str = "deem") -> Box | None:
    """Return the first box in an answer as its numbers stand there, x1, y1, x2, y2; None if there is none.

    Args:
        rule: `"deem"` reads `(x1,y1)(x2,y2)` in 999ths of the image; `"relative"` `[x1,y1,x2,y2]` in 0..1, as lmms-eval.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown rule {rule!r} for boxes: choose one of {', '.join(RULES)}.")
    match = (_CORNERS if rule == "deem" else _LIST).search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(number) for number in match.groups())
    return x1, y1, x2, y2


def pixel_box(box: Box, width: int, height: int, rule: str = "deem") -> Box:
    """Return a box of `parse_box` in pixels of an image."""
    scale = SCALE if rule == "deem" else 1
    x1, y1, x2, y2 = box
    return x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height


def box_iou(first: Box, second: Box) -> float:
    """Return the area that two boxes share over the area that they cover; 0 if one of them ends before it begins."""
    areas = [max(x2 - x1, 0.0) * max(y2 - y1, 0.0) for x1, y1, x2, y2 in (first, second)]
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if min(*areas, width, height) <= 0:
        return 0.0
    shared = width * height
    return shared / (sum(areas) - shared)


def center_inside(box: Box, truth: Box) -> bool:
    """Return whether the center of a box lies in the true one, its edge included."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]


def grounding_figures(boxes: Sequence[Box | None], truths: Sequence[Box]) -> dict[str, float]:
    """Return `accuracy` (overlap of 0.5 or more), `iou`, `center_accuracy`, `unparsed`, all means in 0..1, and `count`.

    Args:
        boxes: as named by the model, None for an answer without one, which is wrong.
        truths: in the same unit.

    Raises:
        ValueError: for no boxes or unequal lengths.
    """
    if not len(boxes):
        raise ValueError("There are no boxes to score.")
    overlaps = [0.0 if box is None else box_iou(box, truth) for box, truth in zip(boxes, truths, strict=True)]
    centers = [box is not None and center_inside(box, truth) for box, truth in zip(boxes, truths, strict=True)]
    return {
        "accuracy": float(np.mean([overlap >= 0.5 for overlap in overlaps])),
        "iou": float(np.mean(overlaps)),
        "center_accuracy": float(np.mean(centers)),
        "unparsed": sum(box is None for box in boxes) / len(boxes),
        "count": len(boxes),
    }
