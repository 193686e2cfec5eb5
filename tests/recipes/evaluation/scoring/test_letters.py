# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Letters in answers and MMVP's pairs, against lmms-eval's values and by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from recipes.evaluation.scoring.letters import correct_letter, mmvp_figures, parse_letter


def test_letters_and_pairs_equal_those_of_lmms_eval(shared_file: Callable[[str], Any]) -> None:
    given = shared_file("vectors/mmvp.json")
    for case in given["letter_cases"]:
        assert parse_letter(case["input"]) == case["expected"], case["input"]
        assert parse_letter(case["input"], rule="strict") == case["expected"], case["input"]
    rows = given["score_case"]["rows"]
    letters = [parse_letter(row["prediction"]) for row in rows]
    right = [letter == correct_letter(row["correct"]) for letter, row in zip(letters, rows, strict=True)]
    assert right == given["score_case"]["expected_per_row"]
    figures = mmvp_figures(letters, [row["correct"] for row in rows], [row["Index"] for row in rows])
    assert figures["accuracy"] == pytest.approx(given["score_case"]["accuracy"], abs=1e-6)
    assert figures["pair_accuracy"] == pytest.approx(given["score_case"]["pair_accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        ("b)", "B", "B"),
        ("The answer is b.", "B", "B"),
        ("The correct answer is (B) Closed", "B", "B"),
        ("Option B", "B", "B"),
        ("There is a dog", "A", None),
        ("A dog", "A", None),
        ("It is not b but a cat", "B", None),
        ("no idea", "A", None),
        ("A or B", "A", None),
        ("(a) and (b)", "A", None),
        ("closed", None, None),
        ("", None, None),
    ],
)
def test_two_rules(text: str, loose: str | None, strict: str | None) -> None:
    assert parse_letter(text) == loose
    assert parse_letter(text, rule="strict") == strict


def test_more_than_two_options() -> None:
    assert parse_letter("(d) green", "ABCD") == "D"
    assert parse_letter("The answer is C", "ABCD", rule="strict") == "C"


def test_the_four_errors_of_the_file_are_corrected_or_left() -> None:
    answers, indices = ["(a)", "(b)", "(a)", "(b)"], [99, 100, 279, 280]
    predictions = ["B", "A", "A", None]
    corrected = mmvp_figures(predictions, answers, indices)
    assert corrected == {"accuracy": 0.5, "pair_accuracy": 0.5, "unparsed": 0.25, "count": 4, "pairs": 2}
    original = mmvp_figures(predictions, answers, indices, corrected=False)
    assert (original["accuracy"], original["pair_accuracy"]) == (0.25, 0.0)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="do not have 2 questions"):
        mmvp_figures(["A", "B", "A"], ["(a)"] * 3, [1, 2, 3])
    with pytest.raises(ValueError, match="one letter, such as"):
        correct_letter("open")
    with pytest.raises(ValueError, match="Unknown rule"):
        parse_letter("A", rule="loose")
    with pytest.raises(ValueError, match="got ''"):
        parse_letter("A", "")
    with pytest.raises(ValueError, match="no predictions"):
        mmvp_figures([], [], [])
