# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every folder of `recipes/evaluation/metrics` loads as a module of `evaluate` offline and gives what its function gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes.evaluation.scoring.captions import bleu, cider_d, meteor_missing, rouge_l
from recipes.evaluation.scoring.frechet import cmmd, frechet_distance, kid, precision_recall

evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")

METRICS = Path(__file__).resolve().parents[4] / "recipes/evaluation/metrics"
RANDOM = np.random.default_rng(0)
REAL, FAKE = RANDOM.normal(size=(30, 3)), RANDOM.normal(size=(20, 3))
SAID, EXPECTED = ["a red dog.", "Two cats!"], [["A red dog runs"], ["two cats", "cats"]]
TEN = ["red"] * 3 + ["blue"] * 7
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yes_no": (
        {"predictions": ["Yes, it is", "so"], "references": ["yes", "no"]},
        {"accuracy": 0.5, "yes_ratio": 1.0},
    ),
    "mmvp": (
        {"predictions": ["(a)", "B"], "references": ["(a)", "(b)"], "indices": [1, 2]},
        {"accuracy": 1.0, "pair_accuracy": 1.0},
    ),
    "vqa_accuracy": (
        {"predictions": ["Red"], "references": [TEN]},
        {"value": 0.9, "low": 0.0, "high": 1.0, "count": 1},
    ),
    "vizwiz_accuracy": ({"predictions": ["The blue"], "references": [TEN]}, {"value": 1.0, "clusters": 1}),
    "gqa_exact_match": ({"predictions": ["Yes."], "references": ["yes"], "rule": "deem"}, {"value": 1.0}),
    "bleu": ({"predictions": SAID, "references": EXPECTED}, {"bleu_4": bleu(SAID, EXPECTED).corpus[3]}),
    "rouge_l": ({"predictions": SAID, "references": EXPECTED}, {"value": rouge_l(SAID, EXPECTED).corpus}),
    "cider_d": ({"predictions": SAID, "references": EXPECTED}, {"value": cider_d(SAID, EXPECTED).corpus}),
    "chair": (
        {"predictions": ["a puppy"], "references": [["person"]], "synonyms": "person\ndog, puppy"},
        {"chair_i": 1.0, "recall": 0.0},
    ),
    "ndcg": ({"predictions": [[1.0, 2.0]], "references": [[0.0, 1.0]]}, {"value": 1.0}),
    "ranking": ({"predictions": [[1.0, 2.0]], "references": [0]}, {"mean_rank": 2.0, "recall@1": 0.0, "mrr": 0.5}),
    "grounding": (
        {"predictions": ["(0,0)(999,999)"], "references": [[0, 0, 64, 48]], "widths": [64], "heights": [48]},
        {"accuracy": 1.0, "iou": 1.0},
    ),
    "frechet_distance": ({"predictions": FAKE, "real": REAL}, {"frechet_distance": frechet_distance(REAL, FAKE)}),
    "kid": ({"predictions": FAKE, "real": REAL}, {"value": kid(REAL, FAKE).value, "spread": kid(REAL, FAKE).spread}),
    "cmmd": ({"predictions": FAKE, "real": REAL}, {"cmmd": cmmd(REAL, FAKE)}),
    "precision_recall": ({"predictions": FAKE, "real": REAL}, precision_recall(REAL, FAKE)),
    "clip_score": ({"predictions": [[1.0, 0.0]], "references": [[1.0, 0.0]]}, {"value": 100.0}),
}


def test_every_metric_has_a_case() -> None:
    assert {script.parent.name for script in METRICS.glob("*/*.py")} == {*CASES, "meteor"}


@pytest.mark.parametrize("name", CASES)
def test_a_metric_loads_and_gives_the_figures_of_its_function(name: str) -> None:
    given, expected = CASES[name]
    metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
    figures = metric.compute(**given)
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value), key
    assert metric.description and metric.citation and "predictions" in metric.inputs_description


def test_answers_may_come_in_batches() -> None:
    metric = evaluate.load(str(METRICS / "yes_no"), keep_in_memory=True)
    metric.add_batch(predictions=["Yes", "No"], references=["yes", "yes"])
    metric.add(prediction="No", reference="no")
    assert metric.compute(rule="word")["accuracy"] == pytest.approx(2 / 3)


def test_meteor_loads_and_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = evaluate.load(str(METRICS / "meteor"), keep_in_memory=True)
    monkeypatch.setenv("PATH", "")
    assert "no `java`" in str(meteor_missing())
    with pytest.raises(RuntimeError, match="METEOR needs Java"):
        metric.compute(predictions=SAID, references=EXPECTED)
