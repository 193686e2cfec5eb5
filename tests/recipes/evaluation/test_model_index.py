# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Benchmarks in the model card: the model-index that the Hub reads, tables with intervals, and whose weights they are of."""

import json
from pathlib import Path

import pytest
from evaluation_fixtures import checkpoint, run
from huggingface_hub import ModelCard

import hub_upload
from recipes.run_report.card import write_card
from recipes.run_report.model_index import benchmark_tables, eval_results
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers import write_formats


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("index")
    write_formats(folder / "data", World(), 3, HELD_OUT, "medium", ["pope"])
    run(checkpoint("deem"), folder / "out", folder / "data", "pope", limit=4)
    return json.loads((folder / "out" / "results.json").read_text())


def test_the_card_has_a_model_index_and_a_table(results: dict, tmp_path: Path) -> None:
    deem, pope = checkpoint("deem"), results["pope"]
    hub_upload.make_repo(deem, tmp_path / "repo")
    more = {"benchmarks": eval_results(results), "benchmark_tables": benchmark_tables(results)}
    write_card(tmp_path / "repo", deem, "org/mine", {}, **more)
    card = ModelCard.load(tmp_path / "repo" / "README.md")
    (accuracy,) = [one for one in card.data.eval_results if one.metric_type == "accuracy"]
    figure = pope["figures"]["accuracy"]
    assert accuracy.metric_value == figure["value"] and accuracy.dataset_type == "pope"
    assert accuracy.metric_args == {"low": figure["low"], "high": figure["high"], "confidence": 0.95}
    assert accuracy.dataset_args == {"protocol": "deem", "samples": pope["samples"], "partial": True}
    assert "partial" in accuracy.metric_name and card.data.model_name == "mine"
    assert {one.metric_type for one in card.data.eval_results} == {"accuracy", "f1"}
    rows = [line for line in card.text.splitlines() if line.startswith("| accuracy |")]
    assert rows == [
        f"| accuracy | {figure['value']:.4g} | {figure['low']:.4g} to {figure['high']:.4g} | 0.5 | {pope['samples']} |"
    ]
    assert "No figure" not in card.text and f"Partial: {pope['samples']} of" in card.text


def test_results_of_other_weights_are_refused(results: dict, tmp_path: Path) -> None:
    hub_upload.check_results(results, checkpoint("deem"))
    with pytest.raises(ValueError, match="measured on other weights"):
        hub_upload.check_results(results, checkpoint("llava"))
    with pytest.raises(ValueError, match="is no benchmark's result"):
        hub_upload.check_results({"color": {"value": 0.5}}, checkpoint("deem"))
