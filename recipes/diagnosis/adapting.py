# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What learning from redrawing the very image that is asked about does to the answers on shifted images."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from recipes.diagnosis.answers import ASKED, answer, questions_of
from recipes.diagnosis.images import Images
from recipes.diagnosis.scores import take_images
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.generation.tasks import make_generators
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import HELD_OUT

ATTRIBUTES = tuple(name for name in ASKED if name != "background")  # shifted scenes have some that were never named


def ask_all(model: PreTrainedModel, processor: ProcessorMixin, scene: Scene) -> dict[str, float]:
    """Ask about all attributes of a scene; 1 for each right answer, else 0."""
    asked = questions_of(scene, ATTRIBUTES)
    said = answer(model, processor, [scene.image] * len(asked), list(asked.values()))
    return {name: float(one.right) for name, one in zip(asked, said, strict=True)}


def adapt_report(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    world: World,
    grade: int,
    number: int,
    steps: int,
    learning_rates: Sequence[float],
    draws_of: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Return how answers about `number` shifted scenes change when the vision tower learns from each of them first.

    The control learns from the scene before instead, and is asked about its own.

    Returns:
        `before`: by attribute, the share of right answers. `rates`: for each rate, under "own" and "control", `error`, how
        far the error of redrawing the scene that is asked about changes, as a share, and the `change` of the share of
        right answers, of each attribute and of "all"; all with 95 % intervals over scenes.
    """
    shifted = World(seed=world.seed, size=world.size, grade=grade)
    scenes = [shifted.scene(HELD_OUT + index) for index in range(number)]
    images = take_images(processor, scenes, model.device)
    before = [ask_all(model, processor, scene) for scene in scenes]
    errors = model.image_error(*images.given(), **draws_of).image_errors.tolist()
    found: dict[str, Any] = {"images": number, "steps": steps, "grade": grade, "rates": {}}
    found["before"] = {name: interval([row[name] for row in before]) for name in ATTRIBUTES}
    found["before"]["all"] = interval([sum(row.values()) / len(row) for row in before])
    for rate in learning_rates:
        of_rate = {}
        for name, shift in (("own", 0), ("control", -1)):
            after, changes = [], []
            for place, scene in enumerate(scenes):
                learned = (place + shift) % number
                given = images.rows(slice(learned, learned + 1))
                (generator,) = make_generators(model, seed, 1)
                pair = given.pixel_values, given.target_pixel_values
                with model.adapted_to(*pair, steps, rate, generator=generator) as adapted:
                    after.append(ask_all(adapted, processor, scene))
                    error = error_of(adapted, images.rows(slice(place, place + 1)), draws_of)
                changes.append(error / errors[place] - 1)
            of_rate[name] = {"error": interval(changes), "change": changes_of(before, after)}
        found["rates"][f"{rate:g}"] = of_rate
    return found


def error_of(model: PreTrainedModel, image: Images, draws_of: Mapping[str, Any]) -> float:
    """Return the error of redrawing one image."""
    return float(model.image_error(*image.given(), **draws_of).image_errors)


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of values with its 95 % interval."""
    return mean_interval(values, bounds=(-float("inf"), float("inf")))._asdict()


def changes_of(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return how the share of right answers changed, by attribute and over all."""
    pairs = list(zip(before, after, strict=True))
    found = {name: interval([new[name] - old[name] for old, new in pairs]) for name in ATTRIBUTES}
    found["all"] = interval([(sum(new.values()) - sum(old.values())) / len(old) for old, new in pairs])
    return found
