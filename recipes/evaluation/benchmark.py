# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a benchmark is: samples, what is asked about each, what an answer says, what it is worth, and figures over all.

A new benchmark is one file in recipes/evaluation/benchmarks/ and one line in its table. `answering` knows the models,
`predictions` the files; a benchmark knows neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recipes.data.readers.images import open_image
from recipes.data.readers.masks import decode_segmentation
from recipes.data.samples import IMAGE, Piece
from recipes.evaluation.sources import DataSource
from recipes.prompts import ANSWER_BEGIN, QUESTION_REQUEST

PROTOCOLS = ("deem", "standard")
ONE_WORD = "\nAnswer the question using a single word or phrase."  # of the standard protocol, as LLaVA has it
Line = dict[str, Any]  # of predictions.jsonl


@dataclass(frozen=True)
class ImageSource:
    """Where an image comes from.

    Attributes:
        name: two sources of one name are the same image, which is encoded once.
        where: its file, or what gives its bytes or the image itself.
        segmentation: of a region in COCO's form; None for the whole image.
        as_stored: read the pixels as they are stored, whatever the orientation says: boxes and masks are drawn on those.
    """

    name: str
    where: Path | Callable[[], bytes | Image.Image]
    segmentation: Any = None
    as_stored: bool = False

    def read(self) -> tuple[Image.Image, str]:
        """Return the RGB image and the SHA-256 of its file (of its pixels, where it has none).

        Raises:
            BadSample: see `open_image`.
        """
        stored = self.where if isinstance(self.where, Path) else self.where()
        image = open_image(stored, self.name, self.as_stored)
        data = stored.read_bytes() if isinstance(stored, Path) else stored
        return image, sha256(image.tobytes() if isinstance(data, Image.Image) else data).hexdigest()

    def mask(self, image: Image.Image) -> np.ndarray | None:
        """Return the region's mask (H, W), None for the whole image."""
        return None if self.segmentation is None else decode_segmentation(self.segmentation, image.height, image.width)


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes:
        id: unique in the benchmark.
        asked: the question as the data has it.
        truth: the right answer, in JSON's types.
        cluster: samples of one cluster are not independent, as those about one image; `--limit` takes them whole.
        group: the part of the benchmark, as "random" of POPE; "" if it has one part.
        about: what else `parse`, `score` and `figures` need, in JSON's types.
        fault: why the sample cannot be asked; it then counts as wrong.
    """

    id: str
    images: tuple[ImageSource, ...] = ()
    asked: str = ""
    truth: Any = None
    cluster: str = ""
    group: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class Request:
    """What a model is asked: texts and images in their order, and how the answer begins."""

    pieces: tuple[Piece, ...]
    answer_begin: str = ""

    def without_images(self) -> "Request":
        """Return the same request with nothing to see."""
        return Request(tuple(piece for piece in self.pieces if piece is not IMAGE), self.answer_begin)


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval.

    Attributes:
        chance: what it would be without knowing anything; None where that is not defined.
        count: samples that it is over.
        clusters: independent units among them; 0 where no interval is given.
    """

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    count: int = 0
    clusters: int = 0


Figures = dict[str, Figure]


@dataclass(frozen=True)
class Loaded:
    """A benchmark's samples, and the files that they were read from with their number of rows."""

    samples: list[Sample]
    rows: dict[Path | str, int]


