# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""VQAv2-layout JSON -> one-turn dialogues.

Files: data_and_evaluation.md section 2.5; dialogue: section 1.5. The two JSON files are objects, not rows, so each is read
as a whole.
"""

import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.files import same_id
from recipes.data.readers.images import open_image
from recipes.data.readers.reader import Entry, Reader, clean_text, is_missing, parse_json
from recipes.prompts import ANSWER_BEGIN, ONE_WORD_REQUEST, QUESTION_REQUEST


class QuestionReader(Reader):
    """Questions about whole images with one answer each.

    Args:
        shards: question files `*_questions.json`; `{questions: [{image_id, question_id, question}]}`. The answers lie
            beside each in `*_annotations.json` without `OpenEnded_`: `{annotations: [{question_id,
            multiple_choice_answer, answers: [{answer}]}]}`.
        image_token, reserved: special tokens that are taken out of questions and answers.
        request_probability: share of questions that end in `ONE_WORD_REQUEST`.
    """

    def __init__(
        self,
        shards: list[Path],
        image_token: str = "<image>",
        reserved: tuple[str, ...] = (),
        request_probability: float = 0.5,
    ) -> None:
        self.name = str(shards[0].parent)
        self.shards = shards
        self.reserved = (image_token, *reserved)
        self.request_probability = request_probability
        for shard in shards:
            annotation_file(shard)

    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read questions with their answer and image folder, keyed `<file>:<question_id>`."""
        annotations = annotation_file(shard)
        try:
            given = _rows(annotations, "annotations")
            answers = {same_id(row.get("question_id")): row for row in given if isinstance(row, dict)}
            questions = _rows(shard, "questions")
        except (KeyError, TypeError, OSError) as error:
            raise BadSample("question or annotation file of another layout", shard.name) from error
        images = image_folder(shard)
        for index, row in enumerate(questions[number:], start=number):
            name = row.get("question_id") if isinstance(row, dict) else None
            key = f"{shard.name}:{f'row {index}' if name is None else name}"
            answer = None if (number := same_id(name)) is None else answers.get(number)
            yield Entry(index, 0, key, {"row": row, "answer": answer, "images": images})

    def make_sample(self, key: str, payload: dict[str, Any], rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue: the image and question, and the (most frequent, else first) answer."""
        row, answered = payload["row"], payload["answer"]
        if not isinstance(row, dict):
            raise BadSample("question of another layout", key)
        if answered is None:
            raise BadSample("question without answer", key)
        try:
            question, image_id = clean_text(row["question"], self.reserved).strip(), row["image_id"]
            given = (answered.get("multiple_choice_answer"), answered.get("answers"))
            answers = [clean_text(said, self.reserved) for one in given for said in read_answers(one)]
        except (KeyError, TypeError, AttributeError) as error:
            raise BadSample("question of another layout", key) from error
        answer = next((said for said in answers if said.strip()), None)
        check_round(question, answer, key)
        file = image_file(payload["images"], image_id)
        image = open_image(file, file.name)
        if rng.random() < self.request_probability:
            question += ONE_WORD_REQUEST
        return {
            "messages": question_messages(question, answer),
            "images": [image],
            "mode": "image_to_text",
            "id": key,
        }


def read_answers(given: Any) -> list[str]:
    """Return the answers of a row as texts, without missing and empty ones.

    Args:
        given: a text or number, or a list of such or of `{"answer": such}`; None and NaN are missing.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(given, dict):
        given = given["answer"]
    if isinstance(given, (list, tuple)):
        return [said for one in given for said in read_answers(one)]
    if is_missing(given) or given == "":
        return []
    if isinstance(given, str):
        return [given]
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"an answer is a text or a number, not {type(given).__name__}")
    return [f"{given:g}" if isinstance(given, float) else str(given)]


def check_round(question: str, answer: str | None, key: str) -> None:
    """Refuse a round in which nothing is asked or answered: an empty answer would be trained."""
    if not answer:
        raise BadSample("question without answer", key)
    if not question:
        raise BadSample("answer without question", key)


def question_messages(question: str, answer: str) -> list[dict[str, Any]]:
    """Return the dialogue of section 1.5 for one question about one image."""
    user = [
        {"type": "text", "text": QUESTION_REQUEST},
        {"type": "image"},
        {"type": "text", "text": question},
    ]
    assistant = [{"type": "text", "text": f"{ANSWER_BEGIN} {answer}"}]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def annotation_file(questions: Path) -> Path:
    """Find the annotation file that belongs to a question file.

    Raises:
        ValueError: if there is none.
    """
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    file = questions.with_name(name)
    if not file.is_file():
        raise ValueError(f"No answers for {questions}: expected the VQAv2 annotation file {file}.")
    return file


def image_folder(questions: Path) -> Path:
    """Find `<split>` or `images` beside the question file, with the split taken from the file's name.

    Raises:
        ValueError: if there is none.
    """
    split = re.search(r"([^_]+)_questions", questions.name)
    names = [*([split[1]] if split else []), "images"]
    places = [root / name for name in names for root in (questions.parent, questions.parent.parent)]
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"No image folder for the questions {questions}: expected one of {', '.join(str(place) for place in places)}, "
        "holding COCO_<split>_<image_id, 12 digits>.jpg."
    )


@lru_cache(maxsize=8)
def _prefix(folder: Path) -> str:
    """Return what the image files of a folder have before the number, e.g. `COCO_train2014_`."""
    first = next((file for file in sorted(folder.iterdir()) if re.search(r"\d{12}\.jpg$", file.name)), None)
    return re.sub(r"\d{12}\.jpg$", "", first.name) if first else f"COCO_{folder.name}_"


def image_file(folder: Path, image_id: int | str) -> Path:
    """Return COCO's file name for an image number; other ids are taken as file stems."""
    if isinstance(image_id, int) or str(image_id).isdigit():
        return folder / f"{_prefix(folder)}{int(image_id):012d}.jpg"
    return folder / f"{Path(str(image_id)).name}.jpg"  # no path out of the folder


def _rows(file: Path, key: str) -> list[Any]:
    rows = parse_json(file.read_bytes(), file.name)[key]
    if not isinstance(rows, list):
        raise TypeError(f"{key} of {file.name} are not a list")
    return rows
