# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/generate.py, on a small untrained checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from deem_fixtures import SIDE, tensors_of, tiny_model
from PIL import Image
from scripts import run_script
from trl import TrlParser

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes import generate
from recipes.generation.checkpoint import make_scheduler
from recipes.generation.prompt import make_prompt
from recipes.generation.tasks import adapting, draw_images, write_text
from recipes.synthetic.scenes import World


@pytest.fixture
def model() -> DeemForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def checkpoint(model: DeemForConditionalGeneration, tiny_processor: DeemProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def image_files(tmp_path: Path) -> list[str]:
    """Two image files of different sizes."""
    paths = [str(tmp_path / "first.png"), str(tmp_path / "second.png")]
    World(seed=1).scene(0).image.save(paths[0])
    World(seed=1, size=80).scene(1).image.save(paths[1])
    return paths


def options(checkpoint: Path, out: Path, **given) -> generate.GenerateArguments:
    return generate.GenerateArguments(
        model=str(checkpoint), out=str(out), max_new_tokens=3, num_inference_steps=2, **given
    )


def test_images_and_text_to_all_outputs(checkpoint: Path, image_files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    texts = ["what is it?", "which color?"]
    generate.main(options(checkpoint, out, images=image_files, text=texts, draw=True, reconstruct=True, num_beams=2))
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == texts and all(row["images"] == image_files for row in rows)
    assert all(row["prompt"].count("<image>") == 2 and row["prompt"].endswith("ASSISTANT:") for row in rows)
    names = {path.name for path in out.glob("*.png")}
    assert names == {"drawn_0.png", "drawn_1.png", "reconstruction_0_first.png", "reconstruction_1_second.png"}
    assert {Image.open(out / name).size for name in names} == {(SIDE, SIDE)}


def test_images_alone_and_text_alone(checkpoint: Path, image_files: list[str], tmp_path: Path) -> None:
    generate.main(options(checkpoint, tmp_path / "caption", images=image_files[:1]))
    (row,) = map(json.loads, (tmp_path / "caption" / "answers.jsonl").read_text().splitlines())
    assert row["prompt"].endswith(" Could you provide a short description of the image? \n ## ASSISTANT:")

    generate.main(options(checkpoint, tmp_path / "drawn", text=["a star"], draw=True, answer=False))
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["drawn_0.png"]


def test_script_reads_flags_and_yaml(checkpoint: Path, tmp_path: Path) -> None:
    """As a user starts it, from another folder: flags override the file."""
    (tmp_path / "options.yaml").write_text(f"model: {checkpoint}\nmax_new_tokens: 2\nout: nowhere\n")
    flags = ["--config", "options.yaml", "--text", "a star", "--out", "written"]
    result = run_script(generate.__file__, *flags, cwd=tmp_path, logs=tmp_path / "logs")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "written" / "answers.jsonl").is_file() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_results_do_not_depend_on_the_batch(
    model: DeemForConditionalGeneration, tiny_processor: DeemProcessor, image_files: list[str], batch_size: int
) -> None:
    """Rows with none, one and two images and texts of different length, in batches of any size."""
    images = [[image_files[0]], [], image_files]
    prompts = [
        make_prompt(tiny_processor, "chat", text, len(row))
        for text, row in zip(("a", "a longer text", "b"), images, strict=True)
    ]
    alone, together = (
        (
            write_text(model, tiny_processor, prompts, images, size, max_new_tokens=4),
            draw_images(model, tiny_processor, prompts, images, batch_size=size, num_inference_steps=2),
        )
        for size in (1, batch_size)
    )
    assert alone[0] == together[0]
    for one, other in zip(alone[1], together[1], strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1  # rounding to 8 bits


def test_adapting_to_the_images_at_hand(
    checkpoint: Path, image_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What is said and redrawn is that of a model that has learned, which afterwards is bit for bit what it was."""
    given = {"images": image_files, "text": ["what is it?"], "reconstruct": True}
    for name, adapt in (("plain", 0), ("adapted", 3)):
        generate.main(options(checkpoint, tmp_path / name, **given, adapt=adapt, adapt_learning_rate=0.01))
    before, after = map(float, capsys.readouterr().out.split("error of redrawing ")[1].split("\n")[0].split(" -> "))
    assert after < before
    for file in (tmp_path / "plain").glob("*.png"):
        assert file.read_bytes() != (tmp_path / "adapted" / file.name).read_bytes()
    assert len(list((tmp_path / "adapted").glob("*.png"))) == 2 and (tmp_path / "adapted/answers.jsonl").is_file()


def test_adapting_leaves_the_weights_as_they_were(
    model: DeemForConditionalGeneration, tiny_processor: DeemProcessor, image_files: list[str]
) -> None:
    before = {name: value.clone() for name, value in tensors_of(model).items()}
    prompts = [make_prompt(tiny_processor, "chat", "a", 2)]
    with adapting(model, tiny_processor, image_files, 2, 0.01) as adapted:
        write_text(adapted, tiny_processor, prompts, [image_files], max_new_tokens=2)
        changed = {name for name, value in tensors_of(adapted).items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("model.vision_tower.") for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(model).items())


def test_text_may_place_its_images(tiny_processor: DeemProcessor) -> None:
    placed = make_prompt(tiny_processor, "chat", "first <image> then <image>", 2)
    assert placed.count("<image>") == 2 and "first <image> then <image>" in placed
    assert make_prompt(tiny_processor, "plain", "{braces}", 1) == "<image>{braces}"


def test_scheduler_by_name(model: DeemForConditionalGeneration) -> None:
    scheduler = make_scheduler(model, "EulerDiscreteScheduler")
    assert scheduler.config.beta_end == model.config.image_decoder_config.scheduler["beta_end"]
    for name in ("NoSuchScheduler", "FlowMatchEulerDiscreteScheduler", "UNet2DConditionModel"):
        with pytest.raises(ValueError, match=f"{name}.*DDIMScheduler"):
            make_scheduler(model, name)


def test_bad_input_is_named(checkpoint: Path, image_files: list[str], tmp_path: Path) -> None:
    def run(**given) -> None:
        generate.main(options(given.pop("model", checkpoint), tmp_path / "out", **given))

    with pytest.raises(ValueError, match="Nothing to work on"):
        run()
    with pytest.raises(ValueError, match="--reconstruct redraws images"):
        run(text=["a"], reconstruct=True)
    with pytest.raises(ValueError, match="--adapt learns from images"):
        run(text=["a"], adapt=1)
    for wrong in ({"adapt": -1}, {"adapt": 1, "adapt_learning_rate": 0.0}):
        with pytest.raises(ValueError, match="expected 0 or more steps, at a rate above 0"):
            run(images=image_files, **wrong)
    with pytest.raises(ValueError, match="absent.png"):
        run(images=[str(tmp_path / "absent.png")])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png"):
        run(images=[str(tmp_path / "broken.png")])
    with pytest.raises(ValueError, match="No checkpoint to load at .*absent"):
        run(model=tmp_path / "absent", text=["a"])
    (tmp_path / "unfinished" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "unfinished" / "checkpoint-100").mkdir()
    with pytest.raises(ValueError, match="not finished, take .*checkpoint-100"):
        run(model=tmp_path / "unfinished", text=["a"])
    with pytest.raises(ValueError, match="images"):
        run(images=image_files, text=["only one <image>"])
    with pytest.raises(ValueError, match="no_such_flag"):
        TrlParser(generate.GenerateArguments).parse_args_and_config(["--no_such_flag", "1"])
