# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Open questions with short answers: VQAv2, OK-VQA, TextVQA, VizWiz, GQA. Official rules, and files to submit.

Files are those of the sets' validation splits (data_and_evaluation.md sections 2.5 and 3.6), of another split where that
alone is there; or rows of `datasets` with `question`, `answers` or `answer`, and `image`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluation.benchmark import (
    ONE_WORD,
    Benchmark,
    Figures,
    ImageSource,
    Line,
    Loaded,
    Request,
    Sample,
    question_request,
)
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.benchmarks.shares import line_shares, mean_score, share_figure
from recipes.evaluation.scoring.vqa import extract_answer, gqa_exact_match, vizwiz_accuracy, vqa_accuracy
from recipes.evaluation.sources import DataSource, ImageFolders
from recipes.prompts import ONE_WORD_REQUEST

UNANSWERABLE = (
    " When the image does not tell, reply 'Unanswerable'."  # ours; the release has a clause of the same sense
)
Truth = Any  # a list of answers, or one


class OpenQuestions(Benchmark):
    """Questions with references; subclasses say where they are and how an answer is judged."""

    endings = (f"{ONE_WORD_REQUEST}", ONE_WORD)  # behind the question, under the protocols "deem" and "standard"

    def load(self, source: DataSource) -> Loaded:
        """Read the official files, or rows of `datasets`."""
        if not self.official(source) and (rows := source.rows()):
            return Loaded(make_samples(rows[0], self.of_row, ""), rows[1])
        return self.of_files(source)

    def official(self, source: DataSource) -> bool:
        """Return whether the official files are there."""
        return source.find(*self.patterns) is not None

    patterns: tuple[str, ...] = ()

    def of_files(self, source: DataSource) -> Loaded:
        """Read the official files."""
        raise NotImplementedError

    def of_row(self, number: int, row: Any) -> Sample:
        """Return the sample of a row of `datasets`."""
        answers = row["answers"] if row.get("answers") is not None else row["answer"]
        truth = [_answer(one) for one in answers] if isinstance(answers, list) else text_of(answers)
        image = str(row.get("image_id") or row.get("imageId") or f"row {number}")
        identity = str(row.get("question_id") or row.get("id") or number)
        about = {"answer_type": row.get("answer_type"), "question_type": row.get("question_type")}
        about |= {"image": image, "question_id": row.get("question_id")}
        return Sample(identity, (ImageSource(image, row["image"]),), text_of(row["question"]), truth, image, "", about)

    def request(self, sample: Sample, protocol: str) -> Request:
        """The question with the request for one word."""
        return question_request(sample.asked, protocol, *self.endings)

    def parse(self, raw: str, line: Line) -> str:
        """The answer as it is; under the protocol "deem" cut as the release does."""
        return extract_answer(raw) if line["protocol"] == "deem" else raw.strip()

    def score(self, parsed: str, line: Line) -> float:
        """By the official rule."""
        return self.accuracy(parsed, line["truth"]) if line["truth"] else 0.0

    def accuracy(self, answer: str, truth: Truth) -> float:
        """Return what an answer is worth."""
        return vqa_accuracy(answer, truth)

    def figures(self, lines: Sequence[Line]) -> Figures:
        """Accuracy of all, and of each type of answer and of question; chance is always giving the same answer."""
        if all(line["about"].get("unlabelled") for line in lines):
            return {"empty": share_figure([not line["parsed"] for line in lines], [line["cluster"] for line in lines])}
        figures = {"accuracy": mean_score(lines, self.chance(lines))}
        figures["empty"] = share_figure([not line["parsed"] for line in lines], [line["cluster"] for line in lines])
        for kind in ("answer_type", "question_type"):
            figures |= line_shares(lines, None, lambda line, kind=kind: line["about"].get(kind), f"{kind} ")
        return figures

    def chance(self, lines: Sequence[Line]) -> float | None:
        """Return the accuracy of the answer that is most often right, given to every question."""
        truths = [line["truth"] for line in lines if line["truth"]]
        given = Counter(answer for truth in truths for answer in (truth if isinstance(truth, list) else [truth]))
        if not given:
            return None
        answer = given.most_common(1)[0][0]
        return sum(self.accuracy(answer, truth) for truth in truths) / len(lines)

    def submission(self, lines: Sequence[Line]) -> Any:
        """Return the results file of the VQA server."""
        return [{"question_id": line["about"].get("question_id"), "answer": line["parsed"] or ""} for line in lines]


