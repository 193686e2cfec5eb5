# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What is asked and answered in training: dialogues in the words of four benchmarks, and captions, with right answers.

About an image (what the language side is tuned on), or about a caption in its place (what the language model has read
before, see `reading.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recipes.data.samples import content
from recipes.evaluation.benchmark import IMAGE, Request, Sample
from recipes.evaluation.benchmarks import benchmark_named
from recipes.prompts import CAPTION_BEGIN, DESCRIBE_REQUEST, QUESTION_REQUEST
from recipes.study.questions import ASKED, answer_of, main_questions
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import COLORS, KINDS, pick

CAPTION_SHARE = 0.25  # of the dialogues about images
ORDER = ("vqav2", "pope", "robustvqa", "pope", "mmvp")  # questions of a dialogue, begun anywhere
SHORT = ("kind", "color", "count")  # what a caption of detail "medium" tells
OPTIONS = {
    "color": tuple(COLORS),
    "orientation": ("upright", "tilted"),
    "size": ("large", "medium"),
    "position": ("center", "left", "right", "top", "bottom"),
}
Asked = tuple[Request, str]  # what is asked, and the right answer


def as_asked(name: str, sample: Sample) -> Asked:
    """Return a sample of a benchmark as the benchmark asks it, and its right answer as it is to be written."""
    request = benchmark_named(name).request(sample, "deem")
    return request, f"{request.answer_begin.strip()} {answer_of(name, sample)}"


def as_caption(scene: Scene, detail: str = "full") -> Asked:
    """Return the request for a caption of a scene, and the answer."""
    return Request((IMAGE, f" {DESCRIBE_REQUEST} ")), f"{CAPTION_BEGIN} {scene.caption(detail)}"


def question(scene: Scene, name: str, draws: np.random.Generator, detail: str = "full") -> Asked:
    """Return one question of a benchmark about a scene, drawn from those that a caption of this detail answers.

    Args:
        name: vqav2 (open questions), pope (is there a <color> <kind>?), robustvqa (the main object's kind, yes/no or one of
            two) or mmvp (an attribute of the main object, two options).
    """
    if name == "vqav2":
        known = [one for _, one in main_questions(scene) if detail == "full" or one["attribute"] in SHORT]
        one = known[draws.integers(len(known))]
        return as_asked(name, Sample("", asked=one["question"], truth=[one["answer"]]))
    if name == "pope":
        there = [(thing.color, thing.kind) for thing in scene.objects]
        absent = [(color, kind) for color in COLORS for kind in KINDS if (color, kind) not in there]
        near = [pair for pair in absent if any(pair[0] == color or pair[1] == kind for color, kind in there)]
        answer, pairs = (("yes", there), ("yes", there), ("no", near), ("no", absent))[draws.integers(4)]
        color, kind = pairs[draws.integers(len(pairs))]
        return as_asked(name, Sample("", asked=f"Is there a {color} {kind} in the image?", truth=answer))
    if name == "robustvqa":
        right = scene.main.kind
        names = (right, pick(draws, [kind for kind in KINDS if kind != right]))
        form = pick(draws, ("yes", "no", "right first", "wrong first"))
        about = {"kind": form, "names": names if form in ("yes", "right first") else names[::-1]}
        return as_asked(name, Sample("", truth=form if form in ("yes", "no") else right, about=about))
    known = [key for key in OPTIONS if getattr(scene.main, key) and (detail == "full" or key in SHORT)]
    attribute = pick(draws, known)
    right = getattr(scene.main, attribute)
    options = [right, pick(draws, [value for value in OPTIONS[attribute] if value != right])]
    options = options[:: pick(draws, (1, -1))]
    about = {"options": "(a) {} (b) {}".format(*options)}
    return as_asked(name, Sample("", asked=ASKED[attribute], truth="AB"[options.index(right)], about=about))


def questions(scene: Scene, draws: np.random.Generator, detail: str = "full") -> list[Asked]:
    """Return the questions of one dialogue about a scene, five of four benchmarks."""
    first = int(draws.integers(len(ORDER)))
    return [question(scene, name, draws, detail) for name in ORDER[first:] + ORDER[:first]]


def messages_of(shown: dict[str, Any], asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return the chat of questions about one thing, shown once, in the first.

    Args:
        shown: the part of a message that shows it: an image, or a caption in its place.
    """
    messages = []
    for number, (request, answer) in enumerate(asked):
        pieces = [one for one in request.pieces if not number or one not in (IMAGE, QUESTION_REQUEST)]
        user = [shown if part["type"] == "image" else part for part in content(*pieces)]
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": content(answer)}]
    return messages


def image_row(scene: Scene, asked: Sequence[Asked]) -> dict[str, Any]:
    """Return a training sample of questions about the image of a scene."""
    return {"messages": messages_of({"type": "image", "image": scene.image}, asked), "mode": "image_to_text"}


def dialogue_rows(scenes: Sequence[Scene], count: int) -> list[dict[str, Any]]:
    """Return `count` training dialogues about the images of scenes: five questions, or a full caption."""
    draws, rows = np.random.default_rng(len(scenes)), []
    for number in range(count):
        scene = scenes[draws.integers(len(scenes))]
        captioned = draws.random() < CAPTION_SHARE
        asked = [as_caption(scene)] if captioned else questions(scene, draws)
        rows.append(image_row(scene, asked) | {"id": str(number)})
    return rows
