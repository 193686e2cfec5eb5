# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the language side is tuned on: dialogues about labelled images, asked as the benchmarks ask, and full captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.data.samples import content
from recipes.evaluation.benchmark import IMAGE, Request, Sample
from recipes.evaluation.benchmarks import benchmark_named
from recipes.prompts import CAPTION_BEGIN, DESCRIBE_REQUEST, QUESTION_REQUEST
from recipes.study.questions import BENCHMARKS, answer_of, load_questions
from recipes.synthetic.scenes import Scene

CAPTION_SHARE = 0.25  # of the dialogues
ORDER = ("vqav2", "pope", "robustvqa", "pope", "mmvp")  # questions of a dialogue, begun anywhere


@dataclass
class Pictured:
    """What is asked about one image, by benchmark: pairs of what is asked and the right answer."""

    image: Image.Image
    asked: dict[str, list[tuple[Request, str]]]


def read_asked(folder: Path, scenes: Sequence[Scene]) -> dict[str, Pictured]:
    """Return what the benchmarks ask about labelled scenes, by the SHA-256 of the image's file."""
    by_file: dict[Any, str] = {}
    found: dict[str, Pictured] = {}
    for name in BENCHMARKS:
        for sample in load_questions(folder / name, name, scenes):
            source = sample.images[0]
            if source.where not in by_file:
                image, by_file[source.where] = source.read()
                found.setdefault(by_file[source.where], Pictured(image, {}))
            found[by_file[source.where]].asked.setdefault(name, []).append(as_asked(name, sample))
    return found


def as_asked(name: str, sample: Sample) -> tuple[Request, str]:
    """Return a sample of a benchmark as the benchmark asks it, and its right answer as it is to be written."""
    request = benchmark_named(name).request(sample, "deem")
    return request, f"{request.answer_begin.strip()} {answer_of(name, sample)}"


def dialogue(image: Image.Image, asked: Sequence[tuple[Request, str]]) -> dict[str, Any]:
    """Return a training sample of questions about one image, shown once, in the first."""
    messages = []
    for number, (request, answer) in enumerate(asked):
        pieces = [one for one in request.pieces if not number or one not in (IMAGE, QUESTION_REQUEST)]
        user = [{**part, "image": image} if part["type"] == "image" else part for part in content(*pieces)]
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": content(answer)}]
    return {"messages": messages, "mode": "image_to_text"}


def caption_row(picture: Image.Image, scene: Scene) -> dict[str, Any]:
    """Return a training sample that asks for the full caption of a scene."""
    return dialogue(picture, [(Request((IMAGE, f" {DESCRIBE_REQUEST} ")), f"{CAPTION_BEGIN} {scene.caption('full')}")])


def dialogue_rows(folder: Path, scenes: Sequence[Scene], count: int) -> list[dict[str, Any]]:
    """Return `count` training dialogues about labelled scenes: five questions of four benchmarks, or a full caption.

    Args:
        folder: of the benchmarks' files about these scenes.
    """
    draws, pictures = np.random.default_rng(len(scenes)), read_asked(folder, scenes)
    askers = {name: [key for key, one in pictures.items() if name in one.asked] for name in BENCHMARKS}
    rows = []
    for number in range(count):
        if draws.random() < CAPTION_SHARE:
            scene = scenes[draws.integers(len(scenes))]
            row = caption_row(scene.image, scene)
        else:
            first = int(draws.integers(len(ORDER)))
            key = askers[ORDER[first]][draws.integers(len(askers[ORDER[first]]))]
            own = pictures[key].asked
            names = [name for name in ORDER[first:] + ORDER[:first] if name in own]
            row = dialogue(pictures[key].image, [own[name][draws.integers(len(own[name]))] for name in names])
        rows.append(row | {"id": str(number)})
    return rows
