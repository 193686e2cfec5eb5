# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What is in an image of the synthetic world, and what is said about it.

An image (`Scene`) shows one large *main* object and up to three small ones on a low-saturation background. Everything said
about it (captions, documents, questions, region masks) is derived from the numbers that draw it. A scene is a function of
`(seed, grade of shift, index)` alone; `size` only changes the number of pixels it is drawn with.

Splits: scenes `0 ... HELD_OUT - 1` are for training, scenes from `HELD_OUT` on are for evaluation.
Shift: `World(grade=0)` to `World(grade=4)` go further and further from what is trained on (`SHIFTS`): strayed colors, pixel
noise, other textures and tinted backgrounds, main objects that are combinations of kind and color (`UNSEEN`) which the
unshifted world never shows, and a gray square over part of the main object. `World(shifted=True)` is grade 2.
"""

import colorsys
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from recipes.synthetic.drawing import Background, Shape, draw, run_lengths
from recipes.synthetic.vocabulary import (
    BACKGROUNDS,
    COLORS,
    DETAILS,
    EXTENTS,
    KINDS,
    MAX_IMAGES,
    MAX_OBJECTS,
    NUMBERS,
    PERIODS,
    POSITIONS,
    SHIFTED_BACKGROUNDS,
    SHIFTED_TEXTURES,
    TEXTURES,
    UNSEEN,
    article,
    enumerate_phrases,
    pick,
)


@dataclass(frozen=True)
class Shift:
    """How far the scenes of a world are from those that models are trained on.

    Attributes:
        unseen: share of main objects that are combinations of `UNSEEN`; above 0 the others may be such too.
        turn: most degrees that the hue of an object strays by, either way; names of colors hold up to 20.
        saturation, value: lowest factors of an object's saturation and value; the highest is 1.
        grain: standard deviation of the pixel noise, of 255.
        strange: share of scenes with a background and a texture that the unshifted world never shows.
        occluded: side of the gray square over the main object, as a share of the object's extent.
    """

    unseen: float
    turn: float
    saturation: float
    value: float
    grain: float
    strange: float
    occluded: float


SHIFTS = (
    Shift(unseen=0, turn=4, saturation=0.95, value=0.92, grain=0, strange=0, occluded=0),
    Shift(unseen=0.25, turn=6, saturation=0.85, value=0.86, grain=4, strange=0.5, occluded=0),
    Shift(unseen=0.5, turn=9, saturation=0.75, value=0.8, grain=9, strange=1, occluded=0),
    Shift(unseen=0.75, turn=11, saturation=0.65, value=0.7, grain=14, strange=1, occluded=0.35),
    Shift(unseen=1, turn=13, saturation=0.55, value=0.6, grain=20, strange=1, occluded=0.5),
)
STREAMS = (0, 2, 1, 3, 4)  # of random numbers, by grade: those of 0 and 2 are older than the others


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths are shares of the image's side, angles radians; (0, 0) is the top left corner.

    `size` is large, medium or small; `orientation` upright or tilted (turned by about half of the angle after which the
    shape looks the same again), None for circles; `position` one of `POSITIONS`.
    """

    kind: str
    color: str
    size: str
    orientation: str | None
    position: str
    extent: float
    angle: float
    center: tuple[float, float]
    rgb: tuple[float, float, float]
    number: int
    scene: "Scene" = field(repr=False, compare=False)

    @property
    def mask(self) -> np.ndarray:
        """Where the object is visible, (size, size) bool."""
        return self.scene.masks[self.number]


