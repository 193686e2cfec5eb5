# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""RefCOCO, RefCOCO+, RefCOCOg: where is what a sentence describes (`refcoco_grounding`)?

Files: `<set>_<split>.json`, as refcoco_val.json and refcoco+_testA.json, each a list of {img_id, bbox (x, y, width,
height), sents}; images of COCO's train2014. Every sentence is asked; the release asks a random 400 of each file. The
answer under "deem" is `(x1,y1)(x2,y2)` in 999ths of the image, under "standard" `[x1,y1,x2,y2]` in 0..1, as lmms-eval
asks for it. Right is an overlap of half or more.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.data.samples import IMAGE
from recipes.evaluation.benchmark import Benchmark, Figures, ImageSource, Line, Loaded, Request, Sample
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.benchmarks.shares import line_shares, mean_score, share_figure, unparsed_share
from recipes.evaluation.scoring.grounding import box_iou, center_inside, parse_box, pixel_box
from recipes.evaluation.sources import DataSource, ImageFolders
from recipes.prompts import GROUNDING_ANSWER, GROUNDING_REQUEST

RELATIVE_REQUEST = (
    "\nGive the bounding box of the region that this sentence describes, as [x1, y1, x2, y2] with numbers from 0 to 1 "
    "(left, top, right, bottom): {phrase}"
)
RULES = {"deem": "deem", "standard": "relative"}
OVERLAPS = (1, 3, 5, 7, 9)  # tenths
NAME_LENGTH = 27  # of "COCO_train2014_000000000000", before the number of the annotation
_FILE = re.compile(r"refcoco[+g]?_(val|test[AB]?)\.json")


class Grounding(Benchmark):
    """See the module."""

    name = "refcoco_grounding"
    generation = {
        "deem": {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 1.0, "do_sample": False},
        "standard": {"num_beams": 1, "max_new_tokens": 40, "do_sample": False},
    }

    def load(self, source: DataSource) -> Loaded:
        """Read every file of the folder in which one is found."""
        first = source.need("refcoco_val.json", "refcoco*_*.json")
        files = [file for file in sorted(first.parent.glob("refcoco*.json")) if _FILE.fullmatch(file.name)]
        samples: list[Sample] = []
        rows: dict[Path | str, int] = {}
        for file in files:
            folders = ImageFolders(file.parent, "train2014", "", "images")
            read = read_json(file)
            asked = [(number, place) for number, row in enumerate(read) for place in range(len(_sentences(row)))]
            make = partial(_sample, file.stem, folders, read)
            samples += make_samples(asked, make, f"{file.stem}/row", file.stem)
            rows[file] = len(read)
        return Loaded(samples, rows)

    def request(self, sample: Sample, protocol: str) -> Request:
        """The released request with the beginning of its answer, or one for relative numbers."""
        if protocol == "deem":
            return Request(
                (IMAGE, GROUNDING_REQUEST.format(phrase=sample.asked)), f" {GROUNDING_ANSWER.split('{')[0]}"
            )
        return Request((IMAGE, RELATIVE_REQUEST.format(phrase=sample.asked)))

    def parse(self, raw: str, line: Line) -> list[float] | None:
        """The first box of the answer, x1, y1, x2, y2 in pixels."""
        rule = RULES[line["protocol"]]
        box = parse_box(raw, rule)
        return None if box is None else list(pixel_box(box, *line["about"]["size"], rule))

    def score(self, parsed: list[float] | None, line: Line) -> float:
        """1 for an overlap of half or more."""
        return float(_overlap(parsed, line) >= 0.5)

    def figures(self, lines: Sequence[Line]) -> Figures:
        """Accuracy of all and of each file, mean overlap, accuracy at other overlaps, centers inside."""
        clusters = [line["cluster"] for line in lines]
        overlaps = [_overlap(line["parsed"], line) for line in lines]
        centers = [line["parsed"] is not None and center_inside(line["parsed"], line["truth"]) for line in lines]
        figures = {"accuracy": mean_score(lines), "iou": share_figure(overlaps, clusters)}
        figures |= {"center_accuracy": share_figure(centers, clusters), "unparsed": unparsed_share(lines)}
        for tenth in OVERLAPS:
            figures[f"accuracy_at_0.{tenth}"] = share_figure([one >= tenth / 10 for one in overlaps], clusters)
        return figures | line_shares(lines, None, lambda line: line["group"])


def _overlap(box: Sequence[float] | None, line: Line) -> float:
    return 0.0 if box is None or line["truth"] is None else box_iou(tuple(box), tuple(line["truth"]))  # type: ignore[arg-type]


def _sentences(row: Any) -> Sequence[Any]:
    """Return the sentences of a row; one that fails later where the row has none."""
    found = row.get("sents") if isinstance(row, dict) else None
    return found if isinstance(found, list) and found else [None]


def _sample(name: str, folders: ImageFolders, rows: Sequence[Any], number: int, asked: tuple[int, int]) -> Sample:
    index, place = asked
    row = rows[index]
    image = f"{text_of(row['img_id'])[:NAME_LENGTH]}.jpg"
    where = folders.find(image)
    x, y, width, height = map(float, row["bbox"])
    if width <= 0 or height <= 0:
        raise ValueError(f"a box of {width} x {height} pixels")
    return Sample(
        f"{name}/{index + 1}/{place + 1}",
        (ImageSource(image, where, as_stored=True),),
        text_of(_sentences(row)[place]),
        [x, y, x + width, y + height],
        cluster=image,
        group=name,
        about={"size": _size(row, where)},
    )


def _size(row: dict[str, Any], where: Path) -> list[int]:
    """Return an image's width and height, of the row or else of the file's header; 1 x 1 where it cannot be read, which
    fails where the image is opened."""
    if row.get("width") and row.get("height"):
        return [int(row["width"]), int(row["height"])]
    try:
        with Image.open(where) as image:
            return list(image.size)
    except OSError:
        return [1, 1]
