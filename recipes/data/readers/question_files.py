# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Questions in other files than VQAv2's: TextVQA, A-OKVQA, GQA, OCR-VQA, Easy-VQA.

Files: data_and_evaluation.md section 2.5. Each question is a dialogue of one round, as in `questions`.
"""

import random
from abc import abstractmethod
from pathlib import Path
from typing import Any

from recipes.data.faults import Skip
from recipes.data.readers.files import RowReader, load_json, row_name
from recipes.data.readers.questions import check_round, question_messages, read_answers
from recipes.prompts import ONE_WORD_REQUEST


class QuestionFileReader(RowReader):
    """Rows of one image, one question and its answers, of which one is drawn: those that more people gave more often.

    Args:
        shards, image_token, reserved: see `AnnotationReader`.
        request_probability: share of questions that end in `ONE_WORD_REQUEST`.
    """

    def __init__(
        self,
        shards: list[Path],
        image_token: str = "<image>",
        reserved: tuple[str, ...] = (),
        request_probability: float = 0.5,
    ) -> None:
        super().__init__(shards, image_token, reserved)
        self.request_probability = request_probability

    @abstractmethod
    def question(self, row: Any) -> tuple[str, Any, list[str]]:
        """Return question, answers (see `read_answers`), and the names its image may have."""

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue."""
        question, given, names = self.question(row)
        question = self.clean(question)
        answers = [answer for said in read_answers(given) if (answer := self.clean(said))]
        answer = rng.choice(answers) if answers else None
        check_round(question, answer, key)
        if rng.random() < self.request_probability:
            question += ONE_WORD_REQUEST
        image = self.image(folder, *names)
        return {
            "messages": question_messages(question, answer),
            "images": [image],
            "mode": "image_to_text",
            "id": key,
        }


class TextVqaReader(QuestionFileReader):
    """`TextVQA_0.5.1_train.json`: `{data: [{image_id, question_id, question, answers: [10 str]}]}`."""

    image_folders = ("train_images", "textvqa/train_images", "images", "")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all questions."""
        return [(row_name(row, "question_id", i), row) for i, row in enumerate(load_json(shard)["data"])]

    def question(self, row: Any) -> tuple[str, Any, list[str]]:
        """See the base class."""
        return row["question"], row["answers"], [f"{row['image_id']}.jpg"]


class AokVqaReader(QuestionFileReader):
    """`aokvqa_v1p0_train.json`: `[{image_id, image?, question_id, question, direct_answers: [10 str]}]`; `image` is a path,
    without it the image is `train2017/%012d.jpg`."""

    image_folders = ("", "images", "coco", "coco/images")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all questions."""
        return [(row_name(row, "question_id", i), row) for i, row in enumerate(load_json(shard))]

    def question(self, row: Any) -> tuple[str, Any, list[str]]:
        """See the base class."""
        names = [row["image"]] if row.get("image") else []
        names += [f"{split}/{int(row['image_id']):012d}.jpg" for split in ("train2017", "val2017")]
        return row["question"], row["direct_answers"], names


class GqaReader(QuestionFileReader):
    """`train_balanced_questions.json`: a dict by question id with `imageId`, or a list with `question_id` and `image`."""

    image_folders = ("images", "gqa/images", "")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all questions."""
        file = load_json(shard)
        if isinstance(file, dict):
            return list(file.items())
        return [(row_name(row, "question_id", i), row) for i, row in enumerate(file)]

    def question(self, row: Any) -> tuple[str, Any, list[str]]:
        """See the base class."""
        return row["question"], row["answer"], [row.get("image") or f"{row['imageId']}.jpg"]


class EasyVqaReader(QuestionFileReader):
    """Easy-VQA's `questions.json`: `[[question, answer, image id], ...]`; images `images/<id>.png`."""

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all questions."""
        return [(f"row {number}", row) for number, row in enumerate(load_json(shard))]

    def question(self, row: Any) -> tuple[str, Any, list[str]]:
        """See the base class."""
        question, answer, image = row
        return question, answer, [f"{image}.png"]


class OcrVqaReader(QuestionFileReader):
    """OCR-VQA's `dataset.json`: a dict by id of `{imageURL, questions: [], answers: [], split}`; split 1 (training), one
    sample per question; images `images/<id><extension of imageURL>`."""

    image_folders = ("images", "ocr_vqa/images", "")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return all training questions."""
        found: list[tuple[Any, Any]] = []
        for book, row in load_json(shard).items():
            try:
                if row["split"] != 1:
                    self.leave_out(shard, "question outside of the training split", len(row["questions"]))
                    continue
                name = f"{book}{Path(row['imageURL']).suffix}"
                if isinstance(row["questions"], str) or isinstance(row["answers"], str):
                    raise TypeError("texts in place of lists")
                pairs = list(zip(row["questions"], row["answers"], strict=True))
            except (KeyError, TypeError, ValueError):
                found.append((book, row))  # `question` refuses it
                continue
            found += [(f"{book}.{index}", (name, *pair)) for index, pair in enumerate(pairs)]
        return found

    def question(self, row: Any) -> tuple[str, Any, list[str]]:
        """See the base class."""
        if not isinstance(row, tuple):
            raise TypeError("a book without imageURL, questions and as many answers")
        name, question, answer = row
        return question, answer, [name]
