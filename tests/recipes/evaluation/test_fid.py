# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Drawings of captions: kept as files, the same for any batch, and distances by features of any extractor."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deem_fixtures import tiny_model
from evaluation_fixtures import checkpoint, lines_of, run, two_towers
from family_fixtures import save_diffusion
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from processing import DeemProcessor
from recipes import evaluate
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.evaluation.extractors import load_extractor
from recipes.evaluation.inception import InceptionV3, load_inception
from recipes.evaluation.scoring.frechet import frechet_distance, kid
from recipes.evaluation.sources import DataSource
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.benchmarks import write_captioned
from recipes.synthetic.writers.captions import write_narratives

CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 2, "batch_size": 4}
pytestmark = pytest.mark.filterwarnings("ignore:.*too few for")


def mean_colors(images: Any) -> np.ndarray:
    """An extractor: the mean of each channel and of a quarter of the image."""
    pixels = [np.asarray(image.resize((8, 8)), dtype=np.float32) / 255 for image in images]
    return np.array([np.concatenate([one.mean((0, 1)), one[:4, :4].mean((0, 1))]) for one in pixels])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_captioned(folder / "coco", World(), 7, HELD_OUT)
    return folder / "coco"


@pytest.fixture(scope="module")
def deem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DEEM that draws."""
    folder = tmp_path_factory.mktemp("deem")
    tiny_model(text_config={"max_position_embeddings": 1024}).save_pretrained(folder)
    DeemProcessor.from_pretrained(checkpoint("deem")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion of diffusers."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_diffusion(folder)
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 16}))
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(deem: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven captions drawn."""
    out = tmp_path_factory.mktemp("drawn")
    results = run(deem, out, data, "fid", **QUICK)
    assert results["fid"]["figures"]["drawn"]["value"] == 1 and not evaluate.has_failed(results)
    return out


def test_drawings_are_files_and_the_same_for_any_batch(deem: Path, data: Path, drawn: Path, tmp_path: Path) -> None:
    lines = lines_of(drawn / "fid")
    assert len(lines) == 7 and all("Reconstruct the full image" in line["prompt"] for line in lines)
    assert all(line["images"][0]["name"] == line["raw"] and len(line["images"]) == 2 for line in lines)
    run(deem, tmp_path, data, "fid", **QUICK | {"batch_size": 1})
    for line, other in zip(lines, lines_of(tmp_path / "fid"), strict=True):
        first, second = (np.asarray(Image.open(out / "fid" / line["raw"]), int) for out in (drawn, tmp_path))
        assert line["raw"] == other["raw"] and np.abs(first - second).max() <= 1 and first.std() > 0
    assert (drawn / "evaluation.html").read_text().count("data:image") == 14  # each drawing beside the real image


def test_a_killed_run_draws_only_what_is_missing(deem: Path, data: Path, drawn: Path, tmp_path: Path) -> None:
    out = shutil.copytree(drawn, tmp_path / "out")
    file = out / "fid" / "predictions.jsonl"
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join(lines[:3]) + b"\n")
    files = {one: one.stat().st_mtime_ns for one in (out / "fid" / "drawings").iterdir()}
    run(deem, out, data, "fid", **QUICK)
    again = {one for one, time in files.items() if one.stat().st_mtime_ns != time}
    assert len(again) == 4 and [line["id"] for line in lines_of(out / "fid")] == [
        line["id"] for line in lines_of(drawn / "fid")
    ]
    with pytest.raises(ValueError, match="generation.num_inference_steps"):
        run(deem, out, data, "fid", **QUICK | {"num_inference_steps": 3})


