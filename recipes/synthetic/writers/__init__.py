# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Writers of the synthetic world in the real file formats: `FORMATS` names them, `write_formats` calls them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.benchmarks import BENCHMARK_FORMATS, write_easy_vqa
from recipes.synthetic.writers.captions import (
    write_caption_tars,
    write_flickr30k,
    write_image_folder,
    write_karpathy,
    write_narratives,
    write_paragraphs,
    write_textcaps,
)
from recipes.synthetic.writers.chats import write_chats, write_llava
from recipes.synthetic.writers.documents import write_mmc4, write_obelics
from recipes.synthetic.writers.evaluation import write_pope, write_robustvqa
from recipes.synthetic.writers.questions import (
    write_aokvqa,
    write_gqa,
    write_ocrvqa,
    write_okvqa,
    write_textvqa,
    write_vqa,
    write_vqa_rows,
)
from recipes.synthetic.writers.regions import (
    write_captioned_masks,
    write_coco_instances,
    write_object_halves,
    write_osprey,
    write_refcoco,
    write_vcr,
    write_vg,
)

__all__ = [
    "FORMATS",
    "MORE_FORMATS",
    "write_aokvqa",
    "write_caption_tars",
    "write_captioned_masks",
    "write_chats",
    "write_coco_instances",
    "write_easy_vqa",
    "write_flickr30k",
    "write_formats",
    "write_gqa",
    "write_image_folder",
    "write_karpathy",
    "write_llava",
    "write_mmc4",
    "write_narratives",
    "write_object_halves",
    "write_obelics",
    "write_ocrvqa",
    "write_okvqa",
    "write_osprey",
    "write_paragraphs",
    "write_pope",
    "write_refcoco",
    "write_robustvqa",
    "write_textcaps",
    "write_textvqa",
    "write_vcr",
    "write_vg",
    "write_vqa",
    "write_vqa_rows",
]

FORMATS = ("mmc4", "captions", "vqa", "pope", "robustvqa")
MORE_FORMATS = {
    "okvqa": write_okvqa,
    "textvqa": write_textvqa,
    "aokvqa": write_aokvqa,
    "gqa": write_gqa,
    "ocrvqa": write_ocrvqa,
    "easy_vqa": write_easy_vqa,
    "llava": write_llava,
    "karpathy": write_karpathy,
    "flickr30k": write_flickr30k,
    "textcaps": write_textcaps,
    "paragraphs": write_paragraphs,
    "narratives": write_narratives,
    "refcoco": write_refcoco,
    "refcocog": partial(write_refcoco, split_by="umd"),
    "vg": write_vg,
    "coco": write_coco_instances,
    "partimagenet": write_object_halves,
    "pascalpart": partial(write_object_halves, joint=":"),
    "refcoco_masks": write_captioned_masks,
    "refcoco+_masks": partial(write_captioned_masks, kind="refcoco+"),
    "vg_masks": partial(write_captioned_masks, kind="vg"),
    "vcr": write_vcr,
    "osprey": write_osprey,
    "obelics": write_obelics,
    "chats": write_chats,
    "vqa_rows": write_vqa_rows,
    "imagefolder": write_image_folder,
    "imagefolder_rows": partial(write_image_folder, table="jsonl"),
    "csv": partial(write_image_folder, table="csv"),
}


def write_formats(
    folder: str | Path,
    world: World,
    num: int,
    start: int = 0,
    detail: str = "medium",
    formats: Sequence[str] = FORMATS,
) -> None:
    """Write the named formats below `folder`, laid out as `recipes/world.py` says.

    Args:
        num: images per format.
        start: first scene; at least `HELD_OUT` for data to evaluate on.
        detail: of the captions, see `write_caption_tars`.

    Raises:
        ValueError: for an unknown format, or a `num` below 1.
    """
    folder = Path(folder)
    unknown = sorted(set(formats) - set(FORMATS) - set(MORE_FORMATS) - set(BENCHMARK_FORMATS))
    if unknown or not formats:
        known = ", ".join((*FORMATS, *MORE_FORMATS, *BENCHMARK_FORMATS))
        raise ValueError(f"Unknown format(s) {unknown}; give one or more of {known}.")
    for name in formats:
        if name == "mmc4":
            write_mmc4(folder, world, num, start)
        elif name == "captions":
            write_caption_tars(folder / "captions", world, num, start, detail)
        elif name == "vqa":
            write_vqa(folder / "vqa", world, num, start, split="val2014" if start >= HELD_OUT else "train2014")
        elif name == "pope":
            write_pope(folder / "pope", world, num, start)
        elif name == "robustvqa":
            write_robustvqa(folder / "robustvqa", world, num, start)
        else:
            (MORE_FORMATS | BENCHMARK_FORMATS)[name](folder / name, world, num, start)
