# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""VisDial v1.0: a dialogue about an image, and 100 options for the next answer, put in order by their likelihood.

Files: `visdial_1.0_val.json`, `visdial_1.0_val_dense_annotations.json` and `VisualDialog_val2018/`. `visdial` asks the round
of each dialogue whose options were all judged (NDCG), `visdial_rounds` every round (MRR, recall). The score of an option
is the sum of the log-probabilities of its tokens. Protocols: data_and_evaluation.md section 3.8; "deem" leaves out the
round just before the question, as the release does, "standard" gives the whole history.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.samples import IMAGE
from recipes.evaluation.benchmark import Benchmark, Figures, ImageSource, Line, Loaded, Request, Sample
from recipes.evaluation.benchmarks.files import make_samples, read_json, text_of
from recipes.evaluation.benchmarks.shares import figure_of, share_figure
from recipes.evaluation.scoring.intervals import mean_interval
from recipes.evaluation.scoring.ranking import RECALLS, ndcg, ranking_scores, ranks
from recipes.evaluation.sources import DataSource, ImageFolders

DIALOGUES = ("visdial_1.0_val.json", "visdial_*_val.json")
DENSE = ("visdial_1.0_val_dense_annotations.json", "visdial_*val_dense_annotations.json")
STANDARD_REQUEST = "\nAnswer the last question about the image with a short phrase."
ANSWER_BEGIN = " the answer is"  # as released, in this case


