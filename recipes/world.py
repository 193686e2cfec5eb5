# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The synthetic world: seeded, procedural pictures whose truth is known, with text about them, in the real file formats.

A picture (`Scene`) shows one large *main* object and up to three small ones on a low-saturation background. Everything
said about it (captions, documents, questions, region masks) is derived from the same numbers that draw it. A scene is a
function of `(seed, shifted, index)` alone; `size` only changes the number of pixels it is drawn with.

Splits: scenes `0 ... HELD_OUT - 1` are for training, scenes from `HELD_OUT` on are for evaluation.
Shift: `World(shifted=True)` has other textures, tinted backgrounds, strayed colors and pixel noise, and half of its main
objects are combinations of kind and color (`UNSEEN`) that the unshifted world never shows.

    python recipes/world.py --out DIR --num 2000 --size 64 --formats mmc4,captions,vqa,pope,robustvqa

writes below DIR, `--num` pictures per format:

    mmc4_annts/*.jsonl + mmc4_images/      interleaved documents (MMC4)
    captions/00000.tar ...                 picture + caption pairs (WebDataset as img2dataset writes it)
    vqa/                                   questions and ten answers each (VQAv2)
    pope/                                  presence questions (POPE, three kinds of negatives)
    robustvqa/                             main object or not (RobustVQA)

and, where they are named, the formats of the other stages (`MORE_FORMATS`), each in a folder of its name: questions (okvqa,
textvqa, aokvqa, gqa, ocrvqa, llava), captions (karpathy, flickr30k, textcaps, paragraphs, narratives), boxes (refcoco,
refcocog, vg), region masks (coco, partimagenet, pascalpart, refcoco_masks, refcoco+_masks, vg_masks, vcr, osprey) and rows of
`datasets` (obelics, chats, vqa_rows).

Each folder also holds `truth.jsonl`: per picture everything that is known about it.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.synthetic import regions, texts
from recipes.synthetic.formats import write_caption_tars, write_mmc4, write_pope, write_robustvqa, write_vqa
from recipes.synthetic.scenes import Document, Scene, SceneObject, World
from recipes.synthetic.vocabulary import (
    COLORS,
    DETAILS,
    HELD_OUT,
    KINDS,
    UNSEEN,
    dominant_color,
    first_color,
    first_kind,
)

__all__ = [
    "COLORS",
    "DETAILS",
    "FORMATS",
    "HELD_OUT",
    "KINDS",
    "MORE_FORMATS",
    "UNSEEN",
    "Document",
    "Scene",
    "SceneObject",
    "World",
    "dominant_color",
    "first_color",
    "first_kind",
    "write_caption_tars",
    "write_formats",
    "write_mmc4",
    "write_pope",
    "write_robustvqa",
    "write_vqa",
]

FORMATS = ("mmc4", "captions", "vqa", "pope", "robustvqa")
MORE_FORMATS = {
    "okvqa": texts.write_okvqa,
    "textvqa": texts.write_textvqa,
    "aokvqa": texts.write_aokvqa,
    "gqa": texts.write_gqa,
    "ocrvqa": texts.write_ocrvqa,
    "llava": texts.write_llava,
    "karpathy": texts.write_karpathy,
    "flickr30k": texts.write_flickr30k,
    "textcaps": texts.write_textcaps,
    "paragraphs": texts.write_paragraphs,
    "narratives": texts.write_narratives,
    "refcoco": regions.write_refcoco,
    "refcocog": partial(regions.write_refcoco, split_by="umd"),
    "vg": regions.write_vg,
    "coco": regions.write_coco_instances,
    "partimagenet": regions.write_parts,
    "pascalpart": partial(regions.write_parts, joint=":"),
    "refcoco_masks": regions.write_captioned_masks,
    "refcoco+_masks": partial(regions.write_captioned_masks, kind="refcoco+"),
    "vg_masks": partial(regions.write_captioned_masks, kind="vg"),
    "vcr": regions.write_vcr,
    "osprey": regions.write_osprey,
    "obelics": texts.write_obelics,
    "chats": texts.write_chats,
    "vqa_rows": texts.write_vqa_rows,
}


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
    unknown = sorted(set(formats) - set(FORMATS) - set(MORE_FORMATS))
    if unknown or not formats:
        known = ", ".join((*FORMATS, *MORE_FORMATS))
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
            MORE_FORMATS[name](folder / name, world, num, start)


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
    parser.add_argument(
        "--formats",
        default=",".join(FORMATS),
        help=f"comma-separated ({','.join(FORMATS)}); also {', '.join(MORE_FORMATS)}",
    )
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
