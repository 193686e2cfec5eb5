# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""MMVP-VLM: tiny two-tower models over pairs of the world, before and after another encoder."""

import csv
from pathlib import Path

import pytest
import torch
from evaluation_fixtures import checkpoint, lines_of, run, two_towers
from transformers import CLIPModel, CLIPVisionModel

from recipes import evaluate
from recipes.evaluation.benchmark import scored
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.evaluation.sources import DataSource
from recipes.evaluation.two_towers import TwoTowers, load_two_towers
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.image_benchmarks import write_mmvp_vlm


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_mmvp_vlm(folder / "mmvp_vlm", World(), 12, HELD_OUT)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pairs(kind: str, data: Path, tmp_path: Path) -> None:
    results = run(two_towers(kind), tmp_path, data, "mmvp_vlm", check_batching=3)
    result, lines = results["mmvp_vlm"], lines_of(tmp_path / "mmvp_vlm")
    figures = result["figures"]
    assert result["failed"] == [] and result["check_batching"] == {"checked": 3, "different": []}
    assert figures["pair_accuracy"]["chance"] == 0.25 and figures["accuracy"]["chance"] == 0.5
    assert figures["pair_accuracy"]["clusters"] * 2 == figures["accuracy"]["count"] == len(lines) >= 10
    assert "Color and Appearance: pair_accuracy" in figures and "mean_of_types" in figures
    assert all(line["prompt"].startswith("a photo of ") and len(line["images"]) == 2 for line in lines)
    # by hand: each statement with both images, one at a time
    model, processor = load_two_towers(two_towers(kind))
    for line in lines[:4]:
        towers = TwoTowers(model, processor)
        images = [source.read()[0] for source in _sample(data, line["id"]).images]
        text = towers.text_features([line["prompt"]])[0]
        near = [float(towers.image_features([image])[0] @ text) for image in images]
        assert line["raw"] == str(1 + int(near[1] >= near[0]))
        assert sum(line["option_scores"]) == pytest.approx(1)


def _sample(data: Path, name: str):
    loaded = BENCHMARKS["mmvp_vlm"].load(DataSource("mmvp_vlm", str(data)))
    return next(sample for sample in loaded.samples if sample.id == name)


def test_a_refined_encoder_is_measured_in_its_place(data: Path, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(two_towers("clip"))
    before = run(two_towers("clip"), tmp_path / "before", data, "mmvp_vlm")
    same = CLIPVisionModel.from_pretrained(two_towers("clip"))
    same.save_pretrained(tmp_path / "same")
    torch.manual_seed(1)
    for weight in same.parameters():
        weight.data += torch.randn_like(weight) * 0.5
    same.save_pretrained(tmp_path / "refined")
    model.vision_model.load_state_dict(same.state_dict())
    model.save_pretrained(tmp_path / "whole")
    for name, expected in (("same", lines_of(tmp_path / "before" / "mmvp_vlm")), ("refined", None), ("whole", None)):
        results = run(two_towers("clip"), tmp_path / f"of {name}", data, "mmvp_vlm", encoder=str(tmp_path / name))
        shares = [line["option_scores"] for line in lines_of(tmp_path / f"of {name}" / "mmvp_vlm")]
        if expected:
            assert shares == [line["option_scores"] for line in expected]
            assert results["mmvp_vlm"]["figures"] == before["mmvp_vlm"]["figures"]
        else:
            assert shares != [line["option_scores"] for line in lines_of(tmp_path / "before" / "mmvp_vlm")]
    assert lines_of(tmp_path / "of whole" / "mmvp_vlm") == lines_of(tmp_path / "of refined" / "mmvp_vlm")
    with pytest.raises(ValueError, match="model.encoder"):  # another encoder is another evaluation
        run(two_towers("clip"), tmp_path / "of same", data, "mmvp_vlm", encoder=str(tmp_path / "refined"))


def test_what_is_no_pair_of_towers_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model with get_image_features and get_text_features"):
        run(checkpoint("deem"), tmp_path, data, "mmvp_vlm")
    with pytest.raises(ValueError, match="does not fit CLIPModel"):
        run(two_towers("clip"), tmp_path, data, "mmvp_vlm", encoder=str(two_towers("siglip")))
    with pytest.raises(ValueError, match="cannot be asked without images"):
        run(two_towers("clip"), tmp_path, data, "mmvp_vlm", without_images=True)
    assert not (tmp_path / "mmvp_vlm" / "predictions.jsonl").exists()


def test_pairs_and_types_are_counted() -> None:
    benchmark, lines = BENCHMARKS["mmvp_vlm"], []
    rows = [("a", "11"), ("a", "10"), ("a", "01"), ("a", "00"), ("b", "11")]  # type, right statements of the pair
    for number, (kind, right) in enumerate(rows):
        for place, mark in enumerate(right):
            truth = str(place + 1)
            line = {"id": f"{number}/{place}", "truth": truth, "cluster": f"pair {number}", "group": kind}
            lines.append(scored(benchmark, line | {"raw": truth if mark == "1" else "3"}))
    figures = benchmark.figures(lines)
    assert figures["pair_accuracy"].value == 0.4 and figures["accuracy"].value == 0.6
    assert figures["a: pair_accuracy"].value == 0.25 and figures["b: pair_accuracy"].value == 1
    assert figures["mean_of_types"].value == 0.625


def test_rows_and_images_that_cannot_be_used_fail_alone(tmp_path: Path) -> None:
    write_mmvp_vlm(tmp_path / "data", World(), 6, HELD_OUT)
    file = tmp_path / "data" / "Questions.csv"
    rows = list(csv.reader(file.open(newline="")))
    rows[1][2] = ""
    next((tmp_path / "data").glob("MLLM_VLM Images/*/3.jpg")).unlink()
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    results = run(two_towers("clip"), tmp_path / "out", tmp_path / "data", "mmvp_vlm")
    assert {one["id"] for one in results["mmvp_vlm"]["failed"]} == {"row/1", "3", "4"}
    assert evaluate.has_failed(results)
