# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write questions and answers about images in the files of VQAv2 and its relatives."""

import json
from pathlib import Path

from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import pick
from recipes.synthetic.writers.files import jpeg, numbered_scenes, ten_answers, write_coco_images, write_images
from recipes.synthetic.writers.tables import write_parquet


def write_vqa(folder: str | Path, world: World, num: int, start: int = 0, split: str = "train2014") -> None:
    """Write VQAv2's files.

    `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json` and images
    `{split}/COCO_{split}_%012d.jpg`. Every question of `Scene.questions` has ten answers, of which two use another word
    where there is one (big for large); the truth is `multiple_choice_answer`. Attributes stand in truth.jsonl, in the
    order of the questions.

    Raises:
        ValueError: for a split other than train2014 and val2014.
    """
    if split not in ("train2014", "val2014"):
        raise ValueError(f"split={split!r} is not one of VQAv2's. Use train2014 or val2014.")
    folder, questions, annotations = Path(folder), [], []
    for image_id, _, scene in write_coco_images(folder, numbered_scenes(world, num, start, "vqa"), split):
        for number, asked in enumerate(scene.questions()):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            answer = asked["answer"]
            answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
            questions.append(ids | {"question": asked["question"]})
            annotations.append(
                ids
                | {
                    "question_type": " ".join(asked["question"].lower().split()[:2]),
                    "answer_type": answer_type,
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer": given, "answer_confidence": "yes", "answer_id": i}
                        for i, given in enumerate(ten_answers(answer), start=1)
                    ],
                }
            )
    about = {"info": {"description": "synthetic world"}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    asked = about | {"task_type": "Open-Ended", "questions": questions}
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(asked))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(about | {"annotations": annotations}))


def write_okvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write OK-VQA, whose annotations name no most frequent answer.

    `OpenEnded_mscoco_train2014_questions.json`, `mscoco_train2014_annotations.json` and
    `train2014/COCO_train2014_%012d.jpg`.
    """
    folder, questions, annotations = Path(folder), [], []
    names = "train2014/COCO_train2014_{:012d}.jpg".format
    for image_id, scene in write_images(folder, world, num, start, "okvqa", names):
        for number, asked in enumerate(scene.questions()):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            questions.append(ids | {"question": asked["question"]})
            given = enumerate(ten_answers(asked["answer"]), start=1)
            answers = [{"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in given]
            annotations.append(ids | {"question_type": "one", "answer_type": "other", "answers": answers})
    (folder / "OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": annotations}))


def write_textvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write TextVQA: `TextVQA_0.5.1_train.json` and `train_images/<image_id>.jpg`."""
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "textvqa", "train_images/{:016x}.jpg".format):
        for asked in scene.questions():
            row = {"image_id": f"{image_id:016x}", "question_id": len(rows), "question": asked["question"]}
            rows.append(row | {"answers": ten_answers(asked["answer"]), "set_name": "train"})
    (folder / "TextVQA_0.5.1_train.json").write_text(json.dumps({"dataset_type": "train", "data": rows}))


def write_aokvqa(folder: str | Path, world: World, num: int, start: int = 0, with_image: bool = False) -> None:
    """Write A-OKVQA: `aokvqa_v1p0_train.json` and `train2017/%012d.jpg`.

    `with_image` adds the path of the image that later copies have.
    """
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "aokvqa", "train2017/{:012d}.jpg".format):
        for number, asked in enumerate(scene.questions()):
            row = {"split": "train", "image_id": image_id, "question_id": f"q{image_id}_{number}"}
            row |= {"question": asked["question"], "direct_answers": ten_answers(asked["answer"])}
            rows.append(row | ({"image": f"train2017/{image_id:012d}.jpg"} if with_image else {}))
    (folder / "aokvqa_v1p0_train.json").write_text(json.dumps(rows))


def write_gqa(folder: str | Path, world: World, num: int, start: int = 0, as_list: bool = False) -> None:
    """Write GQA: `train_balanced_questions.json` and `images/<imageId>.jpg`.

    The questions are a dict by question id or, with `as_list`, the list of later copies.
    """
    folder, rows = Path(folder), {}
    for image_id, scene in write_images(folder, world, num, start, "gqa", "images/{}.jpg".format):
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
    """Write OCR-VQA: `dataset.json` and `images/<id>.jpg`; every fifth book is of the validation split."""
    folder, rows = Path(folder), {}
    for image_id, scene in write_images(folder, world, num, start, "ocrvqa", "images/{:010d}.jpg".format):
        asked = scene.questions()
        rows[f"{image_id:010d}"] = {
            "imageURL": f"http://images.example/{image_id}.jpg",
            "questions": [row["question"] for row in asked],
            "answers": [row["answer"] for row in asked],
            "title": scene.caption("coarse"),
            "split": 2 if image_id % 5 == 0 else 1,
        }
    (folder / "dataset.json").write_text(json.dumps(rows))


def write_vqa_rows(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write questions as lmms-lab's copies on the Hub have them: rows of `image`, `question`, `answers`, parquet."""
    rows = []
    for scene in numbered_scenes(world, num, start, "vqa rows"):
        asked = pick(world.rng(scene.index, "vqa rows"), scene.questions())
        answers = [{"answer": answer, "answer_id": i} for i, answer in enumerate(ten_answers(asked["answer"]))]
        image = {"bytes": jpeg(scene.image), "path": None}
        rows.append({"image": image, "question": asked["question"], "answers": answers})
    write_parquet(Path(folder), rows)