class VisDial(Benchmark):
    """See the module.

    Args:
        dense: ask the judged rounds alone.
    """

    generation: dict[str, dict[str, Any]] = {"deem": {}, "standard": {}}  # nothing is written

    def __init__(self, name: str, dense: bool) -> None:
        self.name, self.dense = name, dense
        self.headline = "ndcg" if dense else "mrr"

    def load(self, source: DataSource) -> Loaded:
        """Read the rounds of all dialogues, with what the options of the judged ones are worth."""
        file = source.need(*DIALOGUES)
        read = read_json(file)["data"]
        folders = ImageFolders(file.parent, "VisualDialog_val2018", "images", "")
        rows: dict[Path | str, int] = {file: len(read["dialogs"])}
        judged: dict[tuple[Any, int], Any] = {}
        if dense := source.need(*DENSE) if self.dense else source.find(*DENSE):
            annotated = read_json(dense)
            judged = {(row["image_id"], row["round_id"] - 1): row for row in annotated}
            rows[dense] = len(annotated)

        def sample(number: int, row: tuple[Any, int]) -> Sample:
            dialogue, place = row
            return _sample(read, dialogue, place, folders, judged.get((dialogue["image_id"], place)))

        asked = [row for row in _rounds(read["dialogs"]) if not self.dense or _key(row) in judged]
        samples = make_samples(asked, sample, "row")
        return Loaded(samples + self._without_dialogue(judged, asked), rows)

    def _without_dialogue(self, judged: dict[tuple[Any, int], Any], asked: Sequence[Any]) -> list[Sample]:
        """Return a faulty sample for each judged round that no dialogue has."""
        known = set(map(_key, asked))
        lost = [key for key in judged if key not in known]
        return [
            Sample(f"{image}/{place + 1}", cluster=str(image), fault="no dialogue has this judged round")
            for image, place in lost
        ]

    def request(self, sample: Sample, protocol: str) -> Request:
        """Caption, history and question; the released form, or one question and answer a line."""
        history = sample.about["history"]
        if protocol == "deem":
            said = "".join(f"question: {question}? answer: {answer}. " for question, answer in history[:-1])
            text = f" caption: {sample.about['caption']}. {said}question: {sample.asked}? "
            return Request((IMAGE, text), ANSWER_BEGIN)
        said = "".join(f"\nQuestion: {question}?\nAnswer: {answer}" for question, answer in history)
        text = f"\nCaption: {sample.about['caption']}{said}\nQuestion: {sample.asked}?{STANDARD_REQUEST}"
        return Request((IMAGE, text))

    def options(self, sample: Sample) -> tuple[str, ...]:
        """The candidates of the round."""
        return tuple(sample.about["options"])

    def parse(self, raw: str, line: Line) -> str:
        """The likeliest option."""
        return raw

    def score(self, parsed: str | None, line: Line) -> float:
        """NDCG of a judged round, else the reciprocal rank of the right option."""
        if not line.get("option_scores"):
            return 0.0
        if self.dense:
            return ndcg(line["option_scores"], line["about"]["relevance"])
        return float(ranking_scores(line["option_scores"], line["truth"])["mrr"])

    def figures(self, lines: Sequence[Line]) -> Figures:
        """NDCG of the judged rounds; reciprocal rank, recall and mean rank of the right option."""
        clusters = [line["cluster"] for line in lines]
        count = max((len(line["about"].get("options") or ()) for line in lines), default=0) or 1
        figures: Figures = {}
        judged = [line for line in lines if line["about"].get("relevance") or (self.dense and line.get("error"))]
        if judged:
            values = [_ndcg(line) for line in judged]
            chance = float(np.mean([_chance(line["about"].get("relevance")) for line in judged]))
            figures["ndcg"] = share_figure(values, [line["cluster"] for line in judged], chance)
        found = [_ranked(line, count) for line in lines]
        random = [1 / rank for rank in range(1, count + 1)]
        figures["mrr"] = share_figure([row["mrr"] for row in found], clusters, float(np.mean(random)))
        for most in RECALLS:
            name = f"recall@{most}"
            figures[name] = share_figure([row[name] for row in found], clusters, min(1.0, most / count))
        rank = mean_interval([row["rank"] for row in found], clusters, (1.0, float(max(count, 2))))
        return figures | {"mean_rank": figure_of(rank, (count + 1) / 2)}

    def submission(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """The ranks of all options, as the server takes them; failed rounds are left out."""
        return [
            {
                "image_id": line["about"]["image_id"],
                "round_id": line["about"]["round_id"],
                "ranks": ranks(line["option_scores"]).tolist(),
            }
            for line in lines
            if line.get("option_scores")
        ]


def _ndcg(line: Line) -> float:
    return ndcg(line["option_scores"], line["about"]["relevance"]) if line.get("option_scores") else 0.0


def _ranked(line: Line, count: int) -> dict[str, float]:
    """The scores of a line by its right option; a failed one has it last, and no recall."""
    if line.get("option_scores"):
        return ranking_scores(line["option_scores"], line["truth"])
    return {"rank": count, "mrr": 0.0} | {f"recall@{most}": 0.0 for most in RECALLS}


def _chance(relevance: Sequence[float] | None) -> float:
    """The NDCG that options in random order have on average."""
    gains = np.asarray(relevance or [0.0])
    relevant = int((gains > 0).sum())
    if not relevant:
        return 0.0
    discounts = 1 / np.log2(np.arange(2, relevant + 2))
    return float(gains.mean() * discounts.sum() / (np.sort(gains)[::-1][:relevant] @ discounts))


def _rounds(dialogues: Sequence[Any]) -> Iterator[tuple[Any, int]]:
    for dialogue in dialogues:
        told = dialogue.get("dialog") if isinstance(dialogue, dict) else None
        for place in range(len(told) if isinstance(told, list) else 1):
            yield dialogue, place


def _key(row: tuple[Any, int]) -> tuple[Any, int]:
    return (row[0].get("image_id") if isinstance(row[0], dict) else None), row[1]


def _sample(read: Any, dialogue: Any, place: int, folders: ImageFolders, judged: Any) -> Sample:
    questions, answers = read["questions"], read["answers"]
    told, image_id = dialogue["dialog"], int(dialogue["image_id"])
    turn = told[place]
    options = [text_of(answers[number]) for number in turn["answer_options"]]
    truth = int(turn["gt_index"])
    if not 0 <= truth < len(options):
        raise ValueError(f"gt_index {truth} of {len(options)} options")
    relevance = None
    if judged is not None:
        relevance = [
            float(one) for one in (judged["gt_relevance"] if "gt_relevance" in judged else judged["relevance"])
        ]
        if len(relevance) != len(options) or min(relevance) < 0:
            raise ValueError(f"{len(relevance)} relevances, of 0 or more, for {len(options)} options")
    history = [
        (text_of(questions[one["question"]]).rstrip("?"), text_of(answers[one["answer"]])) for one in told[:place]
    ]
    name = f"VisualDialog_val2018_{image_id:012d}.jpg"
    return Sample(
        f"{image_id}/{place + 1}",
        (ImageSource(name, folders.find(name)),),
        text_of(questions[turn["question"]]).rstrip("?"),
        truth,
        cluster=str(image_id),
        about={
            "caption": text_of(dialogue["caption"]).rstrip("."),
            "history": history,
            "options": options,
            "relevance": relevance,
            "image_id": image_id,
            "round_id": place + 1,
        },
    )


VISDIAL = (VisDial("visdial", dense=True), VisDial("visdial_rounds", dense=False))