def _answer(value: Any) -> str:
    answer = value["answer"] if isinstance(value, dict) else value
    if not isinstance(answer, str):
        raise TypeError(f"expected an answer, got {type(answer).__name__}")
    return answer


class VqaFiles(OpenQuestions):
    """Questions in one file, annotations in another: VQAv2, OK-VQA."""

    def __init__(self, name: str, prefix: str) -> None:
        self.name, self.prefix = name, prefix
        self.patterns = (
            f"{prefix}OpenEnded_mscoco_val2014_questions.json",
            f"{prefix}OpenEnded_mscoco_*_questions.json",
            f"{name}_val_questions.json",
        )

    def of_files(self, source: DataSource) -> Loaded:
        """Join questions and annotations by question id."""
        questions = source.need(*self.patterns)
        name = questions.name.replace("OpenEnded_", "").replace("_questions", "_annotations")
        annotations = questions.with_name(name)
        return joined(questions, annotations)


def joined(questions: Path, annotations: Path) -> Loaded:
    """Return the samples of two files in VQA's layout; those of a test split, which has no answers, are to be submitted.

    Raises:
        ValueError: there are no answers, and it is no test split.
    """
    unlabelled = "test" in questions.name and not annotations.is_file()
    if not unlabelled and not annotations.is_file():
        raise ValueError(f"{questions} has no answers beside it: expected {annotations.name}.")
    answers = {} if unlabelled else {row["question_id"]: row for row in read_json(annotations)["annotations"]}
    split = next((part for part in questions.stem.split("_") if part[:3] in ("tra", "val", "tes")), "val2014")
    folders = ImageFolders(questions.parent, "", split, f"{split}2014", "images", "train_images", "val2014")
    rows = read_json(questions)["questions"]

    def sample(number: int, row: Any) -> Sample:
        question = row["question_id"]
        annotation = {"answers": []} if unlabelled else answers[question]
        image = row.get("image") or f"COCO_{split}_{int(row['image_id']):012d}.jpg"
        about = {key: annotation.get(key) for key in ("answer_type", "question_type")} | {"question_id": question}
        about |= {"unlabelled": True} if unlabelled else {}
        truth = [_answer(one) for one in annotation["answers"]]
        if not truth and not unlabelled:
            raise ValueError("a question without answers")
        where = ImageSource(image, folders.find(image))
        return Sample(str(question), (where,), text_of(row["question"]), truth, image, "", about)

    samples = make_samples(rows, sample, "row")
    return Loaded(samples, {questions: len(rows)} | ({} if unlabelled else {annotations: len(answers)}))


class TextVqa(OpenQuestions):
    """TextVQA: its own file, or that in VQA's layout."""

    name = "textvqa"
    patterns = ("TextVQA_0.5.1_val.json", "textvqa_val_questions.json", "TextVQA_0.5.1_*.json")

    def of_files(self, source: DataSource) -> Loaded:
        """Read `data`, or questions and annotations."""
        file = source.need(*self.patterns)
        if file.name.endswith("_questions.json"):
            return joined(file, file.with_name(file.name.replace("_questions", "_annotations")))
        folders = ImageFolders(file.parent, "train_images", "test_images", "", "images")
        rows = read_json(file)["data"]

        def sample(number: int, row: Any) -> Sample:
            image = f"{row['image_id']}.jpg"
            truth = [_answer(one) for one in row["answers"]]
            about = {"question_id": row["question_id"]}
            where = ImageSource(image, folders.find(image))
            return Sample(str(row["question_id"]), (where,), text_of(row["question"]), truth, image, "", about)

        return Loaded(make_samples(rows, sample, "row"), {file: len(rows)})


