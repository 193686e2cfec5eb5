# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/inspect_image.py and recipes/seeing: the figures are the model's own, the maps lie where the errors do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from deem_fixtures import tiny_model
from PIL import Image
from transformers import BertConfig, BertModel

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes import inspect_image
from recipes.generation.checkpoint import make_scheduler
from recipes.generation.tasks import redraw_images
from recipes.run_report.page import write_report
from recipes.seeing.maps import color_map, overlay, sheet
from recipes.seeing.views import look
from recipes.synthetic.scenes import World

pytestmark = pytest.mark.usefixtures("one_thread")
LOOK = {"num_inference_steps": 2, "timesteps": [100, 500]}


@pytest.fixture(scope="module")
def model() -> DeemForConditionalGeneration:
    return tiny_model()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [World(seed=1).scene(0).image, World(seed=1, size=80).scene(1).image]


@pytest.fixture
def files(images: list[Image.Image], tmp_path: Path) -> list[str]:
    paths = [str(tmp_path / name) for name in ("first.png", "second.png")]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


def test_figures_are_the_models_own(model, tiny_processor: DeemProcessor, images: list[Image.Image]) -> None:
    first, second = look(model, tiny_processor, images, seeds=[5, 2], **LOOK)
    inputs = tiny_processor.image_processor(images[1], return_targets=True, return_tensors="pt")
    alone = model.image_error(**inputs, timesteps=[100, 500], per_token=True, seed=5)
    for name, value in alone.items():
        torch.testing.assert_close(second.error[name], value, rtol=1e-4, atol=1e-5, msg=name)
    (drawn,) = redraw_images(
        model,
        tiny_processor,
        images[1:],
        seed=2,
        num_inference_steps=2,
        scheduler=make_scheduler(model),
        guidance_scale=1.0,
    )
    assert np.abs(np.asarray(drawn, int) - np.asarray(second.redrawn[1], int)).max() <= 1  # of a batch: last bits
    assert np.asarray(first.redrawn[0] != second.redrawn[0]).any() and second.seeds == [5, 2]
    figures = second.figures()
    assert figures["error"] == pytest.approx(np.mean(list(figures["timesteps"].values())))
    assert len(figures["tokens"]) == alone.token_errors.shape[1]


def test_maps_add_up(model, tiny_processor: DeemProcessor, images: list[Image.Image]) -> None:
    view = look(model, tiny_processor, images[:1], seeds=[0], **LOOK)[0]
    mean = (view.error_map(100) + view.error_map(500)) / 2
    torch.testing.assert_close(view.error_map(), mean)
    assert float(mean.mean()) == pytest.approx(view.figures()["error"], rel=1e-5)
    for token, effect in enumerate(view.figures()["tokens"]):
        assert float(view.token_map(token).mean()) == pytest.approx(effect, abs=1e-6)
    with pytest.raises(ValueError, match=r"Timestep 7 was not looked at; \[100, 500\] were"):
        view.error_map(7)
    with pytest.raises(ValueError, match="an image has tokens 0 to "):
        view.token_map(99)
    bare = look(model, tiny_processor, images[:1], seeds=[0], per_token=False, **LOOK)[0]
    with pytest.raises(ValueError, match="per_token=True"):
        bare.token_map(0)


def test_of_a_region_the_rest_is_zero(model, tiny_processor: DeemProcessor, images: list[Image.Image]) -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[:, :32] = True
    whole, half = look(model, tiny_processor, [images[0]] * 2, seeds=[0], region_masks=[None, mask], **LOOK)
    side = half.error_map().shape[1]
    assert not half.error_map()[:, side // 2 :].any() and half.error_map()[:, : side // 2].all()
    assert not half.token_map(0)[:, side // 2 :].any() and whole.error_map().all()


def test_what_cannot_be_looked_at(tiny_processor: DeemProcessor, model, images: list[Image.Image]) -> None:
    tower = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(ValueError, match="A BertModel does not redraw images"):
        look(tower, tiny_processor, images)
    with pytest.raises(ValueError, match="Got 2 images and 0 seeds"):
        look(model, tiny_processor, images, seeds=[])


def test_cells_lie_where_their_pixels_do() -> None:
    values = torch.zeros(4, 4)
    values[1, 2] = 1.0
    shown = np.asarray(color_map(values, 1.0, (64, 64))).sum(-1)
    assert (shown[16:32, 32:48] > 600).all() and (np.delete(shown, slice(16, 32), axis=0) < 30).all()
    over = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), values, 1.0)).sum(-1)
    assert over[20, 40] > over[40, 20] > 0
    changes = np.asarray(color_map(values - 0.5, 1.0, (4, 4), signed=True)).astype(int)
    assert changes[1, 2, 0] > changes[1, 2, 2] and changes[0, 0, 2] > changes[0, 0, 0]  # red above 0, blue below
    assert sheet([[Image.new("RGB", (8, 8))] * 3, [Image.new("RGB", (8, 8))]]).size == (32, 20)


def test_page_sheets_and_report(model, tiny_processor: DeemProcessor, files: list[str], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    tiny_processor.save_pretrained(checkpoint)
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    tiny_processor.save_pretrained(other)
    run = tmp_path / "run"
    arguments = inspect_image.InspectArguments(
        model=str(checkpoint), against=str(other), images=files, out=str(run / "seen"), box=[0, 0, 32, 64], **LOOK
    )
    page = inspect_image.main(arguments).read_text()
    assert page.count("<img") == 4 and "first.png" in page and str(other) in page
    lines = json.loads((run / "seen" / "inspection.json").read_text())
    assert [line["image"] for line in lines] == ["first.png", "second.png"] and lines[0]["seeds"] == [0, 1, 2]
    errors = lines[0]["figures"]
    view = look(
        model, tiny_processor, files, region_masks=inspect_image.regions_of(arguments, 2), num_noise=4, **LOOK
    )[0]
    for kind, figures in view.figures().items():
        written = errors[str(checkpoint)][kind]
        if kind == "timesteps":
            written = {int(timestep): value for timestep, value in written.items()}  # JSON has names for keys
        assert written == pytest.approx(figures), kind
    assert errors[str(other)] != errors[str(checkpoint)]
    assert Image.open(run / "seen" / lines[0]["redrawn"]).size == (4 * 164 - 4, 4 * 164 - 4)
    (run / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="Nothing to look at"):
        inspect_image.main(inspect_image.InspectArguments(model=str(checkpoint)))
    (run / "trainer_state.json").write_text('{"log_history": [], "global_step": 0}')
    assert "What each token holds" in write_report(run).read_text()


def test_a_file_that_is_no_image(model, tiny_processor: DeemProcessor, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(ValueError, match="words.png"):
        look(model, tiny_processor, [str(tmp_path / "words.png")])
