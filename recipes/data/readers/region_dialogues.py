# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Dialogues that speak of several marked regions at once: VCR and Osprey-724K.

Files: data_and_evaluation.md section 2.8.
"""

import random
import re
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, LeftOut, Skip
from recipes.data.readers.files import LineReader, load_json, row_name
from recipes.data.readers.masks import vcr_mask
from recipes.data.readers.questions import check_round
from recipes.data.readers.regions import (
    MAX_REGIONS,
    RegionReader,
    check_size,
    region_mask,
    region_sample,
)
from recipes.data.samples import IMAGE, Piece, content, dialogue
from recipes.prompts import DETAIL_REQUEST, REASON_REQUESTS, REGION_INSTRUCTIONS, REGION_NAME


def list_regions(number: int) -> list[Piece]:
    """Return `<ref>region1</ref> <image>, <ref>region2</ref> <image>. ` as pieces of
    a message."""
    pieces: list[Piece] = []
    for index in range(1, number + 1):
        pieces += [REGION_NAME.format(number=index), IMAGE, ", " if index < number else ". "]
    return pieces


class VcrReader(LineReader):
    """VCR's `*.jsonl` (question_orig, answer_orig, rationale_orig, objects, metadata_fn) with `vcr1images`.

    Two rounds: the question with all objects listed and marked, and the reason. A number n in the text becomes
    "<class> at region<n>"; numbers and regions both count from 1 (the release takes the class of number n from 0, so
    that the two disagree). Images with more than `MAX_REGIONS` objects are left out.
    """

    image_folders = ("vcr1images", "")

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue."""
        objects = row["objects"]
        if not isinstance(objects, list):
            raise TypeError("objects are not a list")
        if not 0 < len(objects) <= MAX_REGIONS:
            raise LeftOut(f"no object, or more than {MAX_REGIONS}")
        objects = [self.clean(name) for name in objects]
        question, answer, reason = (
            self._naming(self.clean(row[f"{name}_orig"]), objects, key) for name in ("question", "answer", "rationale")
        )
        for asked, said in ((question, answer), (question, reason)):
            check_round(asked, said, key)
        image = self.image(folder, row["img_fn"], as_stored=True)
        metadata = load_json(self.find(folder, row["metadata_fn"]))
        pairs = zip(metadata["boxes"], metadata["segms"], strict=True)
        masks = [vcr_mask(box, polygons, image.height, image.width) for box, polygons in pairs]
        if len(masks) != len(objects):
            raise BadSample("objects and metadata differ in number", key)
        first = content(IMAGE, f" {REGION_INSTRUCTIONS['phrases']} ", *list_regions(len(masks)), question)
        messages = dialogue((first, answer), (content(rng.choice(REASON_REQUESTS)), reason))
        return region_sample(key, messages, image, masks)

    @staticmethod
    def _naming(text: str, objects: list[str], key: str) -> str:
        def named(match: re.Match[str]) -> str:
            number = int(match[0])
            if not 1 <= number <= len(objects):
                raise BadSample("number of no object", key)
            return f"{objects[number - 1]} at region{number}"

        return re.sub(r"\d+", named, text)


class OspreyReader(RegionReader):
    """Osprey-724K: lists of `{file_name, height, width, annotation: [{segmentation}]}` with `conversations` (turns from
    human and gpt that name `<region1>`, ...) or `description` (one text, or one per region).

    Conversations list all their regions in the first turn and are left out if they have more than `MAX_REGIONS`; of
    descriptions each is a round, at most `MAX_REGIONS` in random order.
    """

    def rows(self, shard: Path) -> list[tuple[str, Any]]:
        """Return one row per image."""
        rows = enumerate(load_json(shard))
        return [(row.get("id", i) if isinstance(row, dict) else row_name(row, "id", i), row) for i, row in rows]

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue."""
        regions = row["annotation"]
        turns = row.get("conversations")
        if turns is not None and len(regions) > MAX_REGIONS:
            raise LeftOut(f"conversation about more than {MAX_REGIONS} regions")
        image = self.image(folder, row["file_name"], as_stored=True)
        check_size(image, row, key)
        masks = [region_mask(region["segmentation"], image, f"{key}/{i}", skip) for i, region in enumerate(regions)]
        if turns is not None:
            if any(mask is None for mask in masks) or not masks:
                raise BadSample("conversation about an unusable region", key)
            first = (IMAGE, f" {REGION_INSTRUCTIONS['phrases']} ", *list_regions(len(masks)))
            return region_sample(key, dialogue(*self._rounds(turns, first, key)), image, masks)
        given = row["description"] if isinstance(row["description"], list) else [row["description"]]
        given = [re.sub(r"^<region\d+>:\s*", "", self.clean(text)) for text in given]
        pairs = [(mask, text) for mask, text in zip(masks, given, strict=True) if mask is not None and text]
        for index, text in enumerate(given):
            if not text:
                skip("region without text", f"{key}/{index}")
        if not pairs:
            raise BadSample("image without a usable region", key)
        rng.shuffle(pairs)
        pairs = pairs[:MAX_REGIONS]
        rounds = []
        for number, (_, text) in enumerate(pairs):
            first = (IMAGE, f" {REGION_INSTRUCTIONS['phrases']} ") if number == 0 else ()
            request = DETAIL_REQUEST
            rounds.append((content(*first, IMAGE, request), text))
        return region_sample(key, dialogue(*rounds), image, [mask for mask, _ in pairs])

    def _rounds(
        self, turns: list[dict[str, str]], first: tuple[Piece, ...], key: str
    ) -> list[tuple[list[dict[str, Any]], str]]:
        said = [re.sub(r"<(region\d+)>", r"\1", self.clean(turn["value"])) for turn in turns]
        if not turns or len(turns) % 2 or any(t["from"] != ("human", "gpt")[i % 2] for i, t in enumerate(turns)):
            raise ValueError("turns of human and gpt must alternate")
        pairs = list(zip(said[::2], said[1::2], strict=True))
        for question, answer in pairs:
            check_round(question, answer, key)
        return [
            (content(*(first if number == 0 else ()), question), answer)
            for number, (question, answer) in enumerate(pairs)
        ]
