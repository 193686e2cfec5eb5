# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CHAIR among the figures of COCO's captions: objects that a caption names and the image does not show."""

import json
from pathlib import Path

import pytest
from evaluation_fixtures import checkpoint, lines_of, run

from recipes.evaluation.benchmark import scored
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.evaluation.benchmarks.captions import chair_figures
from recipes.evaluation.scoring.coco_words import COCO_WORDS
from recipes.evaluation.scoring.hallucination import named_objects, read_synonyms
from recipes.evaluation.sources import DataSource
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT, KINDS
from recipes.synthetic.writers.benchmarks import write_captioned


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")  # without Java
    write_captioned(tmp_path / "data" / "coco", World(), 6, HELD_OUT)
    return tmp_path / "data"


def test_chair_of_captions(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run(checkpoint("llava"), tmp_path / "out", data, "coco")
    result, lines = results["coco"], lines_of(tmp_path / "out" / "coco")
    assert {"chair_i", "chair_s", "chair_recall"} <= set(result["figures"])
    assert result["figures"]["chair_s"]["count"] == 6 and any("the package's own" in note for note in result["notes"])
    assert "coco: chair: objects of 6 of 6" in capsys.readouterr().out
    benchmark = BENCHMARKS["coco"]
    right = [scored(benchmark, line | {"raw": line["truth"][2]}) for line in lines]
    figures = benchmark.figures(right)
    assert figures["chair_i"].value == figures["chair_s"].value == 0 and figures["chair_recall"].value > 0.8
    absent = [next(kind for kind in KINDS if kind not in line["about"]["objects"]) for line in lines]
    both = [f"a {line['about']['objects'][0]} and a {kind}" for line, kind in zip(lines, absent, strict=True)]
    wrong = benchmark.figures([scored(benchmark, line | {"raw": one}) for line, one in zip(lines, both, strict=True)])
    assert wrong["chair_s"].value == 1 and wrong["chair_i"].value == 0.5
    failed = [scored(benchmark, line | {"error": "missing image", "raw": ""}) for line in lines]
    assert benchmark.figures(failed)["chair_s"].value == 1


def test_without_objects_it_is_said_before(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "coco" / "annotations" / "instances_val2014.json").unlink()
    results = run(checkpoint("llava"), tmp_path / "out", data, "coco", limit=1)
    said = capsys.readouterr().out
    assert said.index("chair not computed: no instances_val2014.json") < said.index("coco (standard protocol)")
    assert not any(name.startswith("chair") for name in results["coco"]["figures"])


def test_the_words_that_are_given_count(data: Path, tmp_path: Path) -> None:
    words = data / "coco" / "synonyms.txt"
    words.write_text("circle, disc\nsquare\ntriangle\nstar\n")
    benchmark = BENCHMARKS["coco"]
    loaded = benchmark.load(DataSource("coco", str(data)))
    assert words in loaded.rows and any("CHAIR's synonyms.txt" in note for note in benchmark.notes(loaded))
    sample = next(one for one in loaded.samples if "circle" not in one.about["objects"])
    line = {"id": "1", "cluster": "1", "truth": ["x"], "about": sample.about, "parsed": "a disc"}
    assert chair_figures([line])["chair_s"].value == 1
    words.unlink()
    with pytest.raises(ValueError, match="not there any more"):
        chair_figures([line])
    file = data / "coco" / "annotations" / "instances_val2014.json"
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="no annotation in COCO's form"):
        benchmark.load(DataSource("coco", str(data)))


def test_the_words_of_coco() -> None:
    words = read_synonyms(COCO_WORDS)
    assert len(set(words.values())) == 80
    said = "Two women ride bikes beside a fire truck, eat hot dogs, and watch televisions on the couch."
    assert named_objects(said, words) == ["person", "bicycle", "truck", "hot dog", "tv", "couch"]
    assert named_objects("teddy bears on skis; a baseball bat", words) == ["teddy bear", "skis", "baseball bat"]
