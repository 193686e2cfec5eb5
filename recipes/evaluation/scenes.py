# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which unseen scenes of the synthetic world are measured, and what is asked about them."""

from itertools import count, islice

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT


def color_question(scene: Scene) -> dict[str, str]:
    """Return one question about a color in `scene`; the scene's number alone decides which."""
    asked = [question for question in scene.questions() if question["attribute"] == "color"]
    return asked[scene.index % len(asked)]


def one_color_scenes(world: World, number: int) -> list[Scene]:
    """Return unseen scenes with a single object, so that captions name one color; each color equally often (+-1)."""
    per_color: dict[str, list[Scene]] = {color: [] for color in COLORS}
    most = -(-number // len(COLORS))
    for scene in map(world.scene, count(HELD_OUT)):
        if len(scene.objects) == 1 and len(per_color[scene.main.color]) < most:
            per_color[scene.main.color].append(scene)
        if all(len(scenes) == most for scenes in per_color.values()):
            break
    return [scene for row in zip(*per_color.values(), strict=True) for scene in row][:number]


def several_object_scenes(world: World, number: int) -> list[Scene]:
    """Return the first unseen scenes with two objects or more."""
    scenes = (world.scene(index) for index in count(HELD_OUT))
    return list(islice((scene for scene in scenes if len(scene.objects) > 1), number))
