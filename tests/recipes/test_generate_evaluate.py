# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/generate.py and recipes/evaluate.py, on a small untrained checkpoint."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from deem_fixtures import SIDE, tiny_model
from PIL import Image

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes import evaluate, generate
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT


@pytest.fixture
def model() -> DeemForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def checkpoint(model: DeemForConditionalGeneration, tiny_processor: DeemProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Two picture files of different sizes."""
    paths = [str(tmp_path / "first.png"), str(tmp_path / "second.png")]
    World(seed=1).scene(0).image.save(paths[0])
    World(seed=1, size=80).scene(1).image.save(paths[1])
    return paths


def options(checkpoint: Path, out: Path, **given) -> generate.GenerateArguments:
    return generate.GenerateArguments(
        model=str(checkpoint), out=str(out), max_new_tokens=3, num_inference_steps=2, **given
    )


# ---- generate ----


def test_pictures_and_text_to_all_outputs(checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    texts = ["what is it?", "which color?"]
    generate.main(options(checkpoint, out, images=pictures, text=texts, draw=True, reconstruct=True, num_beams=2))
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == texts and all(row["images"] == pictures for row in rows)
    assert all(row["prompt"].count("<image>") == 2 and row["prompt"].endswith("The answer is") for row in rows)
    names = {path.name for path in out.glob("*.png")}
    assert names == {"drawn_0.png", "drawn_1.png", "reconstruction_0_first.png", "reconstruction_1_second.png"}
    assert {Image.open(out / name).size for name in names} == {(SIDE, SIDE)}


def test_pictures_alone_and_text_alone(checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    generate.main(options(checkpoint, tmp_path / "caption", images=pictures[:1]))
    (row,) = map(json.loads, (tmp_path / "caption" / "answers.jsonl").read_text().splitlines())
    assert row["prompt"].endswith("A photo of")

    generate.main(options(checkpoint, tmp_path / "drawn", text=["a star"], draw=True, answer=False))
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["drawn_0.png"]


def test_script_reads_flags_and_yaml(checkpoint: Path, tmp_path: Path) -> None:
    """As a user starts it, from another folder: flags override the file."""
    (tmp_path / "options.yaml").write_text(f"model: {checkpoint}\nmax_new_tokens: 2\nout: nowhere\n")
    script = Path(generate.__file__)
    flags = ["--config", "options.yaml", "--text", "a star", "--out", "written"]
    result = subprocess.run([sys.executable, str(script), *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "written" / "answers.jsonl").is_file() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_results_do_not_depend_on_the_batch(
    model: DeemForConditionalGeneration, tiny_processor: DeemProcessor, pictures: list[str], batch_size: int
) -> None:
    """Rows with none, one and two pictures and texts of different length, in batches of any size."""
    images = [[pictures[0]], [], pictures]
    prompts = [
        generate.make_prompt(tiny_processor, "chat", text, len(row))
        for text, row in zip(("a", "a longer text", "b"), images, strict=True)
    ]
    alone, together = (
        (
            generate.write_text(model, tiny_processor, prompts, images, size, max_new_tokens=4),
            generate.draw_pictures(model, tiny_processor, prompts, images, batch_size=size, num_inference_steps=2),
        )
        for size in (1, batch_size)
    )
    assert alone[0] == together[0]
    for one, other in zip(alone[1], together[1], strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1  # rounding to 8 bits


def test_text_may_place_its_pictures(tiny_processor: DeemProcessor) -> None:
    placed = generate.make_prompt(tiny_processor, "chat", "first <image> then <image>", 2)
    assert placed.count("<image>") == 2 and "first <image> then <image>" in placed
    assert generate.make_prompt(tiny_processor, "plain", "{braces}", 1) == "<image>{braces}"


def test_scheduler_by_name(model: DeemForConditionalGeneration) -> None:
    scheduler = generate.make_scheduler(model, "EulerDiscreteScheduler")
    assert scheduler.config.beta_end == model.config.image_decoder_config.scheduler["beta_end"]
    for name in ("NoSuchScheduler", "FlowMatchEulerDiscreteScheduler", "UNet2DConditionModel"):
        with pytest.raises(ValueError, match=f"{name}.*DDIMScheduler"):
            generate.make_scheduler(model, name)


def test_bad_input_is_named(checkpoint: Path, pictures: list[str], tmp_path: Path) -> None:
    def run(**given) -> None:
        generate.main(options(given.pop("model", checkpoint), tmp_path / "out", **given))

    with pytest.raises(ValueError, match="Nothing to work on"):
        run()
    with pytest.raises(ValueError, match="--reconstruct redraws pictures"):
        run(text=["a"], reconstruct=True)
    with pytest.raises(ValueError, match="absent.png"):
        run(images=[str(tmp_path / "absent.png")])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png"):
        run(images=[str(tmp_path / "broken.png")])
    with pytest.raises(ValueError, match="No checkpoint to load at .*absent"):
        run(model=tmp_path / "absent", text=["a"])
    (tmp_path / "unfinished" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "unfinished" / "checkpoint-100").mkdir()
    with pytest.raises(ValueError, match="not finished, take .*checkpoint-100"):
        run(model=tmp_path / "unfinished", text=["a"])
    with pytest.raises(ValueError, match="images"):
        run(images=pictures, text=["only one <image>"])
    with pytest.raises(ValueError, match="no_such_flag"):
        generate.TrlParser(generate.GenerateArguments).parse_args_and_config(["--no_such_flag", "1"])


# ---- evaluate ----


def test_evaluation_writes_figures_and_samples(checkpoint: Path, tmp_path: Path) -> None:
    counts = {f"num_{name}": 3 for name in ("captions", "questions", "consistency", "drawings", "regions")}
    metrics = evaluate.main(
        evaluate.EvaluateArguments(
            model=str(checkpoint),
            reference=str(checkpoint),
            out=str(tmp_path),
            num_samples=2,
            num_inference_steps=2,
            batch_size=2,
            **counts,
        )
    )
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"caption", "color", "consistency", "drawing", "region", "region_wrong_mask"}
    assert all(figure["count"] == 3 for figure in metrics.values())
    assert metrics["consistency"]["value"] == 0  # the same model, the same noise
    samples = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert len(samples) == 2
    assert all(
        (tmp_path / "samples" / sample[role]).is_file()
        for sample in samples
        for role in ("input", "reconstruction", "drawn")
    )


def test_figures_count_right_answers() -> None:
    scenes = [scene for scene in map(World().scene, range(HELD_OUT, HELD_OUT + 40)) if len(scene.objects) == 1][:4]
    captions = [f"A {scene.main.color} {scene.main.kind}." for scene in scenes]
    assert evaluate.caption_figure(scenes, [*captions[:3], "nothing"])["value"] == 0.75
    right = [evaluate.color_question(scene)["answer"] for scene in scenes]
    assert evaluate.color_figure(scenes, [f" {right[0].upper()}. It", right[1], "", f"not {right[3]}"])["value"] == 0.5
    drawn = [scene.image for scene in scenes[:3]] + [Image.new("RGB", (SIDE, SIDE), "white")]
    assert evaluate.drawing_figure(captions, drawn)["value"] == 0.75


def test_marked_objects_are_described_from_their_masks(checkpoint: Path) -> None:
    model, processor = generate.load_checkpoint(checkpoint)
    scenes, seen = evaluate.several_object_scenes(World(), 3), []
    assert all(len(scene.objects) > 1 and scene.index >= HELD_OUT for scene in scenes)
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    figures = evaluate.region_figures(model, processor, scenes, batch_size=3)
    chosen = [scene.index % len(scene.objects) for scene in scenes]
    assert figures["region"]["count"] == 3 and figures["region_wrong_mask"]["count"] == 3
    for shift, masks in enumerate(seen):
        wholes, regions = masks[::2].flatten(1), masks[1::2].flatten(1)
        assert wholes.all()
        pairs = zip(scenes, chosen, strict=True)
        shares = [scene.objects[(k + shift) % len(scene.objects)].mask.mean() for scene, k in pairs]
        torch.testing.assert_close(regions.mean(1), torch.tensor(shares, dtype=torch.float32), atol=0.01, rtol=0)


def test_chance_is_the_most_frequent_answer() -> None:
    figure = evaluate.share_right("what", 0.5, ["red", None, "blue", "red"], ["red", "red", "blue", "green"])
    assert figure["value"] == 0.5 and figure["chance"] == 0.5 and figure["count"] == 4


def test_color_questions_have_color_answers() -> None:
    questions = [evaluate.color_question(World().scene(index)) for index in range(HELD_OUT, HELD_OUT + 30)]
    assert {question["answer"] for question in questions} <= set(COLORS)
    assert len({question["question"] for question in questions}) > 2  # not always the same question


def test_captions_to_draw_name_each_color_equally_often() -> None:
    scenes = evaluate.one_color_scenes(World(), 14)
    counts = Counter(evaluate.first_color(scene.caption("medium")) for scene in scenes)
    assert len(scenes) == len({scene.index for scene in scenes}) == 14
    assert set(counts) == set(COLORS) and set(counts.values()) == {2, 3}
    assert all(len(scene.objects) == 1 and scene.index >= HELD_OUT for scene in scenes)
    assert evaluate.one_color_scenes(World(), 0) == []
