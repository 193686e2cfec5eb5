# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The error of redrawing as a score: does it tell shifted images from familiar ones, and wrong answers from right ones?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from recipes.diagnosis.answers import Said, answer, questions_of
from recipes.diagnosis.auroc import auroc, difference
from recipes.diagnosis.conditions import condition_errors, conditions_of
from recipes.diagnosis.images import Images
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import HELD_OUT

# The higher, the more a sample is taken for shifted, or its answer for wrong.
SCORES = {
    "error": "error of redrawing",
    "bare error": "bare error: the same without the image's tokens and features",
    "share": "error of redrawing, as a share of the bare error",
    "doubt": "doubt: minus the log-probability of the answer",
}
ATTRIBUTES = ("kind", "color")


@dataclass
class Scored:
    """Scenes of one grade with scores.

    Attributes:
        scores: by name, (N,).
        said: answers by attribute.
    """

    scores: dict[str, list[float]]
    said: dict[str, list[Said]]

    def of(self, name: str, attribute: str) -> list[float]:
        """Return the scores of a name; doubt is that of an answer."""
        return [-one.log_probability for one in self.said[attribute]] if name == "doubt" else self.scores[name]


def take_images(processor: ProcessorMixin, scenes: Sequence[Scene], device: torch.device) -> Images:
    """Return scenes as a model takes them."""
    pictures = [scene.image for scene in scenes]
    inputs = processor.image_processor(pictures, return_targets=True, return_tensors="pt").to(device)
    return Images(inputs["pixel_values"], inputs["target_pixel_values"])


def score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    scenes: Sequence[Scene],
    draws_of: Mapping[str, Any],
    batch_size: int,
) -> Scored:
    """Measure and ask about scenes."""
    images = take_images(processor, scenes, model.device)
    wanted = {name: conditions_of(model)[name] for name in ("own", "neither")}
    errors = condition_errors(model, images, draws_of, batch_size, wanted)
    own, bare = (errors[name].image_errors.double().cpu() for name in wanted)
    scores = {"error": own, "bare error": bare, "share": own / bare}
    pictures = [scene.image for scene in scenes]
    said = {
        name: answer(model, processor, pictures, [questions_of(scene)[name] for scene in scenes], batch_size)
        for name in ATTRIBUTES
    }
    return Scored({name: column.tolist() for name, column in scores.items()}, said)


def as_dict(found: Any) -> dict[str, float] | None:
    """Return a named tuple as a dictionary."""
    return None if found is None else found._asdict()


def score_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    world: World,
    grades: Sequence[int],
    number: int,
    draws_of: Mapping[str, Any],
    batch_size: int = 32,
) -> dict[str, Any]:
    """Return AUROCs of the scores on `number` unseen scenes of each grade; those of grade 0 are familiar.

    Returns:
        `shifted`: by grade and score, shifted against familiar scenes. `wrong`: by grade, attribute and score, wrong against
        right answers. `better`: as `wrong`, of "error", how far its area is above that of "doubt". `right`: by grade and
        attribute, the share of right answers. None where there are fewer than two of a kind.
    """
    by_grade = {}
    for grade in sorted({0, *grades}):
        shifted = World(seed=world.seed, size=world.size, grade=grade)
        scenes = [shifted.scene(HELD_OUT + index) for index in range(number)]
        by_grade[grade] = score(model, processor, scenes, draws_of, batch_size)
    found: dict[str, Any] = {"images": number, "shifted": {}, "wrong": {}, "better": {}, "right": {}}
    for grade, scored in by_grade.items():
        if grade:
            truth = [False] * number + [True] * number
            found["shifted"][grade] = {
                name: as_dict(auroc(by_grade[0].of(name, "color") + scored.of(name, "color"), truth))
                for name in SCORES
            }
        wrong = {name: [not one.right for one in scored.said[name]] for name in ATTRIBUTES}
        found["wrong"][grade] = {
            one: {name: as_dict(auroc(scored.of(name, one), wrong[one])) for name in SCORES} for one in ATTRIBUTES
        }
        found["better"][grade] = {
            one: as_dict(difference(scored.of("error", one), scored.of("doubt", one), wrong[one]))
            for one in ATTRIBUTES
        }
        found["right"][grade] = {
            one: as_dict(mean_interval([float(not miss) for miss in wrong[one]])) for one in ATTRIBUTES
        }
    return found
