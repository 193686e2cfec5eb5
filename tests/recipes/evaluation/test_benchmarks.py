# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Each benchmark end to end: files of the world in the real layout, a tiny DEEM and a tiny LLaVA, figures, page."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import checkpoint, lines_of, run

from recipes import evaluate
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.evaluation import write_pope


@pytest.fixture(params=["deem", "llava"])
def model(request: pytest.FixtureRequest) -> Path:
    return checkpoint(request.param)


def check(results: dict[str, Any], out: Path, name: str) -> dict[str, Any]:
    """What holds for every benchmark; returns its results."""
    result = results[name]
    lines = lines_of(out / name)
    assert json.loads((out / "results.json").read_text()).keys() == results.keys()
    assert len({line["id"] for line in lines}) == len(lines) == result["samples"]
    assert all(line["prompt"] and "raw" in line and "score" in line for line in lines)
    assert result["failed"] == [] and not evaluate.has_failed(results)
    for figure in result["figures"].values():
        assert figure["low"] is None or figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
        assert figure["count"] > 0
    assert result["headline"] in result["figures"]
    assert name in (out / "evaluation.html").read_text()
    return result


def test_pope(model: Path, tmp_path: Path) -> None:
    write_pope(tmp_path / "data" / "pope", World(), 4, HELD_OUT)
    results = run(model, tmp_path / "out", tmp_path / "data", "pope")
    figures = check(results, tmp_path / "out", "pope")["figures"]
    assert {"accuracy", "f1", "yes_ratio", "unparsed", "random_f1", "adversarial_accuracy", "mean_f1"} <= set(figures)
    assert any(name.startswith(("official_rule_", "deem_rule_")) for name in figures)
    assert figures["accuracy"]["chance"] == 0.5 and figures["accuracy"]["clusters"] == 4
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
