# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Rankings against the official NDCG, and worked by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from recipes.evaluation.scoring.ranking import ndcg, ranking_figures, ranking_scores, ranks


def test_ndcg_equals_the_official_one(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/visdial_ndcg.json")["cases"]:
        assert ndcg(case["scores"], case["relevance"]) == pytest.approx(case["expected"], abs=1e-5)


def test_ndcg_by_hand() -> None:
    assert ndcg([3, 2, 1], [1, 0.5, 0]) == 1.0
    assert ndcg([1, 2, 3], [1, 0.5, 0]) == pytest.approx(0.5 / math.log2(3) / (1 + 0.5 / math.log2(3)))
    assert ndcg([3, 2, 1], [0, 0, 0]) == 0.0


def test_ranks_and_figures_by_hand() -> None:
    assert ranks([0.1, 0.9, 0.9, -5]).tolist() == [3, 1, 2, 4]
    assert ranking_scores([0.1, 0.9, 0.5], 2) == {
        "rank": 2,
        "mrr": 0.5,
        "recall@1": 0.0,
        "recall@5": 1.0,
        "recall@10": 1.0,
    }
    figures = ranking_figures([[3, 2, 1], [3, 2, 1]], [0, 2])
    assert figures["mean_rank"] == 2.0 and figures["mrr"] == pytest.approx(2 / 3) and figures["recall@1"] == 0.5
    assert figures["count"] == 2


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        ranks([1.0, math.nan])
    with pytest.raises(ValueError, match="got 2 for 1 options"):
        ndcg([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"one of 0\.\.1; got 2"):
        ranking_scores([1.0, 2.0], 2)
    with pytest.raises(ValueError, match="no questions"):
        ranking_figures([], [])