def test_distances_by_any_extractor(drawn: Path, dino: Path, tmp_path: Path) -> None:
    out = shutil.copytree(drawn, tmp_path / "out")
    given = ["colors=test_fid:mean_colors", f"dinov2={dino}", f"clip={two_towers('clip')}"]
    results = evaluate.main(evaluate.EvaluateArguments(model="nowhere", score=str(out), extractors=given))
    figures = results["fid"]["figures"]
    for name in ("colors", "dinov2", "clip"):
        assert {f"fd_{name}", f"kid_{name}", f"kid_{name}_spread", f"precision_{name}", f"coverage_{name}"} <= set(
            figures
        )
    assert {"cmmd_clip", "clip_score_clip", "clip_similarity_clip"} <= set(figures)
    assert not any(name.startswith("fid") for name in figures)  # none of them is Inception
    assert figures["clip_score_clip"]["clusters"] == 7 and figures["clip_score_clip"]["low"] is not None
    lines = lines_of(out / "fid")
    fake = mean_colors([Image.open(out / "fid" / line["raw"]) for line in lines])
    real = mean_colors([Image.open(line["images"][1]["file"]).convert("RGB") for line in lines])
    assert figures["fd_colors"]["value"] == pytest.approx(frechet_distance(real, fake), rel=1e-5)
    assert figures["kid_colors"]["value"] == pytest.approx(kid(real, fake).value, abs=1e-6)
    assert any(note.startswith("dinov2: encoder, bicubic to 28, squashed") for note in results["fid"]["notes"])
    # scored again from the features alone
    shutil.rmtree(out / "fid" / "drawings")
    again = evaluate.main(evaluate.EvaluateArguments(model="nowhere", score=str(out)))
    assert again["fid"]["figures"] == figures
    (out / "fid" / "features" / "dinov2.npz").unlink()
    with pytest.raises(ValueError, match="is gone or another"):
        evaluate.main(evaluate.EvaluateArguments(model="nowhere", score=str(out), extractors=given))


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names and in the shapes of the usual file, as old as it: without counters of batches."""
    torch.manual_seed(0)
    weights = {name: value for name, value in InceptionV3().state_dict().items() if "num_batches" not in name}
    file = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, file)
    return file


def test_inception_has_the_usual_file_s_weights(inception_weights: Path, tmp_path: Path) -> None:
    weights = torch.load(inception_weights)
    assert len(weights) == 472 and sum(one.numel() for one in InceptionV3().parameters()) == 23_850_960
    shapes = {  # torchvision's names
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch3x3dbl_3.bn.running_var": (96,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
        "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
        "fc.weight": (1008, 2048),
    }
    assert {name: tuple(weights[name].shape) for name in shapes} == shapes
    model, sha = load_inception(inception_weights)
    assert len(sha) == 64 and model(torch.rand(1, 3, 40, 60)).shape == (1, 2048)
    torch.save(weights | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match=r"fc.weight: \(1000, 2048\) instead of \(1008, 2048\)"):
        load_inception(tmp_path / "imagenet.pth")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no file of weights"):
        load_inception(tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="No Inception weights"):
        load_extractor("inception", str(tmp_path / "none.pth"), CPU)


def test_the_word_fid_is_for_inception(drawn: Path, inception_weights: Path, tmp_path: Path) -> None:
    out = shutil.copytree(drawn, tmp_path / "out")
    given = [f"inception={inception_weights}"]
    results = evaluate.main(evaluate.EvaluateArguments(model="nowhere", score=str(out), extractors=given))
    figures = results["fid"]["figures"]
    assert {"fid", "fid_released_64px", "kid_inception"} <= set(figures) and results["fid"]["headline"] == "fid"
    assert next(iter(figures)) == "fid" and figures["fid"]["count"] == 7
    assert any("NOT the usual weights" in note for note in results["fid"]["notes"])  # they are random
    assert any("too few for 2048 features" in note for note in results["fid"]["notes"])


def test_a_pipeline_of_diffusers_draws_and_the_best_by_clip_is_kept(
    pipeline: Path, data: Path, tmp_path: Path
) -> None:
    options = QUICK | {
        "num_inference_steps": 6,
        "drawings_per_caption": 3,
        "rank_by": str(two_towers("clip")),
        "limit": 3,
        "check_batching": 1,
    }
    results = run(pipeline, tmp_path, data, "fid_karpathy", **options)
    result, lines = results["fid_karpathy"], lines_of(tmp_path / "fid_karpathy")
    assert (
        result["check_batching"]["checked"] == 1 and len(list((tmp_path / "fid_karpathy" / "drawings").iterdir())) == 3
    )
    assert result["failed"] == [] and result["partial"] and result["manifest"]["protocol"] == "standard"
    assert all(line["prompt"] == line["asked"] and len(line["option_scores"]) == 3 for line in lines)
    figures = result["figures"]
    assert figures["ranker_score_kept"]["value"] >= figures["ranker_score_first"]["value"]
    assert "unet/config.json" in result["manifest"]["model"]["pipeline"] and "rank_by" in result["manifest"]["model"]
    with pytest.raises(ValueError, match="needs --rank_by"):
        run(pipeline, tmp_path / "none", data, "fid", **QUICK, drawings_per_caption=2)
    with pytest.raises(ValueError, match="--scheduler is that of a DEEM"):
        run(pipeline, tmp_path / "none", data, "fid", **QUICK, scheduler="DDIMScheduler")


def test_narratives_are_drawn_so_that_images_count_alike(tmp_path: Path) -> None:
    write_narratives(tmp_path, World(), 5, HELD_OUT, split="val2017")
    file = tmp_path / "coco_val_captions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *[rows[0]] * 20]) + '{"image_id": 3}\n')
    samples = BENCHMARKS["fid_ln_coco"].load(DataSource("fid_ln_coco", str(tmp_path))).samples
    assert len(samples) == 31 and "caption" in samples[-1].fault  # 6 an image, and the broken row
    first = sum(sample.cluster == samples[0].images[0].name for sample in samples[:-1])
    assert 1 <= first <= 14 and samples[0].asked.startswith("In this image we can see")
    assert all(sample.images[0].read() for sample in samples[:-1])


def test_what_draws_nothing_is_refused(data: Path, drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no image decoder"):
        run(checkpoint("llava"), tmp_path, data, "fid")
    with pytest.raises(ValueError, match="Nothing that draws"):
        run(tmp_path, tmp_path, data, "fid")
    for given, said in ((["clip"], "NAME=WHERE"), (["a=b:c", "a=b:c"], "twice"), (["a=b.c:d"], "No extractor")):
        with pytest.raises(ValueError, match=said):
            evaluate.main(evaluate.EvaluateArguments(score=str(drawn), extractors=given))


def test_real_images_that_cannot_be_read_are_listed(deem: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "data")
    next((broken / "val2014").glob("*03.jpg")).write_bytes(b"none")
    results = run(deem, tmp_path / "out", broken, "fid", **QUICK, extractors=["colors=test_fid:mean_colors"])
    result = results["fid"]
    assert len(result["failed"]) == 1 and evaluate.has_failed(results)
    assert result["figures"]["fd_colors"]["count"] == 6 and result["figures"]["drawn"]["count"] == 7
