# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/evaluate.py, on a small untrained checkpoint."""

import inspect
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from deem_fixtures import SIDE, tiny_model
from PIL import Image
from trl import TrlParser

from processing import DeemProcessor
from recipes import evaluate
from recipes.evaluation.figures import (
    caption_figure,
    color_figure,
    drawing_figure,
    drawn_kind_figure,
    format_figures,
    share_right,
)
from recipes.evaluation.judge import KindJudge
from recipes.evaluation.measures import MEASURES, region_figures
from recipes.evaluation.scenes import color_question, one_color_scenes, several_object_scenes
from recipes.evaluation.subject import Subject
from recipes.generation.checkpoint import load_for_inference
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT, KINDS, UNSEEN, dominant_color, first_color


@pytest.fixture
def checkpoint(tiny_processor: DeemProcessor, tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    tiny_processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_no_option_hides_another() -> None:
    """A base class's option of one name gives its default and its words to all of that name."""
    own = [set(inspect.get_annotations(part)) for part in evaluate.EvaluateArguments.__mro__[:-1]]
    assert sum(map(len, own)) == len(set().union(*own))
    assert evaluate.EvaluateArguments().num_drawings == MEASURES["drawings"].number


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
    assert set(metrics) == {"caption", "color", "consistency", "drawing", "drawn_kind", "region", "region_wrong_mask"}
    assert all(figure["count"] == 3 for figure in metrics.values())
    assert metrics["consistency"]["value"] == 0  # the same model, the same noise
    samples = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert len(samples) == 2
    assert all(
        (tmp_path / "samples" / sample[role]).is_file()
        for sample in samples
        for role in ("input", "reconstruction", "drawn")
    )
    drawings = json.loads((tmp_path / "samples" / "drawings.json").read_text())
    assert [row["prompt"] for row in drawings] == [f"a {color} {kind}" for color in COLORS for kind in KINDS]
    assert {(row["prompt"].split()[2], row["color"]) for row in drawings if not row["trained"]} == UNSEEN
    for row in drawings:
        image = Image.open(tmp_path / "samples" / row["file"])
        assert row["dominant"] == dominant_color(image)


def test_figures_count_right_answers() -> None:
    scenes = [scene for scene in map(World().scene, range(HELD_OUT, HELD_OUT + 40)) if len(scene.objects) == 1][:4]
    captions = [f"A {scene.main.color} {scene.main.kind}." for scene in scenes]
    assert caption_figure(scenes, [*captions[:3], "nothing"])["value"] == 0.75
    right = [color_question(scene)["answer"] for scene in scenes]
    assert color_figure(scenes, [f" {right[0].upper()}. It", right[1], "", f"not {right[3]}"])["value"] == 0.5
    drawn = [scene.image for scene in scenes[:3]] + [Image.new("RGB", (SIDE, SIDE), "white")]
    assert drawing_figure(captions, drawn)["value"] == 0.75


def test_a_color_that_fails_is_told_beside_the_others() -> None:
    captions = ["a red circle", "a red star", "a blue star", "a blue circle"]
    drawn = [Image.new("RGB", (8, 8), COLORS[color]) for color in ("purple", "purple", "blue", "blue")]
    figure = drawing_figure(captions, drawn)
    assert figure["each"] == {"red": 0.0, "blue": 1.0}
    kinds = drawn_kind_figure(captions, ["circle", "circle", "star", "star"], on_real=0.975)
    assert kinds["each"] == {"circle": 0.5, "star": 0.5}
    text = format_figures({"drawing": figure, "drawn_kind": kinds})
    assert "red 0%, blue 100%" in text and "real images 97.5%" in text


def test_the_judge_names_kinds_and_not_colors(checkpoint: Path) -> None:
    judge = KindJudge(*load_for_inference(checkpoint), World(), number=400)
    scenes = one_color_scenes(World(), 60)
    images = [scene.image for scene in scenes]
    named = judge.name(images)
    right = sum(kind == scene.main.kind for kind, scene in zip(named, scenes, strict=True)) / len(scenes)
    assert right > 0.35  # of four, by the vectors of an encoder that was never trained
    assert named == judge.name(images[:7]) + judge.name(images[7:])


def test_marked_objects_are_described_from_their_masks(checkpoint: Path) -> None:
    model, processor = load_for_inference(checkpoint)
    scenes, seen = several_object_scenes(World(), 3), []
    assert all(len(scene.objects) > 1 and scene.index >= HELD_OUT for scene in scenes)
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    figures = region_figures(Subject(model, processor, World(), batch_size=3), 3)
    chosen = [scene.index % len(scene.objects) for scene in scenes]
    assert figures["region"]["count"] == 3 and figures["region_wrong_mask"]["count"] == 3
    for shift, masks in enumerate(seen):
        wholes, regions = masks[::2].flatten(1), masks[1::2].flatten(1)
        assert wholes.all()
        pairs = zip(scenes, chosen, strict=True)
        shares = [scene.objects[(k + shift) % len(scene.objects)].mask.mean() for scene, k in pairs]
        torch.testing.assert_close(regions.mean(1), torch.tensor(shares, dtype=torch.float32), atol=0.01, rtol=0)


def test_chance_is_the_most_frequent_answer() -> None:
    figure = share_right("what", 0.5, ["red", None, "blue", "red"], ["red", "red", "blue", "green"])
    assert figure["value"] == 0.5 and figure["chance"] == 0.5 and figure["count"] == 4


def test_color_questions_have_color_answers() -> None:
    questions = [color_question(World().scene(index)) for index in range(HELD_OUT, HELD_OUT + 30)]
    assert {question["answer"] for question in questions} <= set(COLORS)
    assert len({question["question"] for question in questions}) > 2  # not always the same question


def test_captions_to_draw_name_each_color_equally_often() -> None:
    scenes = one_color_scenes(World(), 14)
    counts = Counter(first_color(scene.caption("medium")) for scene in scenes)
    assert len(scenes) == len({scene.index for scene in scenes}) == 14
    assert set(counts) == set(COLORS) and set(counts.values()) == {2, 3}
    assert all(len(scene.objects) == 1 and scene.index >= HELD_OUT for scene in scenes)
    assert one_color_scenes(World(), 0) == []


def test_each_measure_has_an_option_and_zero_leaves_it_out(checkpoint: Path, tmp_path: Path) -> None:
    none = [flag for name in MEASURES for flag in (f"--num_{name}", "0")]
    flags = ["--model", str(checkpoint), "--out", str(tmp_path / "out"), "--num_samples", "0", *none]
    (arguments,) = TrlParser(evaluate.EvaluateArguments).parse_args_and_config(flags)
    assert evaluate.main(arguments) == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