class Benchmark(ABC):
    """One benchmark; see the module.

    Attributes:
        name: as `--benchmarks` has it.
        version: to be raised with any change of prompts, parsing or scoring.
        generation: options of `generate`, by protocol.
        takes_regions: whether images come with region masks, which only DEEM reads.
        asks: the kind of model: "language" (writes or ranks text), "towers" (two-tower models) or "drawing".
        headline: the figure that stands for all, the first in tables.
    """

    name: str = ""
    version: int = 1
    headline: str = "accuracy"
    takes_regions = False
    asks = "language"
    generation: dict[str, dict[str, Any]] = {
        "deem": {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 0.0, "do_sample": False},
        "standard": {"num_beams": 1, "max_new_tokens": 16, "do_sample": False},
    }

    def missing(self) -> list[str]:
        """Return what scoring needs and does not find, as Java; looked for before anything is generated."""
        return []

    @abstractmethod
    def load(self, source: DataSource) -> Loaded:
        """Read all samples; a row of another layout becomes a sample with a `fault`.

        Raises:
            ValueError: the files are not there.
        """

    @abstractmethod
    def request(self, sample: Sample, protocol: str) -> Request:
        """Return what a model is asked under a protocol of `PROTOCOLS`."""

    def options(self, sample: Sample) -> tuple[str, ...]:
        """Return the answers whose likelihoods are asked for, instead of an answer; none where a model writes one.

        Lines then hold `option_scores`, and the likeliest option as `raw`.
        """
        return ()

    @abstractmethod
    def parse(self, raw: str, line: Line) -> Any:
        """Return what an answer says, None if nothing can be made of it; `line` holds protocol, truth and about."""

    @abstractmethod
    def score(self, parsed: Any, line: Line) -> float:
        """Return what a parsed answer is worth, from 0 to 1."""

    @abstractmethod
    def figures(self, lines: Sequence[Line]) -> Figures:
        """Return the figures over scored lines; those with an `error` count as wrong."""

    def scores(self, lines: Sequence[Line]) -> list[float]:
        """Return what each line is worth where two models are compared; corpus metrics have their own."""
        return [line["score"] for line in lines]

    def notes(self, loaded: Loaded) -> list[str]:
        """Return what a reader of the figures must know of the data."""
        return []

    def submission(self, lines: Sequence[Line]) -> Any:
        """Return what the benchmark's server takes, in JSON's types; None if it has none."""
        return None


def question_request(question: str, protocol: str, deem_ending: str, standard_ending: str = ONE_WORD) -> Request:
    """Return the request of a short answer about one image.

    Args:
        deem_ending: what stands behind the question under the protocol "deem", white space included.
    """
    if protocol == "deem":
        return Request((QUESTION_REQUEST, IMAGE, question + deem_ending), f" {ANSWER_BEGIN}")
    return Request((IMAGE, question + standard_ending))


def scored(benchmark: Benchmark, line: Line) -> Line:
    """Return a line with its answer parsed and scored anew."""
    parsed = None if line.get("error") else benchmark.parse(line["raw"], line)
    return line | {"parsed": parsed, "score": 0.0 if line.get("error") else float(benchmark.score(parsed, line))}


def figure_rows(figures: Figures) -> dict[str, dict[str, Any]]:
    """Return figures in JSON's types."""
    return {name: asdict(figure) for name, figure in figures.items()}


def some_clusters(samples: Sequence[Sample], limit: int, seed: int) -> list[Sample]:
    """Return a random part of at least `limit` samples, of whole clusters, in their order; all for 0.

    A larger part of the same seed holds the smaller one.
    """
    if not limit:
        return list(samples)
    order = sorted({sample.cluster for sample in samples}, key=lambda name: stable_number(seed, name))
    sizes: dict[str, int] = {}
    for sample in samples:
        sizes[sample.cluster] = sizes.get(sample.cluster, 0) + 1
    kept: set[str] = set()
    total = 0
    for name in order:
        if total >= limit:
            break
        kept.add(name)
        total += sizes[name]
    return [sample for sample in samples if sample.cluster in kept]


def distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with an id for each: one whose id another has already gets a number, and counts as faulty."""
    number: dict[str, int] = {}
    found = []
    for sample in samples:
        number[sample.id] = number.get(sample.id, 0) + 1
        if number[sample.id] > 1:
            sample = replace(sample, id=f"{sample.id} ({number[sample.id]})", fault="its id stands twice")
        found.append(sample)
    return found


def stable_number(seed: int, name: str) -> int:
    """Return a number below 2**63 that `seed` and `name` alone decide."""
    return int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
