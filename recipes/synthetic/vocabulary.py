# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The vocabulary of the synthetic world, and reading its words and colors back out of text and images."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("circle", "square", "triangle", "star")
COLORS = {
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
EXTENTS = {
    "large": (0.47, 0.55),
    "medium": (0.37, 0.42),
    "small": (0.17, 0.22),
}  # lowest and highest, as a share of the side
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
DETAILS = ("coarse", "medium", "full")
UNSEEN = {("circle", "yellow"), ("square", "purple"), ("triangle", "green"), ("star", "cyan")}
HELD_OUT = 1_000_000  # scenes from this index on are never trained on
MAX_OBJECTS = 4
MAX_IMAGES = 4  # per document

# A shape turned by this angle (radians) looks the same.
PERIODS = {"square": math.pi / 2, "triangle": 2 * math.pi / 3, "star": 2 * math.pi / 5}
NUMBERS = ("no", "one", "two", "three", "four")
SYNONYMS = {
    "large": "big",
    "small": "little",
    "purple": "violet",
    "top": "above",
    "bottom": "below",
    "center": "middle",
}
HUES = {"red": 0.0, "yellow": 50.0, "green": 131.0, "cyan": 185.0, "blue": 230.0, "purple": 282.0}  # degrees


def dominant_color(image: Image.Image) -> str | None:
    """Return the color (of `COLORS`) that covers most of an image, or None where no color covers 2 % of it.

    Only vivid pixels count: those whose largest and smallest channels differ by at least 30 % of the range and by 45 % of
    the largest. Backgrounds and washed-out pixels are not vivid. Each counts for the color with the nearest hue.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32).reshape(-1, 3) / 255
    most, least = pixels.max(1), pixels.min(1)
    chroma = most - least
    vivid = pixels[(chroma >= 0.3) & (chroma >= 0.45 * most)]
    if len(vivid) < 0.02 * len(pixels):
        return None
    r, g, b = vivid.T
    hue = np.degrees(np.arctan2(math.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    names = list(HUES)
    gap = np.abs(hue[:, None] - np.array([HUES[name] for name in names], np.float32))
    counts = np.bincount(np.minimum(gap, 360 - gap).argmin(1), minlength=len(names))
    return names[counts.argmax()] if counts.max() >= 0.02 * len(pixels) else None


def first_kind(text: str) -> str | None:
    """Return the first kind of object (of `KINDS`; singular or plural) that a text names, or None."""
    found = re.search(rf"\b({'|'.join(KINDS)})s?\b", text.lower())
    return found.group(1) if found else None


def first_color(text: str) -> str | None:
    """Return the first color (of `COLORS`) that a text names, or None."""
    found = re.search(rf"\b({'|'.join(COLORS)})\b", text.lower())
    return found.group(1) if found else None


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """Return one of the options at random."""
    return options[int(rng.integers(len(options)))]


def article(noun: str) -> str:
    """Return the noun with its indefinite article."""
    return f"a {noun}"  # no kind and no color begins with a vowel sound


def enumerate_phrases(phrases: list[str]) -> str:
    """Return the phrases as "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
