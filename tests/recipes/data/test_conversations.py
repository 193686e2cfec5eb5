# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LLaVA's conversations in the forms that people write them."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import fault, read_source, texts
from PIL import Image

from processing import DeemDataCollator

ASKED = "Based on the image, please answer the question. <image>"


def said(*turns: tuple[str, Any]) -> list[dict]:
    return [{"from": who, "value": text} for who, text in turns]


def write(folder: Path, *rows: Any) -> Path:
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "a.jpg")
    rows = [
        {"id": number, "image": "a.jpg", **row} if isinstance(row, dict) else row for number, row in enumerate(rows)
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


WHAT = (("human", "<image>\nWhat?"), ("gpt", "A thing."))


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"conversations": said(*WHAT)}, [[f"{ASKED}What?", "A thing."]]),
        ({"conversations": said(*WHAT), "image": ["a.jpg"]}, [[f"{ASKED}What?", "A thing."]]),
        ({"conversations": said(("user", "What?"), ("assistant", "A."))}, [[f"{ASKED}What?", "A."]]),
        ({"conversations": said(("human", "What?"), ("assistant", "A."))}, [[f"{ASKED}What?", "A."]]),
        ({"conversations": said(("system", "Be short."), *WHAT)}, [["Be short.", f"{ASKED}What?", "A thing."]]),
        ({"conversations": said(("system", " "), *WHAT)}, [[f"{ASKED}What?", "A thing."]]),
        (
            {"conversations": said(("system", "S"), *WHAT, ("human", "Why?"), ("gpt", "So."))},
            [["S", f"{ASKED}What?", "A thing."], ["S", f"{ASKED}Why?", "So."]],
        ),
    ],
)
def test_forms_that_are_read(tmp_path, tiny_processor, row, expected):
    samples, skipped = read_source(write(tmp_path, row), tiny_processor)
    expected = [[*before, f"The answer is {answer}"] for *before, answer in expected]
    assert sorted(map(texts, samples)) == sorted(expected) and not skipped
    for sample in samples:
        batch = DeemDataCollator(tiny_processor)([sample])
        trained = tiny_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
        assert trained == f" {texts(sample)[-1]}</s>"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"conversations": said(("human", "?"), ("gpt", ""))}, "question without answer"),
        ({"conversations": said(("human", "?"), ("gpt", None))}, "row of another layout"),
        ({"conversations": said(("gpt", "A."), ("human", "?"))}, "row of another layout"),
        ({"conversations": said(("human", "?"))}, "row of another layout"),
        ({"conversations": said(("human", "?"), ("tool", "A."))}, "row of another layout"),
        ({"conversations": said(("system", "S"))}, "row of another layout"),
        ({"conversations": []}, "row of another layout"),
        ({"conversations": "?"}, "row of another layout"),
        ({"conversations": said(*WHAT), "image": ["a.jpg", "a.jpg"]}, "conversation about several images"),
        ({"conversations": said(*WHAT), "image": "gone.jpg"}, "missing image"),
        ({"conversations": said(*WHAT), "image": 7}, "row of another layout"),
        (7, "row of another layout"),
    ],
)
def test_forms_that_are_counted(tmp_path, tiny_processor, row, reason):
    samples, skipped = read_source(write(tmp_path, {"conversations": said(*WHAT)}, row), tiny_processor)
    assert len(samples) == 1 and skipped == {reason: 1}


def test_a_system_turn_amid_a_conversation_costs_the_rounds_that_it_shifts(tmp_path, tiny_processor):
    turns = said(*WHAT, ("system", "S"), *WHAT)
    samples, skipped = read_source(write(tmp_path, {"conversations": turns}), tiny_processor)
    assert len(samples) == 1 and skipped == {"row of another layout": 2}


@pytest.mark.parametrize("name", ["system_first", "user_assistant", "image_list_one"])
def test_the_given_conversations(tiny_processor, name):
    samples, skipped = read_source(fault(f"llava/{name}"), tiny_processor)
    assert len(samples) == 6 and not skipped
