# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Scores of short answers against the values of the official evaluations, and worked by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from recipes.evaluation.scoring.vqa import (
    extract_answer,
    gqa_exact_match,
    normalize_answer,
    vizwiz_accuracy,
    vqa_accuracy,
)


def test_normalization_equals_the_official_one(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/vqa_normalisation.json")["cases"]:
        assert normalize_answer(case["input"]) == case["expected"], case["input"]


def test_accuracy_equals_the_official_one(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/vqa_accuracy.json")["cases"]:
        assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["expected"], abs=1e-6), case


def test_vizwiz_equals_the_official_one(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/vizwiz_accuracy.json")["cases"]:
        score = vizwiz_accuracy(case["prediction"], case["answers"])
        assert score == pytest.approx(case["expected_official"], abs=1e-6), case


def test_gqa_by_three_rules(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/gqa_exact_match.json")["cases"]:
        for rule in ("strict", "relaxed", "deem"):
            assert gqa_exact_match(case["prediction"], case["answer"], rule) == case[rule], (case, rule)


def test_cut_equals_the_released_one(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/deem_extract_answer.json")["cases"]:
        assert extract_answer(case["input"]) == case["expected"], case["input"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The  two dogs!", "2 dogs"),
        ("left-right", "left right"),
        ("1,000 (one thousand)", "1000 1 thousand"),
        ("Wouldntve, couldn'tve", "wouldntve couldn't've"),
        ("somebody'd", "somebodyd"),
        ("v1.2.", "v1.2"),
        ("." * 40, "." * 8),
        ("", ""),
    ],
)
def test_normalization_by_hand(given: str, expected: str) -> None:
    assert normalize_answer(given) == expected


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_counts_the_other_annotators(matches: int, expected: float) -> None:
    references = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa_accuracy("Red.", references) == pytest.approx(expected)


def test_references_that_are_all_the_same_are_compared_as_they_are() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("yes\n", ["yes"] * 10) == 1.0


def test_vizwiz_normalizes_the_answer_only() -> None:
    assert vizwiz_accuracy("Yes.", ["yes"] * 10) == 1.0
    assert vizwiz_accuracy("Blue", ["Blue"] * 10) == 0.0


def test_cut_looks_at_parts_of_words() -> None:
    assert extract_answer("pasta salad") == "salad"
    assert extract_answer("A photo of: [no]") == "photo"
    assert extract_answer("") == ""


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="without reference answers"):
        vqa_accuracy("yes", [])
    with pytest.raises(ValueError, match="Unknown rule 'loose'"):
        gqa_exact_match("yes", "yes", "loose")