@dataclass(frozen=True)
class Scene:
    """One image of a `World` with its truth. Drawn when `image` or `masks` is first asked for."""

    world: "World"
    index: int
    background: str
    texture: str
    light: float  # direction the light comes from, radians
    style: dict[str, float] = field(repr=False)
    num_objects: int

    @cached_property
    def objects(self) -> list[SceneObject]:
        """The objects, the main (clearly largest) one first."""
        return _place_objects(self)

    @cached_property
    def _drawn(self) -> tuple[Image.Image, list[np.ndarray]]:
        rgb, shift = (BACKGROUNDS | SHIFTED_BACKGROUNDS)[self.background], self.world.shift
        grain = None
        if shift.grain:
            grain = self.world.rng(self.index, "grain").normal(0, shift.grain, (3, 64, 64)).astype(np.float32)
        shapes = [Shape(thing.kind, thing.center, thing.extent, thing.angle, thing.rgb) for thing in self.objects]
        background = Background(rgb, self.texture, self.style, self.light, grain)
        return draw(self.world.size, shapes, background, self._occluder())

    def _occluder(self) -> tuple[float, float, float] | None:
        """Return center (x, y) and side of the square that hides part of the main object, off its middle; None for none."""
        if not (share := self.world.shift.occluded):
            return None
        turn, (x, y) = self.world.rng(self.index, "occluder").uniform(0, 2 * math.pi), self.main.center
        away = 0.25 * self.main.extent
        return x + away * math.cos(turn), y + away * math.sin(turn), share * self.main.extent

    @property
    def image(self) -> Image.Image:
        """The scene drawn, RGB, `size` by `size` pixels."""
        return self._drawn[0]

    @property
    def masks(self) -> list[np.ndarray]:
        """Per object a (size, size) bool array: where it is visible."""
        return self._drawn[1]

    @property
    def main(self) -> SceneObject:
        """The largest object."""
        return self.objects[0]

    def caption(self, detail: str = "medium") -> str:
        """Return what the image shows, the main object first.

        "coarse": kinds and counts; "medium": color and kind of each; "full": also sizes, orientation, positions and
        background.

        Raises:
            ValueError: for another level of detail.
        """
        if detail == "coarse":
            counts = Counter(thing.kind for thing in self.objects)  # a Counter keeps the order of first sight
            return enumerate_phrases([article(k) if n == 1 else f"{NUMBERS[n]} {k}s" for k, n in counts.items()])
        if detail == "medium":
            return enumerate_phrases([article(f"{thing.color} {thing.kind}") for thing in self.objects])
        if detail == "full":
            phrases = []
            for thing in self.objects:
                tilt = "tilted " if thing.orientation == "tilted" else ""
                phrases.append(f"a {thing.size} {tilt}{thing.color} {thing.kind} at {thing.position}")
            return f"{enumerate_phrases(phrases)}, on {self.texture} {self.background}"
        raise ValueError(f"detail={detail!r} is not a level of detail. Use one of {', '.join(DETAILS)}.")

    def questions(self) -> list[dict[str, str]]:
        """Return questions about the whole image, dicts of question, answer and attribute; the order never changes.

        Attributes: kind, color, count, size, orientation, position, presence, background. Only what has one right
        answer is asked: an object is named by its kind only where no other object has that kind.
        """
        rng = self.world.rng(self.index, "questions")
        kinds = Counter(thing.kind for thing in self.objects)
        colors = {thing.color for thing in self.objects}
        pairs = {(thing.color, thing.kind) for thing in self.objects}
        asked: list[tuple[str, str, str]] = [
            ("What is the main object?", self.main.kind, "kind"),
            ("What color is the main object?", self.main.color, "color"),
            ("What size is the main object?", self.main.size, "size"),
            ("Where is the main object?", self.main.position, "position"),
            ("How many objects are there?", str(len(self.objects)), "count"),
            ("What color is the background?", self.background, "background"),
        ]
        for thing in self.objects:
            name = f"{thing.color} {thing.kind}"  # colors never repeat within an image
            asked.append((f"What is the {thing.color} object?", thing.kind, "kind"))
            asked.append((f"What size is the {name}?", thing.size, "size"))
            asked.append((f"Where is the {name}?", thing.position, "position"))
            if thing.orientation is not None:
                asked.append((f"Is the {name} upright or tilted?", thing.orientation, "orientation"))
            if kinds[thing.kind] == 1:
                asked.append((f"What color is the {thing.kind}?", thing.color, "color"))
        for kind in KINDS:
            asked.append((f"How many {kind}s are there?", str(kinds[kind]), "count"))
            asked.append((f"Is there a {kind} in the image?", "yes" if kinds[kind] else "no", "presence"))
        present = self.objects[rng.integers(len(self.objects))]
        absent = [color for color in COLORS if color not in colors]
        asked.append((f"Is there a {present.color} object in the image?", "yes", "presence"))
        asked.append((f"Is there a {absent[rng.integers(len(absent))]} object in the image?", "no", "presence"))
        asked.append((f"Is there a {present.color} {present.kind} in the image?", "yes", "presence"))
        absent = [(c, k) for c in COLORS for k in KINDS if (c, k) not in pairs and (c in colors or k in kinds)]
        color, kind = absent[rng.integers(len(absent))]
        asked.append((f"Is there a {color} {kind} in the image?", "no", "presence"))
        return [{"question": question, "answer": answer, "attribute": name} for question, answer, name in asked]

    def region_questions(self) -> list[dict[str, Any]]:
        """Return questions about a marked object, as `questions` with the object's number under `object`.

        Its mask is `masks[object]`. The text does not say which object is meant: only the mask does.
        """
        asked = []
        for thing in self.objects:
            asked.append(("What is in this region?", thing.kind, "kind", thing.number))
            asked.append(("What color is this region?", thing.color, "color", thing.number))
            asked.append(("What size is the object in this region?", thing.size, "size", thing.number))
        keys = ("question", "answer", "attribute", "object")
        return [dict(zip(keys, row, strict=True)) for row in asked]

    def truth(self, **extra: Any) -> dict[str, Any]:
        """Return all that is known about the image, as plain JSON data with `extra`; masks as uncompressed COCO run lengths."""
        objects = []
        for thing, mask in zip(self.objects, self.masks, strict=True):
            row = {key: value for key, value in vars(thing).items() if key != "scene"}
            objects.append(row | {"area": int(mask.sum()), "segmentation": run_lengths(mask)})
        shifted = self.world.shift != SHIFTS[0]
        world = {"seed": self.world.seed, "index": self.index, "shifted": shifted, "size": self.world.size}
        captions = {detail: self.caption(detail) for detail in DETAILS}
        about = {"background": self.background, "texture": self.texture, "light": self.light, "captions": captions}
        asked = {"questions": self.questions(), "region_questions": self.region_questions()}
        return extra | world | about | {"objects": objects} | asked


