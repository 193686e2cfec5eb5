# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write images of the synthetic world, whose truth is known, with text about them, in the real file formats.

    python recipes/world.py --out DIR --num 2000 --size 64 --formats mmc4,captions,vqa,pope,robustvqa

writes below DIR, `--num` images per format:

    mmc4_annts/*.jsonl + mmc4_images/      interleaved documents (MMC4)
    captions/00000.tar ...                 image + caption pairs (WebDataset as img2dataset writes it)
    vqa/                                   questions and ten answers each (VQAv2)
    pope/                                  presence questions (POPE, three kinds of negatives)
    robustvqa/                             main object or not (RobustVQA)

and, where they are named, the formats of the other stages, each in a folder of its name: questions (okvqa, textvqa,
aokvqa, gqa, ocrvqa, easy_vqa, llava), captions (karpathy, flickr30k, textcaps, paragraphs, narratives), boxes
(refcoco, refcocog, vg), region masks (coco, partimagenet, pascalpart, refcoco_masks, refcoco+_masks, vg_masks, vcr,
osprey), rows of `datasets` (obelics, chats, vqa_rows), and folders of images (imagefolder, imagefolder_rows with
metadata.jsonl, csv); files of benchmarks alone (mmvp, vizwiz, coco_captions, nocaps, flickr30k_test, textcaps_val, refcoco_grounding,
refcocog_region, ln_coco, visdial, mmvp_vlm).

Each folder also holds `truth.jsonl`: per image everything that is known about it. The world itself is described in
`recipes/synthetic/scenes.py`.
"""

import argparse
from pathlib import Path

from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import DETAILS, HELD_OUT
from recipes.synthetic.writers import BENCHMARK_FORMATS, FORMATS, MORE_FORMATS, write_formats


def main() -> None:
    """Write the formats asked for and say where."""
    parser = argparse.ArgumentParser(description="Writes images of the synthetic world in the real file formats.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into, made where it is missing")
    parser.add_argument("--num", type=int, default=2000, help="images per format (2000)")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (64)")
    parser.add_argument("--seed", type=int, default=0, help="which world (0)")
    parser.add_argument("--start", type=int, help="first scene; without it 0, or HELD_OUT with --held_out")
    parser.add_argument("--held_out", action="store_true", help=f"images for evaluation: scenes from {HELD_OUT} on")
    parser.add_argument("--shifted", action="store_true", help="the out-of-distribution variant")
    parser.add_argument("--detail", default="medium", choices=(*DETAILS, "mixed"), help="of the captions (medium)")
    parser.add_argument(
        "--formats",
        default=",".join(FORMATS),
        help=f"comma-separated ({','.join(FORMATS)}); also {', '.join([*MORE_FORMATS, *BENCHMARK_FORMATS])}",
    )
    args = parser.parse_args()
    start = args.start if args.start is not None else HELD_OUT * args.held_out
    formats = [name.strip() for name in args.formats.split(",")]
    try:
        write_formats(args.out, World(args.seed, args.size, args.shifted), args.num, start, args.detail, formats)
    except ValueError as error:
        parser.error(str(error))
    print(f"Wrote {args.num} images of {args.size} px per format ({args.formats}) below {args.out}")


if __name__ == "__main__":
    main()
