# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every tutorial from top to bottom on tiny parts, and what it promises."""

import json
import os
from pathlib import Path

import pytest
import torch
from deem_fixtures import SIDE
from pages import ROOT, definitions_of, run_page
from PIL import Image
from reader_material import save_material
from transformers import AutoModel, CLIPModel
from vlm_fixtures import tiny_vlm, vision_tower

from modeling_deem import DeemFeedback

pytestmark = pytest.mark.usefixtures("one_thread")
TUTORIALS = ROOT / "docs" / "tutorials"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_material(folder)
    return folder


@pytest.fixture
def home(material: Path, tmp_path: Path) -> Path:
    """A reader's folder: the material by its names, and nothing else."""
    for part in material.iterdir():
        os.symlink(part, tmp_path / part.name)
    return tmp_path


def losses(run: Path, name: str) -> list[float]:
    """The logged values of one loss of a run, in order."""
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [log[name] for log in logs if name in log]


def test_train_on_own_images(home: Path) -> None:
    names = run_page(TUTORIALS / "own_images.md", home)
    assert names["counts"]["rows"] == 50 and names["counts"]["skipped"] == {}
    assert {*names["report"]} == {"photos"}
    read = losses(home / "runs/photos", "text_loss")
    assert len(read) >= 4 and read[-1] < 0.9 * read[0]
    (answer,) = map(json.loads, (home / "outputs/photos/answers.jsonl").read_text().splitlines())
    assert answer["text"] == "What color is the card?"
    assert Image.open(home / "outputs/photos/reconstruction_0_0.png").size == (SIDE, SIDE)
    assert (home / "runs/photos/report.html").is_file()
    answered = losses(home / "runs/photos_questions", "text_loss")
    assert answered[-1] < answered[0]


def test_add_the_feedback_to_a_vision_language_model(home: Path) -> None:
    names = run_page(TUTORIALS / "vision_language_model.md", home)
    assert type(names["model"]).__module__ == "transformers.models.llava.modeling_llava"
    for log in (home / "runs/vlm", None):
        logged = (
            losses(log, "consistency_loss")
            if log
            else [x["consistency_loss"] for x in names["trainer"].state.log_history if "consistency_loss" in x]
        )
        assert len(logged) >= 3 and all(0 < one < 10 for one in logged)
    encoder = names["model"].model.vision_tower
    assert any(one.grad is not None and one.grad.any() for one in encoder.parameters())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_loop_of_that_page_fits_qwen(home: Path, family: str) -> None:
    """The page's own function, with a Qwen-VL of transformers' class and images of two sizes."""
    names = definitions_of(TUTORIALS / "vision_language_model.md", "training_step")
    vlm = tiny_vlm(family)
    feedback = DeemFeedback.from_diffusion_pretrained(str(home / "diffusion"), model=vlm.model)
    targets = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = vlm.collate([vlm.row(0), vlm.row(1)])
    names["training_step"](vlm.model.train(), feedback, batch, targets).backward()
    assert all(one.grad is not None for one in vision_tower(vlm.model).parameters())


def test_refine_clip(home: Path) -> None:
    names = run_page(TUTORIALS / "refine_clip.md", home)
    assert type(names["refined"]) is CLIPModel and len(names["steps"]) >= 2
    assert 0 <= names["report"]["drift"]["zero_shot_agreement"] <= 1
    before = CLIPModel.from_pretrained(home / "clip").state_dict()
    moved = {name for name, value in names["refined"].state_dict().items() if not value.equal(before[name])}
    assert moved and all(name.startswith("vision_model.") for name in moved)
    assert "mmvp_vlm" in json.loads((home / "runs/clip_comparison/comparison.json").read_text())


def test_bring_other_parts(home: Path) -> None:
    names = run_page(TUTORIALS / "other_parts.md", home)
    assert torch.equal(names["alone"], names["joined"])
    assert names["drawn"].shape == (1, 3, SIDE, SIDE) and names["drawn"].isfinite().all()
    logs = names["joints"].state.log_history
    assert {"text_loss", "image_loss", "consistency_loss"} <= logs[0].keys()
    start = AutoModel.from_pretrained(home / "vision").state_dict()
    for run, moves in (("joints", False), ("whole", True)):
        encoder = AutoModel.from_pretrained(home / "runs" / run).model.vision_tower.encoder.state_dict()
        assert any(not value.equal(start[name]) for name, value in encoder.items()) == moves
    assert not (home / "runs/planned/model.safetensors").exists()


def test_evaluate_and_compare(home: Path) -> None:
    names = run_page(TUTORIALS / "evaluate_and_compare.md", home)
    assert all(0 <= one["value"] <= 1 for one in names["results"]["pope"]["figures"].values())
    assert list(names["comparison"]) == ["pope"]
    assert len(names["images"]) == 4 and (names["found"].image_errors > 0).all()


def test_several_gpus(home: Path) -> None:
    names = run_page(TUTORIALS / "several_gpus.md", home)
    assert names["logs"][-1]["step"] == 3
    assert len(list((home / "runs/two").glob("checkpoint-3/data_position_*.pt"))) == 2  # one per process


def test_publish(home: Path) -> None:
    names = run_page(TUTORIALS / "publish.md", home)
    card = (home / names["folder"] / "README.md").read_text()
    assert "me/cards" in card and type(names["model"]).__name__ == "DeemForConditionalGeneration"
    assert "auto_map" in json.loads((home / names["folder"] / "config.json").read_text())
