# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Figures from what a model gave and what is right, and their text.

A figure is a dict of `what` it says, its `value`, its `aim` (or None) and its `count`, with `chance` or what it is
compared with, and `each`, the shares per right answer, where these differ much; `metrics.json` holds figures by name.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from PIL import Image

from recipes.evaluation.scenes import color_question
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import dominant_color, first_color, first_kind

LEAST_DRAWN = 0.70  # of the drawings of each color, and so of all


def share_right(what: str, aim: float | None, given: Sequence[str | None], truths: Sequence[str]) -> dict[str, Any]:
    """Return the share of `given` that equals `truths`, beside its aim and what chance gives.

    Chance is always giving the most frequent of the right answers.
    """
    right = sum(one == truth for one, truth in zip(given, truths, strict=True))
    chance = max(Counter(truths).values()) / len(truths)
    return {"what": what, "value": right / len(truths), "aim": aim, "chance": chance, "count": len(truths)}


def caption_figure(scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, Any]:
    """Return the share of captions whose first kind of object is that of the image's main object."""
    named = [first_kind(caption) for caption in captions]
    return share_right("captions that name the main object's kind", 0.80, named, [scene.main.kind for scene in scenes])


def color_figure(scenes: Sequence[Scene], answers: Sequence[str]) -> dict[str, Any]:
    """Return the share of answers to `color_question` whose first word is the right color."""
    words = [re.findall(r"\w+", answer.lower()) for answer in answers]
    truths = [color_question(scene)["answer"] for scene in scenes]
    return share_right("color questions answered exactly", 0.60, [word[0] if word else None for word in words], truths)


def drawing_figure(captions: Sequence[str], drawn: Sequence[Image.Image]) -> dict[str, Any]:
    """Return the share of images whose dominant color is the first that their caption names, also per color."""
    seen = [dominant_color(image) for image in drawn]
    truths = [first_color(caption) for caption in captions]
    figure = share_right("drawings in the color of their caption", LEAST_DRAWN, seen, truths)
    return figure | {"each": shares_each(seen, truths)}


def drawn_kind_figure(captions: Sequence[str], recognized: Sequence[str], on_real: float) -> dict[str, Any]:
    """Return the share of images in which a judge recognizes the first kind that their caption names, also per kind.

    Args:
        recognized: the kind that the judge names, for each image.
        on_real: the judge's share on images of the world: the most that drawings can be expected to reach.
    """
    truths = [first_kind(caption) for caption in captions]
    figure = share_right("drawings in which the kind is recognized", None, recognized, truths)
    return figure | {"each": shares_each(recognized, truths), "on_real": on_real}


def shares_each(given: Sequence[str | None], truths: Sequence[str]) -> dict[str, float]:
    """Return the share of `given` that equals `truths`, for each right answer, in the order in which they come first."""
    pairs = list(zip(given, truths, strict=True))
    return {
        truth: sum(one == truth == right for one, right in pairs) / count for truth, count in Counter(truths).items()
    }


def consistency_figure(loss: float, reference: float, number: int) -> dict[str, Any]:
    """Return how far a consistency loss lies below that of the reference, as a share of the latter."""
    figure = {"what": "consistency loss below that before pretraining", "value": 1 - loss / reference, "aim": 0.25}
    return figure | {"loss": loss, "reference": reference, "count": number}


def format_figures(metrics: dict[str, dict[str, Any]]) -> str:
    """Return the figures as aligned text, one line each."""
    lines = []
    for figure in metrics.values():
        beside = (
            f"chance {figure['chance']:.1%}" if "chance" in figure else "{loss:.4f} / {reference:.4f}".format(**figure)
        )
        aim = "       " if figure["aim"] is None else f"aim {figure['aim']:.0%}"
        beside += f"   real images {figure['on_real']:.1%}" if "on_real" in figure else ""
        lines.append(f"{figure['what']:48s} {figure['value']:7.1%}   {aim}   {beside}")
        if "each" in figure:
            lines.append(f"    {format_each(figure)}")
    return "\n".join(lines)


def format_each(figure: dict[str, Any]) -> str:
    """Return the shares of a figure per right answer, in words."""
    return ", ".join(f"{name} {share:.0%}" for name, share in figure["each"].items())
