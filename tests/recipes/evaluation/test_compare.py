# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/compare.py: two evaluations of the same samples."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation_fixtures import checkpoint, lines_of, run

from recipes.compare import CompareArguments, main
from recipes.evaluation.predictions import write_lines
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.evaluation import write_pope


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    write_pope(folder / "data", World(), 8, HELD_OUT)
    run(checkpoint("llava"), folder / "out", folder / "data", "pope")
    return folder / "out"


def answered(first: Path, out: Path, answer: str | None) -> Path:
    """The evaluation of another model, which gives this answer, or the right one where it is None."""
    shutil.copytree(first, out)
    lines = [line | {"raw": answer or line["truth"].capitalize()} for line in lines_of(first / "pope")]
    write_lines(out / "pope" / "predictions.jsonl", lines)
    return out


def compared(first: Path, second: Path, out: Path) -> dict:
    return main(CompareArguments(folders=[str(first), str(second)], out=str(out)))["pope"]


def test_a_model_does_not_differ_from_itself(first: Path, tmp_path: Path) -> None:
    result = compared(first, first, tmp_path)
    assert result["difference"] == 0 and result["p_value"] == 1 and not result["significant"]
    assert result["changed"] == []


def test_a_better_model_is_better_and_what_changed_is_shown(first: Path, tmp_path: Path) -> None:
    worse, better = (answered(first, tmp_path / name, said) for name, said in (("worse", "yes"), ("better", None)))
    result = compared(worse, better, tmp_path / "out")
    assert result["second"] == 1 and result["difference"] == pytest.approx(0.5)
    assert result["low"] <= 0.5 <= result["high"] and result["significant"] and result["mcnemar"] < 0.05
    assert result["lost"] == 0 and result["gained"] == len(result["changed"]) == result["count"] / 2
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert result["changed"][0] in page and "data:image/png;base64" in page
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["pope"] == result
    back = compared(better, worse, tmp_path / "back")
    assert back["difference"] == -result["difference"] and back["p_value"] == result["p_value"]


@pytest.mark.parametrize("change", ["protocol", "annotations", "ids", "benchmarks"])
def test_other_protocols_and_samples_are_refused(change: str, first: Path, tmp_path: Path) -> None:
    second = answered(first, tmp_path / "second", "yes")
    manifest = json.loads((second / "pope" / "manifest.json").read_text())
    if change == "ids":
        lines = lines_of(second / "pope")
        write_lines(second / "pope" / "predictions.jsonl", [lines[0] | {"id": "another"}, *lines[1:]])
    elif change == "benchmarks":
        (second / "pope").rename(second / "other")
    else:
        new = {"protocol": "deem"} if change == "protocol" else {"annotations": {}}
        (second / "pope" / "manifest.json").write_text(json.dumps(manifest | new))
    with pytest.raises(ValueError, match="Nothing to compare" if change == "benchmarks" else change):
        compared(first, second, tmp_path / "out")
    with pytest.raises(ValueError, match="Two evaluations"):
        main(CompareArguments(folders=[str(first)]))
