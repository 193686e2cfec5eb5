# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""RefCOCOg: describe the marked region (`refcocog_region`).

File: `finetune_refcocog_val_with_mask.json` in COCO's form, the caption, its only reference, in the image record; images
of COCO's train2014. Regions are marked by their true masks, which only DEEM reads. Protocol: section 3.10 of
data_and_evaluation.md; the prompt is that of the region stage, without the end token that the release has in it.
"""

import re
from typing import Any

from recipes.data.samples import IMAGE
from recipes.evaluation.benchmark import ImageSource, Line, Loaded, Request, Sample
from recipes.evaluation.benchmarks.captions import Captions
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.sources import DataSource, ImageFolders
from recipes.prompts import REGION_INSTRUCTIONS

_MARKERS = re.compile(r"#|user:|ass?istant:", re.IGNORECASE)  # what the release takes out of descriptions


class RegionCaptions(Captions):
    """See the module."""

    takes_regions = True
    generation = {
        name: {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 1.0, "do_sample": False}
        for name in ("deem", "standard")
    }

    def __init__(self) -> None:
        patterns = ("finetune_refcocog_val_with_mask.json", "finetune_refcocog_*_with_mask.json")
        super().__init__("refcocog_region", patterns, ("train2014", "train2017"))

    def load(self, source: DataSource) -> Loaded:
        """Read each region with its image."""
        file = source.need(*self.patterns)
        read = read_json(file)
        folders = ImageFolders(file.parent, *self.folders, "", "images")
        images = {row["id"]: row for row in read["images"]}

        def sample(number: int, row: Any) -> Sample:
            about = images[row["image_id"]]
            name = text_of(about["file_name"])
            where = folders.find(name)
            whole = ImageSource(name, where, as_stored=True)
            region = ImageSource(name, where, row["segmentation"], as_stored=True)
            if not row["segmentation"]:
                raise ValueError("a region without a mask")
            caption = text_of(about.get("caption") or row["caption"])
            return Sample(str(row["id"]), (whole, region), "", [caption], name)

        rows = make_samples(read["annotations"], sample, "row")
        return Loaded(rows, {file: len(rows)})

    def request(self, sample: Sample, protocol: str) -> Request:
        """The image, what is asked, and the region."""
        return Request((IMAGE, f" {REGION_INSTRUCTIONS['refcoco']} ", IMAGE))

    def parse(self, raw: str, line: Line) -> str:
        """The description without the markers of a dialogue."""
        return " ".join(_MARKERS.sub(" ", raw).split())
