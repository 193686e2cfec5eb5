# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Options in order of their scores: NDCG of dense relevance, and where the right option comes (VisDial).

Definitions: data_and_evaluation.md section 3.8.
"""

from collections.abc import Sequence

import numpy as np

RECALLS = (1, 5, 10)


def ranks(scores: Sequence[float]) -> np.ndarray:
    """Return the rank of each option, 1 for the highest score; of equal scores the earlier option comes first.

    Raises:
        ValueError: for no scores or one that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("The scores of the options are a list of finite numbers, one per option.")
    order = np.empty(len(values), dtype=np.int64)
    order[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return order


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float:
    """Return NDCG at as many options as are relevant at all: 1 for the best order, 0 if nothing is relevant.

    Args:
        scores: (K,) of the options, higher is better.
        relevance: (K,) 0 or more.

    Raises:
        ValueError: for unequal lengths, negative relevance, and as `ranks`.
    """
    gains = np.asarray(relevance, dtype=np.float64)
    if len(gains) != len(scores) or (gains < 0).any():
        raise ValueError(f"Give a relevance of 0 or more per option; got {len(gains)} for {len(scores)} options.")
    relevant = int((gains > 0).sum())
    if not relevant:
        return 0.0
    discounts = 1 / np.log2(np.arange(2, relevant + 2))
    by_rank = np.empty(len(gains))
    by_rank[ranks(scores) - 1] = gains
    return float(by_rank[:relevant] @ discounts / (np.sort(gains)[::-1][:relevant] @ discounts))


def ranking_scores(scores: Sequence[float], truth: int) -> dict[str, float]:
    """Return the scores of one question: `rank` of the right option, `mrr` (its reciprocal), `recall@1`, ... (0 or 1).

    Raises:
        ValueError: if `truth` is not the index of an option, and as `ranks`.
    """
    if not 0 <= truth < len(scores):
        raise ValueError(f"The right option is one of 0..{len(scores) - 1}; got {truth}.")
    rank = int(ranks(scores)[truth])
    return {"rank": rank, "mrr": 1 / rank} | {f"recall@{most}": float(rank <= most) for most in RECALLS}


def ranking_figures(scores: Sequence[Sequence[float]], truths: Sequence[int]) -> dict[str, float]:
    """Return the means over questions: `mean_rank`, `mrr`, `recall@1`, `recall@5`, `recall@10`, and `count`.

    Raises:
        ValueError: for no questions, unequal lengths, and as `ranking_scores`.
    """
    if not len(scores):
        raise ValueError("There are no questions to score.")
    rows = [ranking_scores(of_question, truth) for of_question, truth in zip(scores, truths, strict=True)]
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {"mean_rank": means.pop("rank")} | means | {"count": len(rows)}
