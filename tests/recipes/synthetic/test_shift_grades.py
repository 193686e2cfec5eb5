# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Grades of shift: 0 and 2 are the worlds that were there before, each goes further than the last, the truth stays true."""

import json
from dataclasses import astuple
from hashlib import sha256

import numpy as np
import pytest

from recipes.synthetic.drawing import Background, Shape, draw
from recipes.synthetic.scenes import SHIFTS, World
from recipes.synthetic.vocabulary import BACKGROUNDS, SHIFTED_BACKGROUNDS, UNSEEN, dominant_color


def digest(*worlds):
    """SHA-256 of what some scenes hold, but for pixels, whose last bit depends on the processor."""
    found = sha256()
    for world in worlds:
        for scene in (world.scene(index) for index in range(20)):
            numbers = [(thing.extent, thing.angle, *thing.center, *thing.rgb) for thing in scene.objects]
            said = [scene.caption("full"), scene.light, scene.style, numbers, scene.questions()]
            found.update(repr(json.loads(json.dumps(said), parse_float=lambda text: f"{float(text):.9g}")).encode())
    return found.hexdigest()


@pytest.mark.parametrize(("shifted", "grade"), [(False, 0), (True, 2)])
def test_grades_0_and_2_are_the_worlds_that_were_there_before(shifted, grade):
    known = {
        False: "f7661f99fda48ed9659ce86a33f52174fb6ce98c3d9ead85a5afdc866359ab4e",
        True: "c3d561d28a82df643394928e69b832e36dacdafcf60d141a5f3a08ec4e9070d1",
    }
    before = digest(World(3, 64, shifted))
    assert before == digest(World(3, 64, grade=grade)) == known[shifted]
    for index in range(20):
        assert World(3, 64, shifted).scene(index).image == World(3, 64, grade=grade).scene(index).image


def test_each_grade_goes_further_and_is_a_world_of_its_own():
    for less, more in zip(SHIFTS, SHIFTS[1:], strict=False):
        closer = [1, 1, -1, -1, 1, 1, 1]  # of saturation and value the lowest falls
        steps = [sign * (b - a) for sign, a, b in zip(closer, astuple(less), astuple(more), strict=True)]
        assert min(steps) >= 0 and max(steps) > 0
    assert len({digest(World(grade=grade)) for grade in range(5)}) == 5
    scenes = [World(grade=1).scene(index) for index in range(200)]
    assert 0.35 < np.mean([scene.background in SHIFTED_BACKGROUNDS for scene in scenes]) < 0.65
    assert all(scene.background in BACKGROUNDS | SHIFTED_BACKGROUNDS for scene in scenes)
    unseen = [(thing.kind, thing.color) in UNSEEN for thing in (World(grade=4).scene(i).main for i in range(50))]
    assert all(unseen)


@pytest.mark.parametrize("grade", [3, 4])
def test_what_is_said_stays_true_under_the_gray_square(grade):
    """The square hides part of the main object and nothing of the others; the main object keeps its size and color."""
    right = []
    for index in range(150):
        scene = World(5, grade=grade).scene(index)
        shapes = [Shape(thing.kind, thing.center, thing.extent, thing.angle, thing.rgb) for thing in scene.objects]
        _, bare = draw(64, shapes, Background((0, 0, 0), scene.texture, scene.style, scene.light))
        areas, whole = ([mask.sum() for mask in masks] for masks in (scene.masks, bare))
        assert 0.4 * whole[0] < areas[0] < whole[0] and areas[1:] == whole[1:]
        assert areas[0] == max(areas)
        right.append(dominant_color(scene.image) == scene.main.color)
    assert np.mean(right) > (0.95 if grade == 3 else 0.75)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grade": 5}, "grade=5.*0 .none. to 4"),
        ({"grade": -1}, "grade=-1"),
        ({"grade": 1, "shifted": True}, "one of the"),
    ],
)
def test_what_is_no_grade_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)
