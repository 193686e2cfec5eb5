# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Boxes in answers and their overlap, against the official values and by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from recipes.data.readers.grounding import box_text
from recipes.evaluation.scoring.grounding import box_iou, center_inside, grounding_figures, parse_box, pixel_box


def test_boxes_equal_the_official_ones(shared_file: Callable[[str], Any]) -> None:
    given = shared_file("vectors/grounding.json")
    for case in given["parse_cases"]:
        assert parse_box(case["input"]) == tuple(case["expected"]), case["input"]
    for case in given["iou_cases"]:
        overlap = box_iou(tuple(case["pred"]), tuple(case["gt"]))
        assert overlap == pytest.approx(case["iou"], abs=1e-6)
        assert (overlap >= 0.5) == case["hit_at_0_5"]
        assert center_inside(tuple(case["pred"]), tuple(case["gt"])) == case["center_hit"]
    for case in given["end_to_end"]:
        size = case["width"], case["height"]
        box, truth = parse_box(case["pred_text"]), pixel_box(tuple(case["gt_box_999"]), *size)
        overlap = box_iou(pixel_box(box, *size), truth)
        assert overlap == pytest.approx(case["iou"], abs=1e-6) and (overlap >= 0.5) == case["correct"]


def test_what_is_written_for_training_is_read_again(shared_file: Callable[[str], Any]) -> None:
    for case in shared_file("vectors/box_encoding.json")["cases"]:
        assert parse_box(case["expected_string"]) == tuple(case["expected_999"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the box is<box>(001,002)(300,400)</box>", (1.0, 2.0, 300.0, 400.0)),
        ("(1,2) (3,4)", None),  # a gap, as released
        ("(1,2)(3,4", None),
        ("no box", None),
        ("", None),
    ],
)
def test_reading_by_hand(text: str, expected: tuple[float, ...] | None) -> None:
    assert parse_box(text) == expected


def test_relative_boxes() -> None:
    box = parse_box("It is at [0.25, 0.5, 0.75, 1.0].", "relative")
    assert box == (0.25, 0.5, 0.75, 1.0)
    assert pixel_box(box, 640, 480, "relative") == (160.0, 240.0, 480.0, 480.0)
    with pytest.raises(ValueError, match="Unknown rule 'percent'"):
        parse_box("", "percent")


def test_a_written_box_covers_what_it_was_written_of() -> None:
    box = (100.0, 50.0, 300.0, 200.0)
    read = parse_box(box_text(box, 640, 480))
    assert read is not None and box_iou(pixel_box(read, 640, 480), box) > 0.98


def test_figures_by_hand() -> None:
    truth = (0.0, 0.0, 10.0, 10.0)
    figures = grounding_figures([truth, (0.0, 0.0, 10.0, 5.0), (10.0, 10.0, 0.0, 0.0), None], [truth] * 4)
    assert figures == {"accuracy": 0.5, "iou": 0.375, "center_accuracy": 0.75, "unparsed": 0.25, "count": 4}
    with pytest.raises(ValueError, match="no boxes"):
        grounding_figures([], [])
