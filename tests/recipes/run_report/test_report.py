# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The run report, on small run folders as the other recipes leave them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.run_report.page import write_report
from recipes.run_report.plots import plot_curve
from recipes.run_report.stages import StageLog, find_stages


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def log_history(steps: int) -> list[dict[str, float]]:
    """What the Trainer keeps: an entry per logged step and the summary at the end; one value is not finite."""
    history = [
        {
            "step": step,
            "loss": 9.0 / step,
            "text_loss": 4.0 / step,
            "image_loss": float("nan") if step == 20 else 0.5,
            "consistency_loss": 0.4,
            "learning_rate": 1e-4,
            "step_seconds": 0.2,
            "peak_memory_gb": 1.25,
        }
        for step in range(10, steps + 1, 10)
    ]
    return [*history, {"step": steps, "train_runtime": 90.0, "train_loss": 1.0}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages and an evaluation; the first stage was interrupted, its state lies in its checkpoints."""
    write_json(tmp_path / "pretrain" / "checkpoint-9" / "trainer_state.json", {"log_history": log_history(10)})
    write_json(tmp_path / "pretrain" / "checkpoint-100" / "trainer_state.json", {"log_history": log_history(100)})
    write_json(
        tmp_path / "pretrain" / "parts.json",
        {
            "vision_tower": {"trainable": 30_000, "frozen": 0, "lr": [1e-4, 2e-5], "weight_decay": [0.0, 0.05]},
            "image_decoder.vae": {"trainable": 0, "frozen": 90_000, "lr": [], "weight_decay": []},
        },
    )
    fault = {"count": 3, "examples": ["0.tar/<1>.jpg", "0.tar/2.jpg"]}
    write_json(
        tmp_path / "pretrain" / "data_report.json",
        {"captions": {"read": 12_345, "dropped_by_rule": 7, "skipped": {"unreadable image": fault}}},
    )
    write_json(tmp_path / "sft" / "trainer_state.json", {"log_history": log_history(30)})
    write_json(
        tmp_path / "evaluation" / "metrics.json",
        {
            "color": {"what": "colors", "value": 0.71, "aim": 0.6, "chance": 0.18, "count": 500},
            "drawing": {
                "what": "drawn",
                "value": 0.5,
                "aim": 0.7,
                "chance": 0.5,
                "count": 4,
                "each": {"red": 0, "blue": 1},
            },
            "consistency": {"what": "below", "value": 0.1, "aim": 0.25, "loss": 0.9, "reference": 1.0, "count": 500},
        },
    )
    images = {role: f"0_{role}.png" for role in ("input", "reconstruction", "drawn")}
    texts = {"caption": "a red star & more", "truth": "a red star"}
    answers = {"question": "What color is it?", "right_answer": "red", "answer": "Red."}
    write_json(tmp_path / "evaluation" / "samples" / "samples.json", [images | texts | answers, images | texts])
    drawing = {"prompt": "a red <star>", "color": "red", "dominant": "purple", "trained": False}
    drawings = [drawing, drawing | {"prompt": "a blue star", "color": "blue", "dominant": "blue", "trained": True}]
    drawings = [row | {"file": f"drawing_{number}.png"} for number, row in enumerate(drawings)]
    write_json(tmp_path / "evaluation" / "samples" / "drawings.json", drawings)
    for name in (*images.values(), *(row["file"] for row in drawings)):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "evaluation" / "samples" / name)
    return tmp_path


def test_report_is_self_contained_and_complete(run: Path) -> None:
    path = write_report(run, title="A <run>")
    html = path.read_text(encoding="utf-8")
    assert path == run / "report.html"
    sources = re.findall(r'src="([^"]{0,40})', html)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(?:href|url\()\s*=?", html), "the report must not need other files"

    assert "A &lt;run&gt;" in html and "pretrain → sft" in html
    assert '<b class="good">71.0%</b>' in html and '<b class="bad">10.0%</b>' in html
    assert "0.900 against 1.000" in html
    assert "a red star &amp; more" in html
    assert html.count("✓ Red.") == 1
    assert "red 0%, blue 100%" in html
    assert "a red &lt;star&gt;" in html and html.count("✗ purple") == html.count("never trained on") == 1
    assert "30,000" in html and "90,000" in html and "0.0001, 2e-05" in html
    assert "12,345" in html and "3 × unreadable image (0.tar/&lt;1&gt;.jpg, 0.tar/2.jpg)" in html
    assert "0.200 s" in html and "1.25 GB" in html and "1.5 min" in html

    drawn = {plot.name for plot in (run / "report").iterdir()}
    losses = {f"{stage}_{loss}_loss.png" for stage in ("pretrain", "sft") for loss in ("text", "image", "consistency")}
    assert losses | {"sheet.png", "drawings.png"} <= drawn
    for plot in (run / "report").iterdir():
        Image.open(plot).verify()


def test_stages_are_read_from_the_newest_state(run: Path) -> None:
    pretrain, sft = find_stages(run)
    assert (pretrain.name, sft.name) == ("pretrain", "sft")
    assert pretrain.history[-1]["step"] == 100  # checkpoint-100, not checkpoint-9
    steps, values = pretrain.curve("image_loss")
    assert 20 not in steps and len(steps) == len(values) == 9


def test_single_run_without_evaluation(run: Path) -> None:
    html = write_report(run / "pretrain").read_text(encoding="utf-8")
    assert "Losses" in html and "Answers" not in html and "Figures" not in html


def test_curve_of_one_point(tmp_path: Path) -> None:
    steps, values = StageLog("short", [{"step": 5, "loss": 2.0}], {}, {}).curve("loss")
    assert Image.open(plot_curve(steps, values, "loss", tmp_path / "loss.png")).size == (800, 500)


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run to report at .*missing"):
        write_report(tmp_path / "missing")
    with pytest.raises(ValueError, match="Nothing to report in .*trainer_state.json"):
        write_report(tmp_path)
