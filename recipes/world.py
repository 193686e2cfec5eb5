# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The synthetic world: seeded, procedural pictures whose truth is known, with text about them, in the real file formats.

A picture (`Scene`) shows one large *main* object and up to three small ones on a low-saturation background. Everything
said about it (captions, documents, questions, region masks) is derived from the same numbers that draw it. A scene is a
function of `(seed, shifted, index)` alone; `size` only changes the number of pixels it is drawn with.

Splits: scenes `0 ... HELD_OUT - 1` are for training, scenes from `HELD_OUT` on are for evaluation.
Shift: `World(shifted=True)` has other textures, tinted backgrounds, strayed colours and pixel noise, and half of its main
objects are combinations of kind and colour (`UNSEEN`) that the unshifted world never shows.

    python recipes/world.py --out DIR --num 2000 --size 64 --formats mmc4,captions,vqa,pope,robustvqa

writes below DIR, `--num` pictures per format:

    mmc4_annts/*.jsonl + mmc4_images/      interleaved documents (MMC4)
    captions/00000.tar ...                 picture + caption pairs (WebDataset as img2dataset writes it)
    vqa/                                   questions and ten answers each (VQAv2)
    pope/                                  presence questions (POPE, three kinds of negatives)
    robustvqa/                             main object or not (RobustVQA)

Each folder also holds `truth.jsonl`: per picture everything that is known about it.
"""

import argparse
import colorsys
import hashlib
import io
import json
import math
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (222, 38, 44),
    "green": (38, 168, 62),
    "blue": (40, 72, 222),
    "yellow": (244, 208, 30),
    "purple": (150, 44, 196),
    "cyan": (36, 204, 220),
}
BACKGROUNDS = {"white": (236, 235, 232), "gray": (142, 144, 147), "black": (40, 41, 46), "sand": (206, 198, 182)}
SHIFTED_BACKGROUNDS = {
    "rose": (224, 196, 200),
    "mint": (190, 216, 198),
    "slate": (88, 98, 116),
    "brown": (104, 90, 80),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHIFTED_TEXTURES = ("wavy", "ringed", "speckled")
SIZES = {"large": (0.47, 0.55), "medium": (0.37, 0.42), "small": (0.17, 0.22)}  # extent as a share of the side
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
DETAILS = ("coarse", "medium", "full")
UNSEEN = {("circle", "yellow"), ("square", "purple"), ("triangle", "green"), ("star", "cyan")}
HELD_OUT = 1_000_000  # scenes from this index on are never trained on
MAX_OBJECTS = 4
MAX_PICTURES = 4  # per document
FORMATS = ("mmc4", "captions", "vqa", "pope", "robustvqa")

_PERIODS = {
    "square": math.pi / 2,
    "triangle": 2 * math.pi / 3,
    "star": 2 * math.pi / 5,
}  # turned by this: looks the same
_NUMBERS = ("no", "one", "two", "three", "four")
_SYNONYMS = {
    "large": "big",
    "small": "little",
    "purple": "violet",
    "top": "above",
    "bottom": "below",
    "center": "middle",
}
_HUES = {"red": 0.0, "yellow": 50.0, "green": 131.0, "cyan": 185.0, "blue": 230.0, "purple": 282.0}  # degrees


# ---------------------------------------------------------------------------------------------------------------------
# What is in a picture
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths are shares of the picture's side, angles radians; (0, 0) is the top left corner.

    `size` is large, medium or small; `orientation` upright or tilted (turned by about half of the angle after which the
    shape looks the same again), None for circles; `position` one of `POSITIONS`. `mask` (size, size) bool is what of the
    object is visible.
    """

    kind: str
    colour: str
    size: str
    orientation: str | None
    position: str
    extent: float
    angle: float
    centre: tuple[float, float]
    rgb: tuple[float, float, float]
    number: int
    scene: "Scene" = field(repr=False, compare=False)

    @property
    def mask(self) -> np.ndarray:
        return self.scene.masks[self.number]


@dataclass(frozen=True)
class Scene:
    """One picture of a `World` with its truth. Drawn when `image` or `masks` is first asked for."""

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
        return _draw(self)

    @property
    def image(self) -> Image.Image:
        """PIL picture, RGB, (size, size)."""
        return self._drawn[0]

    @property
    def masks(self) -> list[np.ndarray]:
        """Per object a (size, size) bool array: where it is visible."""
        return self._drawn[1]

    @property
    def main(self) -> SceneObject:
        return self.objects[0]

    def caption(self, detail: str = "medium") -> str:
        """What the picture shows, the main object first.

        "coarse": kinds and counts; "medium": colour and kind of each; "full": also sizes, orientation, positions and
        background. Raises ValueError for another level.
        """
        if detail == "coarse":
            counts = Counter(thing.kind for thing in self.objects)  # a Counter keeps the order of first sight
            return _enumerate([_article(k) if n == 1 else f"{_NUMBERS[n]} {k}s" for k, n in counts.items()])
        if detail == "medium":
            return _enumerate([_article(f"{thing.colour} {thing.kind}") for thing in self.objects])
        if detail == "full":
            phrases = []
            for thing in self.objects:
                tilt = "tilted " if thing.orientation == "tilted" else ""
                phrases.append(f"a {thing.size} {tilt}{thing.colour} {thing.kind} at {thing.position}")
            return f"{_enumerate(phrases)}, on {self.texture} {self.background}"
        raise ValueError(f"detail={detail!r} is not a level of detail. Use one of {', '.join(DETAILS)}.")

    def questions(self) -> list[dict[str, str]]:
        """Questions about the whole picture, dicts of question, answer and attribute; the order never changes.

        Attributes: kind, colour, count, size, orientation, position, presence, background. Only what has one right
        answer is asked: an object is named by its kind only where no other object has that kind.
        """
        rng = self.world._rng(self.index, "questions")
        kinds = Counter(thing.kind for thing in self.objects)
        colours = {thing.colour for thing in self.objects}
        pairs = {(thing.colour, thing.kind) for thing in self.objects}
        asked: list[tuple[str, str, str]] = [
            ("What is the main object?", self.main.kind, "kind"),
            ("What color is the main object?", self.main.colour, "colour"),
            ("What size is the main object?", self.main.size, "size"),
            ("Where is the main object?", self.main.position, "position"),
            ("How many objects are there?", str(len(self.objects)), "count"),
            ("What color is the background?", self.background, "background"),
        ]
        for thing in self.objects:
            name = f"{thing.colour} {thing.kind}"  # colours never repeat within a picture
            asked.append((f"What is the {thing.colour} object?", thing.kind, "kind"))
            asked.append((f"What size is the {name}?", thing.size, "size"))
            asked.append((f"Where is the {name}?", thing.position, "position"))
            if thing.orientation is not None:
                asked.append((f"Is the {name} upright or tilted?", thing.orientation, "orientation"))
            if kinds[thing.kind] == 1:
                asked.append((f"What color is the {thing.kind}?", thing.colour, "colour"))
        for kind in KINDS:
            asked.append((f"How many {kind}s are there?", str(kinds[kind]), "count"))
            asked.append((f"Is there a {kind} in the image?", "yes" if kinds[kind] else "no", "presence"))
        present = self.objects[rng.integers(len(self.objects))]
        absent = [colour for colour in COLOURS if colour not in colours]
        asked.append((f"Is there a {present.colour} object in the image?", "yes", "presence"))
        asked.append((f"Is there a {absent[rng.integers(len(absent))]} object in the image?", "no", "presence"))
        asked.append((f"Is there a {present.colour} {present.kind} in the image?", "yes", "presence"))
        absent = [(c, k) for c in COLOURS for k in KINDS if (c, k) not in pairs and (c in colours or k in kinds)]
        colour, kind = absent[rng.integers(len(absent))]
        asked.append((f"Is there a {colour} {kind} in the image?", "no", "presence"))
        return [{"question": question, "answer": answer, "attribute": name} for question, answer, name in asked]

    def region_questions(self) -> list[dict[str, Any]]:
        """Questions about a marked object, as `questions` with the object's number under `object`; its mask is
        `masks[object]`. The text does not say which object is meant: only the mask does."""
        asked = []
        for thing in self.objects:
            asked.append(("What is in this region?", thing.kind, "kind", thing.number))
            asked.append(("What color is this region?", thing.colour, "colour", thing.number))
            asked.append(("What size is the object in this region?", thing.size, "size", thing.number))
        keys = ("question", "answer", "attribute", "object")
        return [dict(zip(keys, row, strict=True)) for row in asked]

    def truth(self, **extra: Any) -> dict[str, Any]:
        """All that is known about the picture, as plain JSON data; masks as uncompressed COCO run lengths."""
        objects = []
        for thing, mask in zip(self.objects, self.masks, strict=True):
            row = {key: value for key, value in vars(thing).items() if key != "scene"}
            objects.append(row | {"area": int(mask.sum()), "segmentation": _run_lengths(mask)})
        world = {"seed": self.world.seed, "index": self.index, "shifted": self.world.shifted, "size": self.world.size}
        captions = {detail: self.caption(detail) for detail in DETAILS}
        about = {"background": self.background, "texture": self.texture, "light": self.light, "captions": captions}
        asked = {"questions": self.questions(), "region_questions": self.region_questions()}
        return extra | world | about | {"objects": objects} | asked


@dataclass(frozen=True)
class Document:
    """Interleaved text and pictures: picture `i` belongs to sentence `matched_text_index[i]`."""

    text_list: list[str]
    scenes: list[Scene]
    matched_text_index: list[int]


@dataclass(frozen=True)
class World:
    """The generator.

    Args:
        seed: any non-negative integer; another seed is another world of the same kind.
        size: side of the pictures in pixels, at least 16.
        shifted: the out-of-distribution variant (see the module's text).
        max_objects: 1 to 4. A scene of a world with fewer objects is the same scene without its last objects, so
            `max_objects=1` gives pictures of one colour.
    """

    seed: int = 0
    size: int = 64
    shifted: bool = False
    max_objects: int = MAX_OBJECTS

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is negative. Give an integer from 0 on.")
        if self.size < 16:
            raise ValueError(f"size={self.size} is too small to show an object. Give a side of at least 16 pixels.")
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects={self.max_objects} is out of range. Give 1 to {MAX_OBJECTS}.")

    def _rng(self, index: int, purpose: str) -> np.random.Generator:
        # one stream per purpose: a change in how questions are drawn leaves the pictures as they are
        return np.random.default_rng([self.seed, int(self.shifted), index, *purpose.encode()])

    def scene(self, index: int) -> Scene:
        """Scene number `index` (any integer from 0 on)."""
        if index < 0:
            raise ValueError(f"index={index} is negative. Give a scene number from 0 on.")
        rng = self._rng(index, "scene")
        backgrounds = tuple(SHIFTED_BACKGROUNDS if self.shifted else BACKGROUNDS)
        textures = SHIFTED_TEXTURES if self.shifted else TEXTURES
        return Scene(
            world=self,
            index=index,
            background=backgrounds[rng.integers(len(backgrounds))],
            texture=textures[rng.integers(len(textures))],
            light=float(rng.uniform(0, 2 * math.pi)),
            style={key: float(rng.random()) for key in ("angle", "frequency", "phase", "contrast", "gloss")},
            num_objects=min(int(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1))) + 1, self.max_objects),
        )

    def document(self, index: int, max_pictures: int = MAX_PICTURES) -> Document:
        """A document that shows scene `index` and up to `max_pictures - 1` scenes that follow it."""
        rng = self._rng(index, "document")
        scenes = [self.scene(index + i) for i in range(int(rng.integers(1, max_pictures + 1)))]
        sentences = [_pick(rng, ("Here are some shapes.", "Look at these pictures.", "This is a picture book."))]
        matches = []
        starts = ("This is", "We can see", "The picture shows", "Here is", "Look at")
        for number, scene in enumerate(scenes):
            start = _pick(rng, starts) if number == 0 else _pick(rng, (*starts, "Next is", "Then comes"))
            matches.append(len(sentences))
            sentences.append(f"{start} {scene.caption(_pick(rng, DETAILS))}.")
            if rng.random() < 0.4:
                asked = _pick(rng, scene.questions())
                sentences.append(f"{asked['question']} {asked['answer'].capitalize()}.")
        return Document(sentences, scenes, matches)


def _place_objects(scene: Scene) -> list[SceneObject]:
    world, rng = scene.world, scene.world._rng(scene.index, "objects")
    # drawn one object after the other, so that leaving out the last ones does not change the first
    colours, objects = list(COLOURS), []
    for number in range(scene.num_objects):
        if number == 0 and world.shifted and rng.random() < 0.5:
            kind, colour = _pick(rng, sorted(UNSEEN))
        else:
            colour = _pick(rng, colours)
            kind = _pick(rng, [k for k in KINDS if world.shifted or (k, colour) not in UNSEEN])
        colours.remove(colour)
        size = "small" if number else _pick(rng, ("large", "medium"))
        extent = rng.uniform(*SIZES[size])
        orientation, angle = None, 0.0
        if kind != "circle":
            orientation = _pick(rng, ("upright", "tilted"))
            angle = _PERIODS[kind] * ((0.5 if orientation == "tilted" else 0.0) + rng.uniform(-0.12, 0.12))
        if number == 0:  # main objects keep off the corners: they would stick out
            position = _pick(rng, ("center", "left", "right", "top", "bottom"))
            centre = _cell_centre(position, reach=0.17, jitter=rng.uniform(-0.03, 0.03, 2))
        else:
            position, centre = _free_cell(rng, objects, extent)
        if world.shifted:
            rgb = _stray(COLOURS[colour], rng.uniform(-9, 9), rng.uniform(0.75, 1.0), rng.uniform(0.8, 1.0))
        else:
            rgb = _stray(COLOURS[colour], rng.uniform(-4, 4), rng.uniform(0.95, 1.0), rng.uniform(0.92, 1.0))
        centre = (float(centre[0]), float(centre[1]))
        shape = (kind, colour, size, orientation, position, float(extent), float(angle))
        objects.append(SceneObject(*shape, centre, rgb, number, scene))
    return objects


def _free_cell(rng: np.random.Generator, objects: list[SceneObject], extent: float) -> tuple[str, tuple[float, float]]:
    """A place for a small object that overlaps the others little: the first of a random order that keeps 95 % of the
    distance at which bounding circles touch, or the roomiest."""
    best, most = ("center", (0.5, 0.5)), -math.inf
    for position in rng.permutation(POSITIONS):
        centre = _cell_centre(str(position), reach=0.33, jitter=rng.uniform(-0.04, 0.04, 2))
        room = min(math.dist(centre, thing.centre) / (0.5 * (extent + thing.extent)) for thing in objects)
        if room >= 0.95:
            return str(position), centre
        if room > most:
            best, most = (str(position), centre), room
    return best


def _cell_centre(position: str, reach: float, jitter: np.ndarray) -> tuple[float, float]:
    x = ("right" in position) - ("left" in position)
    y = ("bottom" in position) - ("top" in position)
    return (0.5 + reach * x + jitter[0], 0.5 + reach * y + jitter[1])


def _stray(rgb: tuple[int, int, int], turn: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Turns the hue by `turn` degrees and scales saturation and value."""
    h, s, v = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    r, g, b = colorsys.hsv_to_rgb((h + turn / 360) % 1, s * saturation, v * value)
    return (255 * r, 255 * g, 255 * b)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    y, x = np.meshgrid(centres, centres, indexing="ij")
    return x, y


def _corners(kind: str) -> np.ndarray:
    """Corners of an upright shape of extent 1 around (0, 0), (number, 2)."""
    if kind == "square":
        return 0.43 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float32)
    number, inner = (3, None) if kind == "triangle" else (5, 0.46)
    steps = number if inner is None else 2 * number
    turns = 2 * np.pi * np.arange(steps) / steps - np.pi / 2
    radii = np.full(steps, 0.58)
    if inner is not None:
        radii[1::2] *= inner
    return np.stack([radii * np.cos(turns), radii * np.sin(turns)], axis=1).astype(np.float32)


_SHAPES = {kind: _corners(kind) for kind in KINDS if kind != "circle"}


def _signed_distance(thing: SceneObject, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance of points from the object's edge, negative inside, as a share of the side. `x`, `y` (h, w)."""
    x, y = (x - thing.centre[0]) / thing.extent, (y - thing.centre[1]) / thing.extent
    if thing.kind == "circle":
        return (np.hypot(x, y) - 0.5) * thing.extent
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    x, y = cos * x + sin * y, cos * y - sin * x
    corners = _SHAPES[thing.kind]
    nearest, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2, out=nearest)
        if ey:  # even-odd rule: count the edges that a ray to the right crosses
            inside ^= ((ay > y) != (by > y)) & (wx < ex * wy / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest) * thing.extent


def _pattern(texture: str, style: dict[str, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The background's pattern, (h, w) in [-1, 1]."""
    turn, pitch = math.pi * style["angle"], 2 * math.pi * (5 + 3 * style["frequency"])
    shift = 2 * math.pi * style["phase"]
    u = math.cos(turn) * x + math.sin(turn) * y
    v = math.cos(turn) * y - math.sin(turn) * x
    if texture == "plain":
        return 0.4 * np.sin(4 * u + shift) * np.sin(3 * v + shift)
    if texture == "striped":
        return np.tanh(3 * np.sin(pitch * u + shift))
    if texture == "checkered":
        return np.tanh(6 * np.sin(0.7 * pitch * u + shift) * np.sin(0.7 * pitch * v + shift))
    if texture == "dotted":
        return np.tanh(4 * (np.cos(pitch * u + shift) + np.cos(pitch * v + shift) - 0.9))
    if texture == "wavy":
        return np.tanh(3 * np.sin(pitch * u + shift + 1.5 * np.sin(9 * v)))
    if texture == "ringed":
        return np.tanh(3 * np.sin(pitch * np.hypot(x - style["phase"], y - style["contrast"])))
    return np.sin(1.4 * pitch * u + 2 * np.sin(7 * v)) * np.sin(
        1.2 * pitch * v + shift + 2 * np.sin(8 * u)
    )  # speckled


def _draw(scene: Scene) -> tuple[Image.Image, list[np.ndarray]]:
    size, style = scene.world.size, scene.style
    x, y = _grid(size)
    light = (math.cos(scene.light), math.sin(scene.light))
    rgb = np.array((BACKGROUNDS | SHIFTED_BACKGROUNDS)[scene.background], np.float32)
    pattern = _pattern(scene.texture, style, x, y)[..., None]
    canvas = rgb + (7 + 11 * style["contrast"]) * pattern  # [H, W, 3] in 0 ... 255
    canvas *= 1 + 0.14 * (light[0] * (x - 0.5) + light[1] * (y - 0.5))[..., None]
    owner = np.full((size, size), -1)
    main_first = style["gloss"] < 0.5  # overlaps: small objects are in front of the main one, or behind it
    for thing in scene.objects if main_first else scene.objects[::-1]:
        reach = 0.62 * thing.extent + 0.03 + 1 / size
        (left, right), (top, bottom) = (
            (max(math.floor((c - reach) * size), 0), math.ceil((c + reach) * size)) for c in thing.centre
        )
        box = (slice(top, bottom), slice(left, right))
        bx, by = x[box], y[box]
        shadow = _signed_distance(thing, bx + 0.018 * light[0], by + 0.018 * light[1])
        canvas[box] *= 1 - 0.3 * np.clip(0.5 - shadow / 0.03, 0, 1)[..., None]
        distance = _signed_distance(thing, bx, by)
        cover = np.clip(0.5 - distance * size, 0, 1)  # anti-aliased: the share of the pixel that is inside
        slope = (light[0] * (bx - thing.centre[0]) + light[1] * (by - thing.centre[1])) / thing.extent
        shade = (1 + 0.16 * slope) * (1 - 0.2 * np.clip(1 + distance / 0.03, 0, 1))  # lit side, dark rim
        body = shade[..., None] * np.array(thing.rgb, np.float32)
        canvas[box] += cover[..., None] * (body - canvas[box])
        owner[box][cover > 0.5] = thing.number
    if scene.world.shifted:
        grain = scene.world._rng(scene.index, "grain").normal(0, 9, (3, 64, 64)).astype(np.float32)
        planes = [np.asarray(Image.fromarray(plane).resize((size, size), Image.BILINEAR)) for plane in grain]
        canvas += np.stack(planes, axis=-1)
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return picture, [owner == number for number in range(len(scene.objects))]


# ---------------------------------------------------------------------------------------------------------------------
# Reading pictures and text of the world: the scorers
# ---------------------------------------------------------------------------------------------------------------------


def dominant_colour(image: Image.Image) -> str | None:
    """Name of the colour (of `COLOURS`) that covers most of a picture, backgrounds aside; None where no colour covers
    2 % of it.

    A pixel counts when it is vivid (its largest and smallest channel differ by at least 30 % of the range and by 45 % of
    the largest), and for the colour of the nearest hue. The rule knows nothing of shapes and places, and washed-out
    pixels count for nothing.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32).reshape(-1, 3) / 255
    most, least = pixels.max(1), pixels.min(1)
    chroma = most - least
    vivid = pixels[(chroma >= 0.3) & (chroma >= 0.45 * most)]
    if len(vivid) < 0.02 * len(pixels):
        return None
    r, g, b = vivid.T
    hue = np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    names = list(_HUES)
    gap = np.abs(hue[:, None] - np.array([_HUES[name] for name in names], np.float32))
    counts = np.bincount(np.minimum(gap, 360 - gap).argmin(1), minlength=len(names))
    return names[counts.argmax()] if counts.max() >= 0.02 * len(pixels) else None


def first_kind(text: str) -> str | None:
    """The first kind of object (of `KINDS`; singular or plural) that a text names, None if it names none."""
    found = re.search(rf"\b({'|'.join(KINDS)})s?\b", text.lower())
    return found.group(1) if found else None


def first_colour(text: str) -> str | None:
    """The first colour (of `COLOURS`) that a text names, None if it names none."""
    found = re.search(rf"\b({'|'.join(COLOURS)})\b", text.lower())
    return found.group(1) if found else None


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _article(noun: str) -> str:
    return f"a {noun}"  # no kind and no colour begins with a vowel sound


def _enumerate(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """Uncompressed COCO run lengths: column by column, beginning with the run of zeros (which may be 0 long)."""
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: len(edges) + (edges[-1] < mask.size)].tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# Writers of the real formats
# ---------------------------------------------------------------------------------------------------------------------


def _jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue()


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _scenes(world: World, num: int, start: int, what: str) -> Iterator[Scene]:
    if num < 1:
        raise ValueError(f"num={num} pictures cannot be written. Give at least 1.")
    return (world.scene(start + i) for i in tqdm(range(num), desc=what, unit=" pictures"))


def _image_name(scene: Scene) -> str:
    """A name as MMC4 has them: a hash of at least 12 characters and the suffix that the picture had on the web."""
    digest = hashlib.sha1(f"{scene.world.seed}/{scene.world.shifted}/{scene.index}".encode()).hexdigest()
    return f"{digest[:12]}.{'png' if scene.index % 4 == 0 else 'jpg'}"


def write_mmc4(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """MMC4 documents that show `num` pictures from scene `start` on, 1 to 4 each.

    `mmc4_annts/docs_no_face_shard_0_v3.jsonl`, pictures `mmc4_images/<first 12 characters of image_name>.jpg`. As in
    the real data, some pictures (5 %) count as a poor match for their sentence: `matched_sim` below the usual 0.24.
    """
    folder, rows, truth = Path(folder), [], []
    (folder / "mmc4_annts").mkdir(parents=True, exist_ok=True)
    (folder / "mmc4_images").mkdir(exist_ok=True)
    document, left = None, 0
    for scene in _scenes(world, num, start, "mmc4"):
        if not left:
            document = world.document(scene.index, max_pictures=min(MAX_PICTURES, start + num - scene.index))
            left = len(document.scenes)
            rng = world._rng(scene.index, "similarity")
            similarity = rng.uniform(0.08, 0.18, (left, len(document.text_list))).round(4)
            rows.append({"text_list": document.text_list, "image_info": [], "similarity_matrix": []})
            rows[-1] |= {"url": f"https://world.example/{scene.index}.html", "could_have_url_duplicate": 0}
        number, name = len(document.scenes) - left, _image_name(scene)
        sentence = document.matched_text_index[number]
        similarity[number, sentence] = round(rng.uniform(*((0.19, 0.23) if rng.random() < 0.05 else (0.27, 0.36))), 4)
        rows[-1]["similarity_matrix"].append(similarity[number].tolist())
        rows[-1]["image_info"].append(
            {
                "image_name": name,
                "raw_url": f"https://world.example/{name}",
                "matched_text_index": sentence,
                "matched_sim": float(similarity[number, sentence]),
                "face_detections": None,
            }
        )
        (folder / "mmc4_images" / f"{name[:12]}.jpg").write_bytes(_jpeg(scene.image))
        truth.append(scene.truth(file=f"mmc4_images/{name[:12]}.jpg", document=len(rows) - 1, sentence=sentence))
        left -= 1
    _write_lines(folder / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl", rows)
    _write_lines(folder / "truth.jsonl", truth)


def write_caption_tars(
    folder: str | Path, world: World, num: int, start: int = 0, detail: str = "medium", per_tar: int = 1000
) -> None:
    """WebDataset shards `00000.tar`, `00001.tar`, ... of `per_tar` pictures as img2dataset writes them: `{key}.jpg`,
    `{key}.json` (caption, url, key, status, width, height), `{key}.txt`. `detail` as in `Scene.caption`, or "mixed"."""
    folder, truth = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    tar = None
    try:
        for number, scene in enumerate(_scenes(world, num, start, "captions")):
            shard, place = divmod(number, per_tar)
            if place == 0:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w")
            key = f"{shard:05d}{place:04d}"
            caption = scene.caption(_pick(world._rng(scene.index, "detail"), DETAILS) if detail == "mixed" else detail)
            side = {"caption": caption, "url": f"https://world.example/{_image_name(scene)}", "key": key}
            side |= {"status": "success", "width": world.size, "height": world.size}
            parts = {"jpg": _jpeg(scene.image), "json": json.dumps(side).encode(), "txt": caption.encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            truth.append(scene.truth(file=f"{shard:05d}.tar/{key}.jpg", caption=caption))
    finally:
        if tar is not None:
            tar.close()
    _write_lines(folder / "truth.jsonl", truth)


def _write_coco_images(folder: Path, scenes: Iterator[Scene], split: str) -> Iterator[tuple[int, str, Scene]]:
    """Writes pictures under COCO's names; yields (image_id, file name, scene)."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    truth = []
    for number, scene in enumerate(scenes, start=1):
        name = f"COCO_{split}_{number:012d}.jpg"
        (folder / split / name).write_bytes(_jpeg(scene.image))
        truth.append(scene.truth(file=f"{split}/{name}", image_id=number))
        yield number, name, scene
    _write_lines(folder / "truth.jsonl", truth)


def write_vqa(folder: str | Path, world: World, num: int, start: int = 0, split: str = "train2014") -> None:
    """VQAv2's files: `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json` and pictures
    `{split}/COCO_{split}_%012d.jpg`. Every question of `Scene.questions` with ten answers, of which two use another
    word where there is one (big for large); the truth is `multiple_choice_answer`. Attributes stand in truth.jsonl, in
    the order of the questions. Raises ValueError for a split other than train2014 and val2014."""
    if split not in ("train2014", "val2014"):
        raise ValueError(f"split={split!r} is not one of VQAv2's. Use train2014 or val2014.")
    folder, questions, annotations = Path(folder), [], []
    for image_id, _, scene in _write_coco_images(folder, _scenes(world, num, start, "vqa"), split):
        for number, asked in enumerate(scene.questions()):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            answer = asked["answer"]
            answers = [answer] * 8 + [_SYNONYMS.get(answer, answer)] * 2
            answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
            questions.append(ids | {"question": asked["question"]})
            annotations.append(
                ids
                | {
                    "question_type": " ".join(asked["question"].lower().split()[:2]),
                    "answer_type": answer_type,
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer": given, "answer_confidence": "yes", "answer_id": i}
                        for i, given in enumerate(answers, start=1)
                    ],
                }
            )
    about = {"info": {"description": "synthetic world"}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    asked = about | {"task_type": "Open-Ended", "questions": questions}
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(asked))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(about | {"annotations": annotations}))


def write_pope(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """POPE's `coco_pope_{random,popular,adversarial}.json` (JSON lines question_id, image, text, label) and pictures
    `val2014/*.jpg`. An object is a colour with a kind; per picture up to three that are there and as many that are not:
    any (random), those most frequent in these pictures (popular), those that share the colour or kind of an object that
    is there (adversarial)."""
    folder = Path(folder)
    scenes = list(_write_coco_images(folder, _scenes(world, num, start, "pope"), "val2014"))
    frequent = Counter((thing.colour, thing.kind) for _, _, scene in scenes for thing in scene.objects)
    every = [(colour, kind) for colour in COLOURS for kind in KINDS]
    for sampling in ("random", "popular", "adversarial"):
        rows = []
        for _, name, scene in scenes:
            rng = world._rng(scene.index, f"pope {sampling}")
            there = [(thing.colour, thing.kind) for thing in scene.objects]
            absent = [pair for pair in (every[i] for i in rng.permutation(len(every))) if pair not in there]
            if sampling == "popular":
                absent.sort(key=lambda pair: -frequent[pair])
            if sampling == "adversarial":
                absent.sort(key=lambda pair: not any(pair[0] == c or pair[1] == k for c, k in there))
            for yes, no in zip(there[:3], absent, strict=False):
                for (colour, kind), label in ((yes, "yes"), (no, "no")):
                    text = f"Is there a {colour} {kind} in the image?"
                    rows.append({"question_id": len(rows) + 1, "image": name, "text": text, "label": label})
        _write_lines(folder / f"coco_pope_{sampling}.json", rows)


def write_robustvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """RobustVQA's `robustvqa_test.json`, {imagenet_a, imagenet_r, imagenet_v2: [{file_name, gt_caption, error_caption}]},
    and the pictures it names, `num` in all. `imagenet_v2` is new pictures of `world`, the other two are its shifted
    variant, `imagenet_a` with combinations of kind and colour that the unshifted world never shows. The error class is
    the kind of another object in the picture where there is one, else any other kind."""
    folder, truth = Path(folder), []
    items: dict[str, list[dict[str, str]]] = {"imagenet_a": [], "imagenet_r": [], "imagenet_v2": []}
    shifted = replace(world, shifted=True)
    for number, plain in enumerate(_scenes(world, num, start, "robustvqa")):
        scene = plain if number % 3 == 0 else shifted.scene(plain.index)
        kind, rng = scene.main.kind, scene.world._rng(scene.index, "error class")
        unseen = (kind, scene.main.colour) in UNSEEN
        name = "imagenet_v2" if number % 3 == 0 else "imagenet_a" if unseen else "imagenet_r"
        others = [thing.kind for thing in scene.objects if thing.kind != kind] or [k for k in KINDS if k != kind]
        label = KINDS.index(kind)
        place = f"imagenetv2/{label}" if name == "imagenet_v2" else f"{name.replace('_', '-')}/n{label + 1:08d}"
        file_name = f"{place}/{scene.index:08d}.{'jpeg' if name == 'imagenet_v2' else 'jpg'}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_bytes(_jpeg(scene.image))
        items[name].append({"file_name": file_name, "gt_caption": kind, "error_caption": _pick(rng, others)})
        truth.append(scene.truth(file=file_name, set=name))
    (folder / "robustvqa_test.json").write_text(json.dumps(items))
    _write_lines(folder / "truth.jsonl", truth)


def write_formats(
    folder: str | Path,
    world: World,
    num: int,
    start: int = 0,
    detail: str = "medium",
    formats: Sequence[str] = FORMATS,
) -> None:
    """Writes the named formats below `folder`, laid out as the module's text says, `num` pictures each from scene
    `start` on. Give a `start` of at least `HELD_OUT` for data to evaluate on.

    Raises ValueError for an unknown format.
    """
    folder = Path(folder)
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise ValueError(f"Unknown format(s) {unknown}; give one or more of {', '.join(FORMATS)}.")
    for name in formats:
        if name == "mmc4":
            write_mmc4(folder, world, num, start)
        elif name == "captions":
            write_caption_tars(folder / "captions", world, num, start, detail)
        elif name == "vqa":
            write_vqa(folder / "vqa", world, num, start, split="val2014" if start >= HELD_OUT else "train2014")
        elif name == "pope":
            write_pope(folder / "pope", world, num, start)
        else:
            write_robustvqa(folder / "robustvqa", world, num, start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes pictures of the synthetic world in the real file formats.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, made where it is missing")
    parser.add_argument("--num", type=int, default=2000, help="pictures per format (2000)")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (64)")
    parser.add_argument("--seed", type=int, default=0, help="which world (0)")
    parser.add_argument("--start", type=int, help="first scene; without it 0, or HELD_OUT with --held_out")
    parser.add_argument("--held_out", action="store_true", help=f"pictures for evaluation: scenes from {HELD_OUT} on")
    parser.add_argument("--shifted", action="store_true", help="the out-of-distribution variant")
    parser.add_argument("--detail", default="medium", choices=(*DETAILS, "mixed"), help="of the captions (medium)")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"comma-separated, of {','.join(FORMATS)} (all)")
    args = parser.parse_args()
    start = args.start if args.start is not None else HELD_OUT * args.held_out
    try:
        world = World(args.seed, args.size, args.shifted)
        write_formats(
            args.out, world, args.num, start, args.detail, [name.strip() for name in args.formats.split(",")]
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"Wrote {args.num} pictures of {args.size} px per format ({args.formats}) below {args.out}")


if __name__ == "__main__":
    main()
