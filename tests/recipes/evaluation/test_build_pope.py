# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/build_pope.py: POPE of any instance annotation."""

import json
from collections import Counter
from pathlib import Path

import pytest
from evaluation_fixtures import checkpoint, run

from recipes.build_pope import BuildArguments, absent_classes, classes_of_images, main, question
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.regions import write_coco_instances


def test_questions_are_true_and_can_be_asked(tmp_path: Path) -> None:
    write_coco_instances(tmp_path, World(), 12, HELD_OUT)
    file = tmp_path / "annotations" / "instances_train2017.json"
    (tmp_path / "train2017").rename(tmp_path / "val2014")
    arguments = BuildArguments(str(file), str(tmp_path / "pope"), num=4, objects=2)
    header = main(arguments)
    classes = classes_of_images(json.loads(file.read_text()))
    for kind in ("random", "popular", "adversarial"):
        lines = [json.loads(one) for one in (tmp_path / "pope" / f"coco_pope_{kind}.json").read_text().splitlines()]
        assert len(lines) == header["questions"][kind] == header["images"] * 4
        assert Counter(line["label"] for line in lines) == {"yes": len(lines) / 2, "no": len(lines) / 2}
        assert len({(line["image"], line["text"]) for line in lines}) == len(lines)
        for line in lines:
            named = [name for name in set().union(*classes.values()) if question(name) == line["text"]]
            assert (named[0] in classes[line["image"]]) == (line["label"] == "yes")
    assert main(arguments) == header
    results = run(checkpoint("llava"), tmp_path / "out", tmp_path / "pope", "pope")
    assert results["pope"]["failed"] == [] and results["pope"]["samples"] == 3 * header["images"] * 4


def test_absent_classes_are_chosen_by_the_kind_of_set() -> None:
    frequent = Counter({"car": 9, "cup": 2, "fork": 1})
    beside = {"dog": Counter({"cup": 5}), "table": Counter({"fork": 4, "cup": 3})}
    chosen = [
        absent_classes(kind, ["dog", "table"], ["fork", "cup", "car"], frequent, beside)
        for kind in ("random", "popular", "adversarial")
    ]
    assert chosen == [["fork", "cup"], ["car", "cup"], ["cup", "fork"]]
    assert question("apple") == "Is there an apple in the image?"


def test_annotations_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --instances"):
        main(BuildArguments())
    file = tmp_path / "other.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match="COCO's form"):
        main(BuildArguments(str(file)))
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    with pytest.raises(ValueError, match="No image"):
        main(BuildArguments(str(file)))
