# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every example row of docs/data.md is read as it stands there."""

import re
from pathlib import Path

import pytest
from data_fixtures import read_source
from PIL import Image

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def examples() -> list[str]:
    """The rows of JSON in the table of own data."""
    section = DOCS.read_text().split("## Your own data")[1].split("\n## ")[0]
    return [row for row in re.findall(r"\| `(\{.*\})` \|", section) if "..." not in row]


@pytest.mark.parametrize("row", examples())
def test_an_example_row_is_read(tmp_path, tiny_processor, row):
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "cats" / "1.jpg")
    (tmp_path / "metadata.jsonl").write_text(row + "\n")
    (sample,), skipped = read_source(tmp_path, tiny_processor)
    assert len(sample["images"]) == 1 and not skipped


def test_there_are_examples_and_the_others_are_read(tmp_path, tiny_processor):
    assert len(examples()) >= 7
    section = DOCS.read_text()
    table = re.search(r"`(image,caption)` and below it `(.*)` \|", section)
    (tmp_path / "a" / "cats").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "cats" / "1.jpg")
    (tmp_path / "a" / "captions.csv").write_text(f"{table[1]}\n{table[2]}\n")
    (sample,), _ = read_source(tmp_path / "a", tiny_processor)
    assert sample["text"].replace("<image>", "") == "a cat, asleep"
    for label in ("grey_cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / label / "1.jpg")
    said = {sample["text"].replace("<image>", "") for sample in read_source(tmp_path / "photos", tiny_processor)[0]}
    assert said == {"grey cat", "dog"}
