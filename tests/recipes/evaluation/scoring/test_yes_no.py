# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Yes/no figures against POPE's own evaluation and others', and worked by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from recipes.evaluation.scoring.pairs import all_right, consecutive
from recipes.evaluation.scoring.yes_no import parse_yes_no, yes_no_figures


def test_official_rule_and_figures(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/pope.json")["cases"]:
        parsed = [parse_yes_no(answer) for answer in case["answers"]]
        assert parsed == case["parsed"]
        figures = yes_no_figures(parsed, case["labels"])
        for name, value in case["expected_sklearn_zero_division_0"].items():
            assert figures[name] == pytest.approx(value, abs=1e-6), (case["name"], name)


def test_rules_of_others(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/pope.json")["cases"]:
        words = [parse_yes_no(answer, "word") for answer in case["answers"]]
        assert words == [{"Unknown": None}.get(one, one.lower()) for one in case["vlmevalkit_parsed"]]
        deem = [parse_yes_no(answer, "deem") for answer in case["answers"]]
        accuracy = yes_no_figures(deem, case["labels"])["accuracy"]
        assert accuracy == pytest.approx(case["deem_accuracy_rule"], abs=1e-6), case["name"]


@pytest.mark.parametrize(
    ("text", "official", "deem", "word"),
    [
        ("yes", "yes", "yes", "yes"),
        ("The answer is no.", "no", "no", "no"),
        ("NO", "yes", "no", "no"),
        ("[yes]", "yes", "yes", "yes"),
        ("Is there? Yes or no", "no", None, None),
        ("It is. No, not at all", "yes", None, "no"),
        ("", "yes", None, None),
        ("yesterday", "yes", None, None),
    ],
)
def test_three_rules(text: str, official: str, deem: str | None, word: str | None) -> None:
    assert [parse_yes_no(text, rule) for rule in ("official", "deem", "word")] == [official, deem, word]


def test_an_answer_that_is_neither_is_wrong_and_no_yes() -> None:
    figures = yes_no_figures(["yes", None, "no", None], ["yes", "yes", "no", "no"])
    assert figures == {
        "accuracy": 0.5,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 0.25,
        "unparsed": 0.5,
        "accuracy_yes": 0.5,
        "accuracy_no": 0.5,
        "count": 4,
    }


def test_the_ratio_is_of_predictions_and_nothing_divides_by_zero() -> None:
    figures = yes_no_figures(["no", "no"], ["yes", "yes"])
    assert [figures[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")] == [0.0] * 5
    assert "accuracy_no" not in figures


def test_both_right() -> None:
    assert all_right([True, True, False, True], ["a", "a", "b", "b"], size=2) == {"a": True, "b": False}
    assert consecutive([1, 2, 3, 4]) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="1 of 2 groups do not have 2 questions: 'b' has 1"):
        all_right([True, True, True], ["a", "a", "b"], size=2)
    with pytest.raises(ValueError, match="counted from 1; got index 0"):
        consecutive([0, 1])


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "no predictions"),
        (["yes"], ["Yes"], "Labels are 'yes' or 'no'; got 'Yes'"),
        (["Yes."], ["yes"], "got 'Yes.'. Parse answers"),
        (["yes", "no"], ["yes"], "shorter than"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions: list[str], labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        yes_no_figures(predictions, labels)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of official, deem, word"):
        parse_yes_no("yes", "loose")
