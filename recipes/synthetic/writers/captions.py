# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write captioned images: tars of img2dataset, and the files of COCO, Flickr30k, TextCaps and others."""

import csv
import io
import json
import tarfile
from pathlib import Path

from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import DETAILS, pick
from recipes.synthetic.writers.documents import image_name
from recipes.synthetic.writers.files import jpeg, numbered_scenes, write_images, write_lines
from recipes.synthetic.writers.objects import visual_genome_name


def write_caption_tars(
    folder: str | Path, world: World, num: int, start: int = 0, detail: str = "medium", per_tar: int = 1000
) -> None:
    """Write WebDataset shards `00000.tar`, `00001.tar`, ... of `per_tar` images each, as img2dataset does.

    Members: `{key}.jpg`, `{key}.json` (caption, url, key, status, width, height), `{key}.txt`. `detail` is one of
    `Scene.caption`, or "mixed".
    """
    folder, truth = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    tar = None
    try:
        for number, scene in enumerate(numbered_scenes(world, num, start, "captions")):
            shard, place = divmod(number, per_tar)
            if place == 0:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w")
            key = f"{shard:05d}{place:04d}"
            caption = scene.caption(pick(world.rng(scene.index, "detail"), DETAILS) if detail == "mixed" else detail)
            side = {"caption": caption, "url": f"https://world.example/{image_name(scene)}", "key": key}
            side |= {"status": "success", "width": world.size, "height": world.size}
            parts = {"jpg": jpeg(scene.image), "json": json.dumps(side).encode(), "txt": caption.encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            truth.append(scene.truth(file=f"{shard:05d}.tar/{key}.jpg", caption=caption))
    finally:
        if tar is not None:
            tar.close()
    write_lines(folder / "truth.jsonl", truth)


def write_image_folder(folder: str | Path, world: World, num: int, start: int = 0, table: str | None = None) -> None:
    """Write a folder of images as people have it: `images/` in sub-folders named by the main object's kind, or with a table
    of captions beside.

    Args:
        table: `"jsonl"` (`metadata.jsonl` of file_name and text, as `datasets` has it) or `"csv"` (`captions.csv` of image and
            caption); None for sub-folders.
    """
    folder, rows = Path(folder), []

    def name_of(number: int) -> str:
        kind = "" if table else world.scene(start + number - 1).main.kind.replace(" ", "_") + "/"
        return f"images/{kind}{number:05d}.jpg"

    for number, scene in write_images(folder, world, num, start, "image folder", name_of):
        rows.append((name_of(number), scene.caption("medium")))
    if table == "jsonl":
        write_lines(folder / "metadata.jsonl", [{"file_name": name, "text": caption} for name, caption in rows])
    elif table == "csv":
        with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "caption"), *rows])


def write_karpathy(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write COCO in BLIP's files.

    `annotations/coco_karpathy_train.json` (a caption per row), `annotations/coco_karpathy_val.json` (all captions of an
    image in one row), images in `train2014/` and, every fifth, in `val2014/` (restval).
    """
    folder, rows, lists = Path(folder), [], []

    def name_of(number: int) -> str:
        split = "val2014" if number % 5 == 0 else "train2014"
        return f"{split}/COCO_{split}_{number:012d}.jpg"

    for image_id, scene in write_images(folder, world, num, start, "karpathy", name_of):
        captions = [scene.caption(detail).capitalize() for detail in ("coarse", "medium", "full")]
        rows += [{"image": name_of(image_id), "caption": said, "image_id": f"coco_{image_id}"} for said in captions]
        lists.append({"image": name_of(image_id), "caption": captions})
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "coco_karpathy_train.json").write_text(json.dumps(rows))
    (folder / "annotations" / "coco_karpathy_val.json").write_text(json.dumps(lists))


def write_flickr30k(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write Flickr30k: `groundedcaption.json`, `flickr30k_test1k.json` (every fifth image) and `flickr30k-images/<id>.jpg`."""
    folder, rows, tested = Path(folder), [], []
    for image_id, scene in write_images(folder, world, num, start, "flickr30k", "flickr30k-images/{}.jpg".format):
        rows.append({"image_id": str(image_id), "detailed_caption": scene.caption("full").capitalize()})
        if image_id % 5 == 0:
            tested.append({"file_name": f"{image_id}.jpg", "id": image_id})
    (folder / "groundedcaption.json").write_text(json.dumps(rows))
    (folder / "flickr30k_test1k.json").write_text(json.dumps({"images": tested}))


def write_textcaps(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write TextCaps: `TextCaps_0.1_train.json` and `train_images/<image_id>.jpg`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "textcaps", "train_images/{:016x}.jpg".format):
        said = scene.caption().capitalize()
        rows.append(
            {"image_id": f"{image_id:016x}", "caption_str": said, "caption_id": len(rows), "set_name": "train"}
        )
    (folder / "TextCaps_0.1_train.json").write_text(json.dumps({"dataset_type": "train", "data": rows}))


def write_paragraphs(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write Image2Paragraph: `paragraphs_coco.json`, `train_split.json` (not every fifth) and `VG_100K(_2)/<id>.jpg`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "paragraphs", visual_genome_name):
        told = f"There is {scene.caption('full')}. The main object is a {scene.main.kind}."
        rows.append(
            {"image_id": image_id, "url": f"https://vg.example/{visual_genome_name(image_id)}", "caption": told}
        )
    (folder / "paragraphs_coco.json").write_text(json.dumps({"annotations": rows}))
    (folder / "train_split.json").write_text(json.dumps([row["image_id"] for row in rows if row["image_id"] % 5]))


def write_narratives(folder: str | Path, world: World, num: int, start: int = 0, split: str = "train2017") -> None:
    """Write Localized Narratives: `coco_train_captions.jsonl` and `train2017/%012d.jpg`, or those of `split`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "narratives", f"{split}/{{:012d}}.jpg".format):
        told = f"In this image we can see {scene.caption('full')}."
        rows.append({"dataset_id": f"mscoco_{split}", "image_id": str(image_id), "annotator_id": 7, "caption": told})
    write_lines(folder / f"coco_{split[:-4]}_captions.jsonl", rows)