@dataclass(frozen=True)
class Document:
    """Interleaved text and images: image `i` belongs to sentence `matched_text_index[i]`."""

    text_list: list[str]
    scenes: list[Scene]
    matched_text_index: list[int]


@dataclass(frozen=True)
class World:
    """The generator.

    Args:
        seed: any non-negative integer; another seed is another world of the same kind.
        size: side of the images in pixels, at least 16.
        shifted: the out-of-distribution variant, grade 2 (see the top of the module).
        max_objects: 1 to 4. A scene of a world with fewer objects is the same scene without its last objects, so
            `max_objects=1` gives images of one color.
        grade: of the shift, 0 (none) to 4, see `SHIFTS`; instead of `shifted`.

    Raises:
        ValueError: for a value out of range, or `shifted` with a grade.
    """

    seed: int = 0
    size: int = 64
    shifted: bool = False
    max_objects: int = MAX_OBJECTS
    grade: int | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative. Give an integer from 0 on.")
        if self.size < 16:
            raise ValueError(f"size={self.size} is too small to show an object. Give a side of at least 16 pixels.")
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects={self.max_objects} is out of range. Give 1 to {MAX_OBJECTS}.")
        if self.grade is not None and self.grade not in range(len(SHIFTS)):
            raise ValueError(f"grade={self.grade} is no grade of shift. Give 0 (none) to {len(SHIFTS) - 1}.")
        if self.grade is not None and self.shifted:
            raise ValueError(
                f"shifted=True is grade 2, and grade={self.grade} was given too. Leave out one of the two."
            )

    @property
    def shift(self) -> Shift:
        """What the grade means."""
        return SHIFTS[self._grade]

    @property
    def _grade(self) -> int:
        return self.grade if self.grade is not None else 2 * self.shifted

    def rng(self, index: int, purpose: str) -> np.random.Generator:
        """Return the random numbers of a scene for one purpose; how one purpose uses them does not change the others."""
        return np.random.default_rng([self.seed, STREAMS[self._grade], index, *purpose.encode()])

    def scene(self, index: int) -> Scene:
        """Return scene number `index` (any integer from 0 on)."""
        if index < 0:
            raise ValueError(f"index={index} is negative. Give a scene number from 0 on.")
        rng = self.rng(index, "scene")
        strange = self.rng(index, "strange").random() < self.shift.strange
        backgrounds = tuple(SHIFTED_BACKGROUNDS if strange else BACKGROUNDS)
        textures = SHIFTED_TEXTURES if strange else TEXTURES
        return Scene(
            world=self,
            index=index,
            background=backgrounds[rng.integers(len(backgrounds))],
            texture=textures[rng.integers(len(textures))],
            light=float(rng.uniform(0, 2 * math.pi)),
            style={key: float(rng.random()) for key in ("angle", "frequency", "phase", "contrast", "gloss")},
            num_objects=min(int(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))) + 1, self.max_objects),
        )

    def document(self, index: int, max_images: int = MAX_IMAGES) -> Document:
        """Return a document that shows scene `index` and up to `max_images - 1` scenes that follow it."""
        rng = self.rng(index, "document")
        scenes = [self.scene(index + i) for i in range(int(rng.integers(1, max_images + 1)))]
        sentences = [pick(rng, ("Here are some shapes.", "Look at these pictures.", "This is a picture book."))]
        matches = []
        starts = ("This is", "We can see", "The picture shows", "Here is", "Look at")
        for number, scene in enumerate(scenes):
            start = pick(rng, starts) if number == 0 else pick(rng, (*starts, "Next is", "Then comes"))
            matches.append(len(sentences))
            sentences.append(f"{start} {scene.caption(pick(rng, DETAILS))}.")
            if rng.random() < 0.4:
                asked = pick(rng, scene.questions())
                sentences.append(f"{asked['question']} {asked['answer'].capitalize()}.")
        return Document(sentences, scenes, matches)


