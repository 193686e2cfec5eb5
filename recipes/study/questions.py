# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Questions about the images of a seed, in the files of the evaluation's benchmarks, and what each line counts for.

vqav2/        open questions about the main object, the number of objects and the background
pope/         is there a <color> <kind>? random, popular, adversarial
robustvqa/    is <kind> the main object? <kind> or <kind>? of images whose kind the judge gets wrong
mmvp/         pairs of images that differ in one attribute of the main object and in nothing else
"""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import Line, Sample
from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.building import LabelledImage, write_benchmark, wrong_items
from recipes.evaluation.judge import KindJudge
from recipes.evaluation.sources import DataSource
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import BACKGROUNDS, COLORS, EXTENTS, PERIODS, pick
from recipes.synthetic.writers import write_pope, write_vqa
from recipes.synthetic.writers.files import jpeg

BENCHMARKS = ("vqav2", "pope", "robustvqa", "mmvp")
PAIRED = ("color", "orientation", "size", "position")
ASKED = {
    "color": "What color is the main object?",
    "orientation": "Is the main object upright or tilted?",
    "size": "What size is the main object?",
    "position": "Where is the main object?",
}
FIRST_PAIR = 1001  # MMVP's file has known errors at lower numbers, which its benchmark corrects
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def write_questions(folder: Path, scenes: Sequence[Scene], judge: KindJudge) -> None:
    """Write the four benchmarks about scenes that follow each other."""
    world, start = scenes[0].world, scenes[0].index
    write_vqa(folder / "vqav2", world, len(scenes), start, split="val2014")
    write_pope(folder / "pope", world, len(scenes), start)
    write_kinds(folder / "robustvqa", scenes, judge)
    write_pairs(folder / "mmvp", scenes)


def write_kinds(folder: Path, scenes: Sequence[Scene], judge: KindJudge) -> None:
    """Write RobustVQA's file of the images whose kind the judge gets wrong; the wrong kind is what the judge says."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [
        LabelledImage(
            f"world/{scene.main.kind}/{scene.index}.jpg", scene.main.kind, lambda scene=scene: jpeg(scene.image)
        )
        for scene in scenes
    ]
    items, counts = wrong_items(images, judge.name, 100, folder)
    write_benchmark(folder / "robustvqa_test.json", {"judged": dict(counts)}, {"world": items})


def variant(scene: Scene, attribute: str) -> Scene | None:
    """Return the scene with its main object changed in one attribute, None where that attribute cannot change."""
    rng, main = scene.world.rng(scene.index, f"variant {attribute}"), scene.main
    if attribute == "color":
        color = pick(rng, [name for name in COLORS if name not in {thing.color for thing in scene.objects}])
        changes: dict[str, Any] = {"color": color, "rgb": tuple(map(float, COLORS[color]))}
    elif attribute == "orientation" and main.orientation is not None:
        other = "upright" if main.orientation == "tilted" else "tilted"
        changes = {"orientation": other, "angle": (main.angle + PERIODS[main.kind] / 2) % (2 * math.pi)}
    elif attribute == "size":
        other = "large" if main.size == "medium" else "medium"
        changes = {"size": other, "extent": float(rng.uniform(*EXTENTS[other]))}
    elif attribute == "position" and main.position in OPPOSITE:
        changes = {"position": OPPOSITE[main.position], "center": tuple(1 - value for value in main.center)}
    else:
        return None
    other_scene = replace(scene)
    changed = [replace(thing, scene=other_scene, **(changes if thing is main else {})) for thing in scene.objects]
    vars(other_scene)["objects"] = changed  # what would else be drawn from the index
    return other_scene


def write_pairs(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write MMVP's files, one pair of each scene; attributes take turns, and so does the option that is right first."""
    (folder / "MMVP Images").mkdir(parents=True, exist_ok=True)
    rows: list[tuple[int, str, str, str]] = []
    for number, scene in enumerate(scenes):
        order = PAIRED[number % len(PAIRED) :] + PAIRED[: number % len(PAIRED)]
        attribute, other = next((name, made) for name in order if (made := variant(scene, name)) is not None)
        values = [getattr(one.main, attribute) for one in (scene, other)]
        swapped = number // len(PAIRED) % 2
        options = "(a) {} (b) {}".format(*(values[::-1] if swapped else values))
        for place, one in enumerate((scene, other)):
            index = FIRST_PAIR + len(rows)
            (folder / "MMVP Images" / f"{index}.jpg").write_bytes(jpeg(one.image))
            rows.append((index, ASKED[attribute], options, "(a)" if place == swapped else "(b)"))
    table = io.StringIO()
    csv.writer(table).writerows([("Index", "Question", "Options", "Correct Answer"), *rows])
    (folder / "Questions.csv").write_text(table.getvalue(), encoding="utf-8", newline="")


def load_questions(folder: Path, name: str, scenes: Sequence[Scene]) -> list[Sample]:
    """Return a benchmark's samples, `group` saying what each is about; of open questions those about the main things."""
    samples = benchmark_named(name).load(DataSource(name, str(folder))).samples
    if name == "vqav2":
        wanted = dict(open_questions(scenes))
        return [replace(one, group=wanted[one.id]) for one in samples if one.id in wanted]
    return samples


def main_questions(scene: Scene) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield those of a scene's questions, with their numbers, that ask openly of the main object, the count and the background."""
    tilted = f"Is the {scene.main.color} {scene.main.kind} upright or tilted?"
    for number, asked in enumerate(scene.questions()):
        if number < 6 or asked["question"] == tilted:
            yield number, asked


def open_questions(scenes: Sequence[Scene]) -> Iterator[tuple[str, str]]:
    """Yield id (as `write_vqa` numbers them) and attribute of what is asked openly of each image.

    Backgrounds that are never trained on have no right answer, and are left out.
    """
    for image, scene in enumerate(scenes, start=1):
        for number, asked in main_questions(scene):
            if asked["attribute"] != "background" or asked["answer"] in BACKGROUNDS:
                yield str(image * 1000 + number), asked["attribute"]


def answer_of(name: str, sample: Sample) -> str:
    """Return the right answer of a sample, as it is to be written."""
    if name == "vqav2":
        return max(sample.truth, key=sample.truth.count)
    return f"({sample.truth.lower()})" if name == "mmvp" else sample.truth


def measure_of(name: str, line: Line) -> str:
    """Return the measure that an answer to `name`, any but MMVP, counts for."""
    if name == "vqav2":
        return f"open {line['group']}"
    if name == "pope":
        return f"pope {line['group']}"
    return "robustvqa yes/no" if line["about"]["kind"] in ("yes", "no") else "robustvqa choice"


def scores_of(name: str, lines: Sequence[Line]) -> dict[str, tuple[list[float], list[str]]]:
    """Return, by measure, what each unit is worth and what it stands on (image, item, pair); an MMVP pair is one unit."""
    found: dict[str, tuple[list[float], list[str]]] = {}
    if name == "mmvp":
        pairs: dict[str, list[float]] = {}
        for line in lines:
            pairs.setdefault(line["cluster"], []).append(line["score"])
        return {"mmvp pairs": ([min(both) for both in pairs.values()], list(pairs))}
    for line in lines:
        scores, units = found.setdefault(measure_of(name, line), ([], []))
        scores.append(line["score"])
        units.append(line["cluster"])
    return found