class VizWiz(OpenQuestions):
    """VizWiz: the prediction is normalized, the references are not; "unanswerable" is an answer."""

    name = "vizwiz"
    patterns = ("val.json", "train.json")
    endings = (UNANSWERABLE + ONE_WORD_REQUEST, f"\n{UNANSWERABLE.strip()}{ONE_WORD}")

    def accuracy(self, answer: str, truth: Truth) -> float:
        """Return what an answer is worth."""
        return vizwiz_accuracy(answer, truth)

    def of_files(self, source: DataSource) -> Loaded:
        """Read the list of questions."""
        file = source.need(*self.patterns)
        folders = ImageFolders(file.parent, file.stem, "", "images")
        rows = read_json(file)

        def sample(number: int, row: Any) -> Sample:
            image = text_of(row["image"])
            truth = [_answer(one) for one in row["answers"]]
            about = {"answer_type": row.get("answer_type"), "image": image}
            where = ImageSource(image, folders.find(image))
            return Sample(str(number), (where,), text_of(row["question"]), truth, image, "", about)

        return Loaded(make_samples(rows, sample, "row"), {file: len(rows)})

    def submission(self, lines: Sequence[Line]) -> Any:
        """Return the results file of the VizWiz server."""
        return [{"image": line["about"].get("image"), "answer": line["parsed"] or ""} for line in lines]


class Gqa(OpenQuestions):
    """GQA: one answer. Strictly equal, as the official rule; without case and punctuation under "standard"."""

    name = "gqa"
    patterns = ("testdev_balanced_questions.json", "*_balanced_questions.json")

    def accuracy(self, answer: str, truth: Truth) -> float:
        """Return whether an answer is the one, case and punctuation left aside."""
        return float(gqa_exact_match(answer, truth, "relaxed"))

    def score(self, parsed: str, line: Line) -> float:
        """1 for the answer."""
        rule = "strict" if line["protocol"] == "deem" else "relaxed"
        return float(bool(line["truth"]) and gqa_exact_match(parsed, line["truth"], rule))

    def figures(self, lines: Sequence[Line]) -> Figures:
        """Also by the strict rule, and apart for questions of yes and no (and other binary ones) and open ones."""
        strict = [line | {"score": float(bool(line["parsed"]) and line["parsed"] == line["truth"])} for line in lines]
        figures = super().figures(lines) | {"strict_accuracy": mean_score(strict)}

        def kind(line: Line) -> str | None:
            structural = line["about"].get("structural")
            return None if structural is None else "open" if structural == "query" else "binary"

        figures |= line_shares(lines, None, kind)
        return figures | line_shares(lines, None, lambda line: line["about"].get("structural"), "structural ")

    def of_files(self, source: DataSource) -> Loaded:
        """Read the questions, a dict by id or a list."""
        file = source.need(*self.patterns)
        folders = ImageFolders(file.parent, "images", "")
        read = read_json(file)
        rows: Iterable[Any] = (
            [(row.get("question_id"), row) for row in read] if isinstance(read, list) else list(read.items())
        )

        def sample(number: int, named: Any) -> Sample:
            key, row = named
            image = row.get("image") or f"{row['imageId']}.jpg"
            about = {"question_id": key, "structural": (row.get("types") or {}).get("structural")}
            where = ImageSource(image, folders.find(image))
            return Sample(str(key), (where,), text_of(row["question"]), text_of(row["answer"]), image, "", about)

        samples = make_samples(rows, sample, "row")
        return Loaded(samples, {file: len(samples)})

    def submission(self, lines: Sequence[Line]) -> Any:
        """Return the results file of the GQA server."""
        return [{"questionId": line["about"].get("question_id"), "prediction": line["parsed"] or ""} for line in lines]