def _place_objects(scene: Scene) -> list[SceneObject]:
    """Choose kind, color, size, place and angle of each object, the main one first."""
    shift, rng = scene.world.shift, scene.world.rng(scene.index, "objects")
    # drawn one object after the other, so that leaving out the last ones does not change the first
    colors, objects = list(COLORS), []
    for number in range(scene.num_objects):
        if number == 0 and shift.unseen and rng.random() < shift.unseen:
            kind, color = pick(rng, sorted(UNSEEN))
        else:
            color = pick(rng, colors)
            kind = pick(rng, [k for k in KINDS if shift.unseen or (k, color) not in UNSEEN])
        colors.remove(color)
        size = "small" if number else pick(rng, ("large", "medium"))
        extent = rng.uniform(*EXTENTS[size])
        orientation, angle = None, 0.0
        if kind != "circle":
            orientation = pick(rng, ("upright", "tilted"))
            angle = PERIODS[kind] * ((0.5 if orientation == "tilted" else 0.0) + rng.uniform(-0.12, 0.12))
        if number == 0:  # main objects keep off the corners: they would stick out
            position = pick(rng, ("center", "left", "right", "top", "bottom"))
            center = _cell_center(position, reach=0.17, jitter=rng.uniform(-0.03, 0.03, 2))
        else:
            position, center = _free_cell(rng, objects, extent)
        turn = rng.uniform(-shift.turn, shift.turn)
        rgb = _stray(COLORS[color], turn, rng.uniform(shift.saturation, 1.0), rng.uniform(shift.value, 1.0))
        center = (float(center[0]), float(center[1]))
        shape = (kind, color, size, orientation, position, float(extent), float(angle))
        objects.append(SceneObject(*shape, center, rgb, number, scene))
    return objects


def _free_cell(rng: np.random.Generator, objects: list[SceneObject], extent: float) -> tuple[str, tuple[float, float]]:
    """Return a place for a small object that overlaps the others little.

    Of a random order of places, the first that keeps 95 % of the distance at which bounding circles touch; else the place
    with the most room.
    """
    best, most = ("center", (0.5, 0.5)), -math.inf
    for position in rng.permutation(POSITIONS):
        center = _cell_center(str(position), reach=0.33, jitter=rng.uniform(-0.04, 0.04, 2))
        room = min(math.dist(center, thing.center) / (0.5 * (extent + thing.extent)) for thing in objects)
        if room >= 0.95:
            return str(position), center
        if room > most:
            best, most = (str(position), center), room
    return best


def _cell_center(position: str, reach: float, jitter: np.ndarray) -> tuple[float, float]:
    """Return the point of a named position, `reach` from the image's center, moved by `jitter`."""
    x = ("right" in position) - ("left" in position)
    y = ("bottom" in position) - ("top" in position)
    return (0.5 + reach * x + jitter[0], 0.5 + reach * y + jitter[1])


def _stray(rgb: tuple[int, int, int], turn: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Turn the hue by `turn` degrees and scale saturation and value."""
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    r, g, b = colorsys.hsv_to_rgb((h + turn / 360) % 1, s * saturation, v * value)
    return (255 * r, 255 * g, 255 * b)
