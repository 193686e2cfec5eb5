# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Images drawn from captions, beside the real ones: FID and other distances, and how well drawings fit their captions.

| name | captions | real images |
|---|---|---|
| `fid` | one of each of 30,000 images of `captions_val2014.json`, drawn at random, always the same | `val2014/` |
| `fid_karpathy` | one of each image of `coco_karpathy_test.json`, as the release has it | `val2014/` |
| `fid_ln_coco` | Localized Narratives, `coco_val_captions.jsonl`: 6 an image on average, each image as often | `val2017/` |

Figures are of features that `--extractors` names (`recipes/evaluation/distances.py`). Definitions:
data_and_evaluation.md section 3.12. The release draws from the last letter of a narrative; here the whole is drawn.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import Benchmark, Figures, ImageSource, Line, Loaded, Request, Sample, stable_number
from recipes.evaluation.benchmarks.captions import COCO_NAMES, captioned_images
from recipes.evaluation.benchmarks.files import UNUSABLE, json_lines, make_samples, text_of
from recipes.evaluation.benchmarks.shares import figure_of, share_figure
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.sources import DataSource, ImageFolders
from recipes.prompts import RECONSTRUCT_REQUEST

MOST = 30_000  # captions
DRAWS_PER_IMAGE = 6  # of narratives: 30,000 of the 5,000 images of val2017
Row = tuple[str, str, str]  # id, image, caption


class Fid(Benchmark):
    """See the module.

    Args:
        patterns: of the file of captions.
        read: gives its rows, those that are drawn alone.
        folder: that the images lie in.
    """

    headline = "fid"
    asks = "drawing"
    generation: dict[str, dict[str, Any]] = {"deem": {}, "standard": {}}

    def __init__(self, name: str, patterns: tuple[str, ...], read: Callable[[Path], list[Row]], folder: str) -> None:
        self.name, self.patterns, self.read, self.folder = name, patterns, read, folder

    def load(self, source: DataSource) -> Loaded:
        """Read the captions that are drawn, each with its real image."""
        file = source.need(*self.patterns)
        folders = ImageFolders(file.parent, self.folder, "", "images")
        rows = self.read(file)
        found: dict[str, Path] = {}

        def sample(number: int, row: Row) -> Sample:
            name, image, caption = row
            if image not in found:
                found[image] = folders.find(image, Path(image).name)
            return Sample(name, (ImageSource(image, found[image]),), text_of(caption), cluster=image)

        return Loaded(make_samples(rows, sample, "row"), {file: len(rows)})

    def request(self, sample: Sample, protocol: str) -> Request:
        """The released request to reconstruct the image, or the caption alone."""
        if protocol == "deem":
            return Request((f"{RECONSTRUCT_REQUEST}{sample.asked} ",))
        return Request((sample.asked,))

    def parse(self, raw: str, line: Line) -> str | None:
        """The drawing's file."""
        return raw or None

    def score(self, parsed: str | None, line: Line) -> float:
        """How well the kept drawing fits its caption where a ranker said so (cosine above 0), else 1 for a drawing."""
        scores = line.get("option_scores")
        return 0.0 if parsed is None else max(0.0, min(1.0, max(scores))) if scores else 1.0

    def figures(self, lines: Sequence[Line]) -> Figures:
        """The share of captions that were drawn, and the fit by the ranker, before and after its choice."""
        clusters = [line["cluster"] for line in lines]
        figures = {"drawn": share_figure([line["parsed"] is not None for line in lines], clusters)}
        ranked = [line for line in lines if line.get("option_scores")]
        if ranked:
            of = [line["cluster"] for line in ranked]
            for name, pick in (("ranker_score_first", lambda scores: scores[0]), ("ranker_score_kept", max)):
                values = [100 * max(0.0, pick(line["option_scores"])) for line in ranked]
                figures[name] = figure_of(mean_interval(values, of, (0.0, 100.0)))
        return figures

    def notes(self, loaded: Loaded) -> list[str]:
        """Say what the real images are."""
        images = len({sample.cluster for sample in loaded.samples})
        return [
            f"{len(loaded.samples)} captions of {images} images; the real set is the images of the captions, in order"
        ]


def _one_each(file: Path) -> list[Row]:
    """Return one caption of each image, of `MOST` images at most, as a fixed seed draws them."""
    images = {image: captions for image, captions, _ in captioned_images(file) if captions}
    order = sorted(images, key=lambda image: stable_number(0, f"image {image}"))[:MOST]
    return [(image, image, images[image][stable_number(0, image) % len(images[image])]) for image in sorted(order)]


def _narratives(file: Path) -> list[Row]:
    """Return narratives drawn with replacement, each image as often on average; behind them errors, of broken rows."""
    rows: list[tuple[str, str]] = []
    broken: list[Any] = []
    for row in json_lines(file):
        try:
            if isinstance(row, Exception):
                raise row
            rows.append((f"{int(row['image_id']):012d}.jpg", text_of(row["caption"])))
        except UNUSABLE as error:
            broken.append(error)
    images = [image for image, _ in rows]
    count = Counter(images)
    weights = [1 / count[image] for image in images]
    number = min(MOST, DRAWS_PER_IMAGE * len(count))
    drawn = random.Random(0).choices(range(len(rows)), weights, k=number)
    return [(f"{place}/{images[row]}", *rows[row]) for place, row in enumerate(drawn, start=1)] + broken


FID = (
    Fid("fid", ("captions_val2014.json", "annotations/captions_val2014.json"), _one_each, "val2014"),
    Fid("fid_karpathy", COCO_NAMES, _one_each, "val2014"),
    Fid("fid_ln_coco", ("coco_val_captions.jsonl",), _narratives, "val2017"),
)
