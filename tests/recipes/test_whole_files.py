# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A full disk or a folder that takes no file: words that say what to do, and no half of a file in place of a whole one."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from recipes.evaluation.predictions import PredictionFile, write_lines
from recipes.run_report.page import write_report
from recipes.run_report.plots import plot_curve
from recipes.training.latent_cache import write_shard
from recipes.whole_files import check_writable, whole_file, write_whole

AGAIN = "Make room or write access, or name another folder, and start the same command again"


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may pass `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_file_never_takes_the_place_of_a_whole_one(tmp_path):
    file = tmp_path / "deeper" / "a.json"
    write_whole(file, "old")
    with full_disk(4096), pytest.raises(OSError, match=rf"a.json could not be written \(OSError: .*{AGAIN}"):
        write_whole(file, "new" * 4096)
    assert file.read_text() == "old" and os.listdir(file.parent) == ["a.json"]
    write_whole(file, "new")
    assert file.read_text() == "new" and os.listdir(file.parent) == ["a.json"]
    with pytest.raises(ZeroDivisionError), whole_file(file) as unfinished:  # what is no fault of the disk stays itself
        unfinished.write_text("half")
        1 / 0  # noqa: B018
    assert file.read_text() == "new"


def test_a_folder_that_takes_no_file_is_refused_before_anything_is_computed(tmp_path):
    """Permissions do not bind root: a file stands where the folder would be."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"Nothing can be written to {folder} .*{AGAIN}"):
            check_writable(folder)
    check_writable(tmp_path / "a" / "b")
    assert not os.listdir(tmp_path / "a" / "b")


def test_predictions_go_on_behind_the_last_whole_line(tmp_path):
    predictions, lines = (
        PredictionFile(tmp_path),
        [{"id": str(number), "prediction": "x" * 500} for number in range(6)],
    )
    predictions.append(lines[:2])
    with full_disk(1500), pytest.raises(OSError, match=f"predictions.jsonl could not be written .*{AGAIN}"):
        predictions.append(lines[2:])
    assert (tmp_path / "predictions.jsonl").stat().st_size == 1500 and predictions.join() == lines[:2]
    with full_disk(500), pytest.raises(OSError, match=f"predictions.jsonl could not be written .*{AGAIN}"):
        write_lines(tmp_path / "predictions.jsonl", lines)
    predictions.append(lines[2:])
    assert predictions.join() == lines and os.listdir(tmp_path) == ["predictions.jsonl"]


def test_latents_plots_and_reports_are_whole_or_not_there(tmp_path):
    latents = {"a" * 32: torch.zeros(8, 16, 16)}
    path = tmp_path / "latents" / "000-00000.safetensors"
    with full_disk(4096), pytest.raises(OSError, match=f"000-00000.safetensors could not be written .*{AGAIN}"):
        write_shard(path, latents, "vae", "transform")
    assert not os.listdir(path.parent)
    write_shard(path, latents, "vae", "transform")
    with safe_open(path, "pt") as shard:
        assert set(shard.keys()) == set(latents)

    with full_disk(1000), pytest.raises(OSError, match=f"curve.png could not be written .*{AGAIN}"):
        plot_curve([1, 2], [3.0, 4.0], "loss", tmp_path / "curve.png")
    assert not list(tmp_path.glob("curve*"))
    assert Image.open(plot_curve([1, 2], [3.0, 4.0], "loss", tmp_path / "curve.png")).format == "PNG"

    figure = {"what": "colors", "value": 0.71, "aim": 0.6, "chance": 0.18, "count": 500}
    (tmp_path / "metrics.json").write_text(json.dumps({"color": figure}))
    whole = write_report(tmp_path).read_text()
    with full_disk(1000), pytest.raises(OSError, match=f"report.html could not be written .*{AGAIN}"):
        write_report(tmp_path)
    assert Path(tmp_path / "report.html").read_text() == whole
