# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/refine_encoder.py: tiny encoders under the feedback, from tars and folders to what AutoModel loads."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from family_fixtures import vision_config
from PIL import Image
from transformers import AutoModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel, ViTImageProcessorPil

from recipes import refine_encoder
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.refining import Images, drift

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
SMALL = {"num_queries": 4, "num_hidden_layers": 1}
FEEDBACK = {"image_size": 32, "width": 32, "num_layers": 1, "perceiver_config": SMALL, "connector_std": 0.3}
OPTIONS = [
    "--use_cpu",
    "true",
    "--disable_tqdm",
    "true",
    "--max_steps",
    "2",
    "--connector_steps",
    "2",
    "--logging_steps",
    "1",
]
OPTIONS += ["--per_device_train_batch_size", "4", "--drift_images", "6", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=64), 8, formats=["captions"])
    return str(folder / "captions")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    text = {
        **VIT,
        "vocab_size": 259,
        "max_position_embeddings": 24,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {**VIT, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("objective, tokens", [("denoise", "all"), ("contrastive", "global")])
def test_clip_keeps_its_text_tower(objective: str, tokens: str, clip: str, captions: str, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("ball\ncube\nstar\n")
    feedback = json.dumps({**FEEDBACK, "objective": objective, "tokens": tokens})
    out = ["--output_dir", str(tmp_path / "out"), "--class_names", str(names), "--keep", "1"]
    report = refine_encoder.main(["--encoder", clip, "--data", captions, "--feedback", feedback, *out, *OPTIONS])
    assert 0 <= report["drift"]["zero_shot_agreement"] <= 1
    logged = [entry for entry in report["log"]["encoder"] if "feedback_loss" in entry]
    assert len(logged) == 2 and logged[0]["distance"] == pytest.approx(0, abs=1e-5) and logged[1]["distance"] > 0
    before, after = AutoModel.from_pretrained(clip), AutoModel.from_pretrained(tmp_path / "out")
    assert type(after) is CLIPModel
    moved = {
        name for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)
    }
    assert moved and all(name.startswith("vision_model.") for name in moved)


def test_an_encoder_in_stages_and_a_folder_of_images(tmp_path: Path) -> None:
    encoder = AutoModel.from_config(vision_config("convnext"))
    encoder.save_pretrained(tmp_path / "encoder")
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "encoder")
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG nothing")
    options = [
        "--encoder",
        str(tmp_path / "encoder"),
        "--data",
        str(tmp_path / "images"),
        "--feedback",
        json.dumps(FEEDBACK),
    ]
    report = refine_encoder.main([*options, "--output_dir", str(tmp_path / "out"), *OPTIONS])
    assert report["skipped"] and "drift" not in report
    again = AutoModel.from_pretrained(tmp_path / "out")
    assert type(again) is type(encoder)
    assert any(not a.equal(b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))


def test_what_is_refused_and_what_drift_says(captions: str, tmp_path: Path) -> None:
    assert len(Images([captions])) == 8 and Images([captions])[0]["image"].size == (64, 64)
    with pytest.raises(ValueError, match="does not exist"):
        Images([str(tmp_path / "nowhere")])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="of no kind that is read"):
        Images([str(tmp_path / "*.txt")])
    found = drift(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), ["a", "a", None], ["a", "b"])
    assert found == pytest.approx({"zero_shot_agreement": 2 / 3, "zero_shot_before": 0.5, "zero_shot_after": 0.5})
