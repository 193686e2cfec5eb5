# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Writers of the formats of the question, caption and chat sets, and of rows as `datasets` stores them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipes.synthetic.formats import jpeg, numbered_scenes, write_lines
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import SYNONYMS, pick


def write_pictures(
    folder: Path, world: World, num: int, start: int, what: str, name_of: Callable[[int], str]
) -> Iterator[tuple[int, Scene]]:
    """Writes pictures as `folder / name_of(number)` and their truth; yields (number from 1, scene)."""
    truth = []
    for number, scene in enumerate(numbered_scenes(world, num, start, what), start=1):
        file = folder / name_of(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(scene.image))
        truth.append(scene.truth(file=name_of(number), image_id=number))
        yield number, scene
    write_lines(folder / "truth.jsonl", truth)


def ten_answers(answer: str) -> list[str]:
    """Eight people's answer, and another word of two where there is one."""
    return [answer] * 8 + [SYNONYMS.get(answer, answer)] * 2


# ---- questions ----


def write_okvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """OK-VQA: `OpenEnded_mscoco_train2014_questions.json`, `mscoco_train2014_annotations.json` (no most frequent answer)
    and `train2014/COCO_train2014_%012d.jpg`."""
    folder, questions, annotations = Path(folder), [], []
    names = "train2014/COCO_train2014_{:012d}.jpg".format
    for image_id, scene in write_pictures(folder, world, num, start, "okvqa", names):
        for number, asked in enumerate(scene.questions()):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append(ids | {"question": asked["question"]})
            given = enumerate(ten_answers(asked["answer"]), start=1)
            answers = [{"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in given]
            annotations.append(ids | {"question_type": "one", "answer_type": "other", "answers": answers})
    (folder / "OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def write_textvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """TextVQA: `TextVQA_0.5.1_train.json` and `train_images/<image_id>.jpg`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_pictures(folder, world, num, start, "textvqa", "train_images/{:016x}.jpg".format):
        for asked in scene.questions():
            row = {"image_id": f"{image_id:016x}", "question_id": len(rows), "question": asked["question"]}
            rows.append(row | {"answers": ten_answers(asked["answer"]), "set_name": "train"})
    (folder / "TextVQA_0.5.1_train.json").write_text(json.dumps({"dataset_type": "train", "data": rows}))


def write_aokvqa(folder: str | Path, world: World, num: int, start: int = 0, with_image: bool = False) -> None:
    """A-OKVQA: `aokvqa_v1p0_train.json` and `train2017/%012d.jpg`; `with_image` adds the path that later copies have."""
    folder, rows = Path(folder), []
    for image_id, scene in write_pictures(folder, world, num, start, "aokvqa", "train2017/{:012d}.jpg".format):
        for number, asked in enumerate(scene.questions()):
            row = {"split": "train", "image_id": image_id, "question_id": f"q{image_id}_{number}"}
            row |= {"question": asked["question"], "direct_answers": ten_answers(asked["answer"])}
            rows.append(row | ({"image": f"train2017/{image_id:012d}.jpg"} if with_image else {}))
    (folder / "aokvqa_v1p0_train.json").write_text(json.dumps(rows))


def write_gqa(folder: str | Path, world: World, num: int, start: int = 0, as_list: bool = False) -> None:
    """GQA: `train_balanced_questions.json` and `images/<imageId>.jpg`; a dict by question id, or the list of later copies."""
    folder, rows = Path(folder), {}
    for image_id, scene in write_pictures(folder, world, num, start, "gqa", "images/{}.jpg".format):
        for asked in scene.questions():
            rows[f"{len(rows):08d}"] = {
                "imageId": str(image_id),
                "question": asked["question"],
                "answer": asked["answer"],
                "fullAnswer": f"The answer is {asked['answer']}.",
                "isBalanced": True,
            }
    listed = [
        {"question_id": key, "image": f"{row['imageId']}.jpg", "question": row["question"], "answer": row["answer"]}
        for key, row in rows.items()
    ]
    (folder / "train_balanced_questions.json").write_text(json.dumps(listed if as_list else rows))


def write_ocrvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """OCR-VQA: `dataset.json` and `images/<id>.jpg`; every fifth book is of the validation split."""
    folder, rows = Path(folder), {}
    for image_id, scene in write_pictures(folder, world, num, start, "ocrvqa", "images/{:010d}.jpg".format):
        asked = scene.questions()
        rows[f"{image_id:010d}"] = {
            "imageURL": f"http://images.example/{image_id}.jpg",
            "questions": [row["question"] for row in asked],
            "answers": [row["answer"] for row in asked],
            "title": scene.caption("coarse"),
            "split": 2 if image_id % 5 == 0 else 1,
        }
    (folder / "dataset.json").write_text(json.dumps(rows))


def write_llava(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """LLaVA: `llava_v1_5_mix665k.json` and `coco/train2017/%012d.jpg`; ids are text or numbers, every fourth record has no
    picture, the placeholder stands before or behind the first question."""
    folder, rows = Path(folder), []
    for image_id, scene in write_pictures(folder, world, num, start, "llava", "coco/train2017/{:012d}.jpg".format):
        turns = []
        for number, asked in enumerate(scene.questions()[:3]):
            first = f"<image>\n{asked['question']}" if image_id % 2 else f"{asked['question']}\n<image>"
            turns.append({"from": "human", "value": first if number == 0 else asked["question"]})
            turns.append({"from": "gpt", "value": asked["answer"]})
        name = f"{image_id:012d}" if image_id % 2 else image_id
        rows.append({"id": name, "image": f"coco/train2017/{image_id:012d}.jpg", "conversations": turns})
        if image_id % 4 == 0:
            told = [{"from": "human", "value": "Say a color."}, {"from": "gpt", "value": scene.main.color}]
            rows.append({"id": f"text{image_id}", "conversations": told})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))


# ---- captions ----


def write_karpathy(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """COCO in BLIP's files: `annotations/coco_karpathy_train.json` (a caption per row), `annotations/coco_karpathy_val.json`
    (all captions in one), `train2014/` and, for every fifth picture, `val2014/` (restval)."""
    folder, rows, lists = Path(folder), [], []

    def name_of(number: int) -> str:
        split = "val2014" if number % 5 == 0 else "train2014"
        return f"{split}/COCO_{split}_{number:012d}.jpg"

    for image_id, scene in write_pictures(folder, world, num, start, "karpathy", name_of):
        captions = [scene.caption(detail).capitalize() for detail in ("coarse", "medium", "full")]
        rows += [{"image": name_of(image_id), "caption": said, "image_id": f"coco_{image_id}"} for said in captions]
        lists.append({"image": name_of(image_id), "caption": captions})
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "coco_karpathy_train.json").write_text(json.dumps(rows))
    (folder / "annotations" / "coco_karpathy_val.json").write_text(json.dumps(lists))


def write_flickr30k(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Flickr30k: `groundedcaption.json`, `flickr30k_test1k.json` (every fifth picture) and `flickr30k-images/<id>.jpg`."""
    folder, rows, tested = Path(folder), [], []
    for image_id, scene in write_pictures(folder, world, num, start, "flickr30k", "flickr30k-images/{}.jpg".format):
        rows.append({"image_id": str(image_id), "detailed_caption": scene.caption("full").capitalize()})
        if image_id % 5 == 0:
            tested.append({"file_name": f"{image_id}.jpg", "id": image_id})
    (folder / "groundedcaption.json").write_text(json.dumps(rows))
    (folder / "flickr30k_test1k.json").write_text(json.dumps({"images": tested}))


def write_textcaps(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """TextCaps: `TextCaps_0.1_train.json` and `train_images/<image_id>.jpg`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_pictures(folder, world, num, start, "textcaps", "train_images/{:016x}.jpg".format):
        said = scene.caption().capitalize()
        rows.append(
            {"image_id": f"{image_id:016x}", "caption_str": said, "caption_id": len(rows), "set_name": "train"}
        )
    (folder / "TextCaps_0.1_train.json").write_text(json.dumps({"dataset_type": "train", "data": rows}))


def write_paragraphs(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Image2Paragraph: `paragraphs_coco.json`, `train_split.json` (not every fifth) and `VG_100K(_2)/<id>.jpg`."""
    folder, rows = Path(folder), []

    def name_of(number: int) -> str:
        return f"{'VG_100K_2' if number % 2 == 0 else 'VG_100K'}/{number}.jpg"

    for image_id, scene in write_pictures(folder, world, num, start, "paragraphs", name_of):
        told = f"There is {scene.caption('full')}. The main object is a {scene.main.kind}."
        rows.append({"image_id": image_id, "url": f"https://vg.example/{name_of(image_id)}", "caption": told})
    (folder / "paragraphs_coco.json").write_text(json.dumps({"annotations": rows}))
    (folder / "train_split.json").write_text(json.dumps([row["image_id"] for row in rows if row["image_id"] % 5]))


def write_narratives(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Localized Narratives: `coco_train_captions.jsonl` and `train2017/%012d.jpg`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_pictures(folder, world, num, start, "narratives", "train2017/{:012d}.jpg".format):
        told = f"In this image we can see {scene.caption('full')}."
        rows.append({"dataset_id": "mscoco_train2017", "image_id": str(image_id), "annotator_id": 7, "caption": told})
    write_lines(folder / "coco_train_captions.jsonl", rows)


# ---- rows of datasets ----


def write_obelics(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Interleaved documents as rows of `images` and `texts`, `data/train-00000-of-00002.parquet` and one more."""
    rows, end = [], start
    for scene in numbered_scenes(world, num, start, "obelics"):
        if scene.index < end:
            continue  # part of the document before
        document = world.document(scene.index, max_pictures=min(4, start + num - scene.index))
        end = scene.index + len(document.scenes)
        images: list[Any] = []
        texts: list[Any] = []
        for index, sentence in enumerate(document.text_list):
            for place, shown in zip(document.matched_text_index, document.scenes, strict=True):
                if place == index:
                    images.append({"bytes": jpeg(shown.image), "path": None})
                    texts.append(None)
            images.append(None)
            texts.append(sentence)
        rows.append({"images": images, "texts": texts})
    _write_parquet(Path(folder), rows)


def write_chats(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Chats as rows of `messages` and `images`, as TRL takes them: parts of text and image, parquet."""
    rows = []
    for scene in numbered_scenes(world, num, start, "chats"):
        turns = []
        for number, asked in enumerate(scene.questions()[:2]):
            parts = [{"type": "text", "text": asked["question"]}]
            turns.append(
                {"role": "user", "content": [{"type": "image", "text": None}, *parts] if number == 0 else parts}
            )
            turns.append({"role": "assistant", "content": [{"type": "text", "text": asked["answer"]}]})
        rows.append({"messages": turns, "images": [{"bytes": jpeg(scene.image), "path": None}]})
    _write_parquet(Path(folder), rows)


def write_vqa_rows(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Questions as lmms-lab's copies on the Hub have them: rows of `image`, `question`, `answers`, parquet."""
    rows = []
    for scene in numbered_scenes(world, num, start, "vqa rows"):
        asked = pick(world._rng(scene.index, "vqa rows"), scene.questions())
        answers = [{"answer": answer, "answer_id": i} for i, answer in enumerate(ten_answers(asked["answer"]))]
        picture = {"bytes": jpeg(scene.image), "path": None}
        rows.append({"image": picture, "question": asked["question"], "answers": answers})
    _write_parquet(Path(folder), rows)


def _write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    import datasets  # takes seconds to import, and only these formats need it

    (folder / "data").mkdir(parents=True, exist_ok=True)
    image = datasets.Image()
    dataset = datasets.Dataset.from_list(rows)
    column = "images" if "images" in rows[0] else "image"
    dataset = dataset.cast_column(column, datasets.List(image) if column == "images" else image)
    number = 2 if len(dataset) > 1 else 1
    for index in range(number):
        shard = dataset.shard(num_shards=number, index=index, contiguous=True)
        shard.to_parquet(folder / "data" / f"train-{index:05d}-of-{number:05d}.parquet")
