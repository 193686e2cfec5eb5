# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The synthetic world: its truth is true, it is deterministic, and what it writes are the real formats."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import run_script

from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import (
    COLORS,
    DETAILS,
    HELD_OUT,
    KINDS,
    UNSEEN,
    dominant_color,
    first_color,
    first_kind,
)
from recipes.synthetic.writers import (
    write_caption_tars,
    write_formats,
    write_mmc4,
    write_pope,
    write_robustvqa,
    write_vqa,
)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float32)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("shifted", [False, True])
def test_a_scene_is_a_function_of_seed_index_and_shift(shifted):
    first, again = World(3, 64, shifted).scene(11), World(3, 64, shifted).scene(11)
    assert first.truth() == again.truth()
    assert np.array_equal(pixels(first.image), pixels(again.image))
    others = [World(4, 64, shifted).scene(11), World(3, 64, shifted).scene(12), World(3, 64, not shifted).scene(11)]
    assert all(not np.array_equal(pixels(first.image), pixels(other.image)) for other in others)


def test_another_size_is_the_same_scene():
    for index in range(10):
        small, large = World(size=64).scene(index), World(size=192).scene(index)
        assert small.questions() == large.questions()
        assert [thing.center for thing in small.objects] == [thing.center for thing in large.objects]
        shrunk = large.image.resize((64, 64), Image.BOX)
        assert np.abs(pixels(shrunk) - pixels(small.image)).mean() < 3


def test_fewer_objects_is_the_same_scene_without_the_last():
    for index in range(20):
        full, alone = World().scene(index), World(max_objects=1).scene(index)
        assert alone.objects == full.objects[:1]
        assert alone.background == full.background


def test_drawn_images_show_what_the_truth_says():
    """Masks lie where the object's center and color are; the main object is the largest; the rest stay visible."""
    for index in range(200):
        scene = World().scene(index)
        areas = [mask.sum() for mask in scene.masks]
        assert areas[0] == max(areas) and sum(areas) == np.any(scene.masks, axis=0).sum()
        for thing in scene.objects:
            rows, columns = np.nonzero(thing.mask)
            assert len(rows) > 0.25 * (64 * thing.extent) ** 2
            assert np.hypot(columns.mean() / 64 - thing.center[0], rows.mean() / 64 - thing.center[1]) < 0.06
            inside = pixels(scene.image)[thing.mask].mean(0)
            nearest = min(COLORS, key=lambda name: np.abs(inside - COLORS[name]).sum())
            assert nearest == thing.color


@pytest.mark.parametrize("settings", [{"max_objects": 1}, {}, {"shifted": True}, {"size": 128, "max_objects": 1}])
def test_dominant_color_is_that_of_the_main_object(settings):
    scenes = [World(seed=1, **settings).scene(index) for index in range(200)]
    right = [dominant_color(scene.image) == scene.main.color for scene in scenes]
    assert np.mean(right) >= 0.97


def test_dominant_color_does_not_flatter():
    assert dominant_color(Image.new("RGB", (64, 64), (150, 140, 150))) is None
    scene = World(max_objects=1).scene(0)
    faded = Image.blend(scene.image, Image.new("RGB", (64, 64), (150, 150, 150)), 0.8)
    assert dominant_color(faded) is None
    speck = Image.new("RGB", (64, 64), "white")
    speck.paste(COLORS["red"], (0, 0, 8, 8))  # 1.6 % of the image
    assert dominant_color(speck) is None


def test_captions():
    for index in range(100):
        scene = World().scene(index)
        for detail in DETAILS:
            caption = scene.caption(detail)
            assert first_kind(caption) == scene.main.kind and len(caption.split()) <= 36
            assert first_color(caption) == (None if detail == "coarse" else scene.main.color)
    with pytest.raises(ValueError, match="detail='fine'.*coarse, medium, full"):
        scene.caption("fine")
    assert first_kind("two triangles and a star") == "triangle" and first_kind("nothing") is None


def test_questions_have_one_right_answer_and_cover_every_attribute():
    attributes, answers = set(), {}
    for index in range(150):
        scene = World().scene(index)
        asked = scene.questions()
        assert len({row["question"] for row in asked}) == len(asked)
        for row in asked:
            attributes.add(row["attribute"])
            answers.setdefault(row["attribute"], []).append(row["answer"])
        for row in scene.region_questions():
            assert scene.masks[row["object"]].any()
            assert row["answer"] == getattr(scene.objects[row["object"]], row["attribute"])
            assert first_color(row["question"]) is None and first_kind(row["question"]) is None
    assert attributes == {"kind", "color", "count", "size", "orientation", "position", "presence", "background"}
    assert 0.35 < np.mean([answer == "yes" for answer in answers["presence"]]) < 0.65
    for color in COLORS:  # nothing is to be had from the frequency of answers: 1/6 each
        assert 0.1 < np.mean([answer == color for answer in answers["color"]]) < 0.24


def test_unseen_combinations_only_in_the_shifted_world():
    plain = [thing for i in range(300) for thing in World().scene(i).objects]
    shifted = [World(shifted=True).scene(i).main for i in range(300)]
    assert not any((thing.kind, thing.color) in UNSEEN for thing in plain)
    assert {(thing.kind, thing.color) for thing in plain} == {(k, c) for k in KINDS for c in COLORS} - UNSEEN
    assert 0.4 < np.mean([(thing.kind, thing.color) in UNSEEN for thing in shifted]) < 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"size": 8}, "size=8"), ({"seed": -1}, "seed=-1"), ({"max_objects": 5}, "max_objects=5")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)


def test_mmc4(tmp_path):
    write_mmc4(tmp_path, World(), num=25)
    rows = lines(tmp_path / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl")
    info = [image for row in rows for image in row["image_info"]]
    assert len(info) == 25 == len(list((tmp_path / "mmc4_images").glob("*.jpg")))
    for row in rows:
        assert set(row) == {"text_list", "image_info", "similarity_matrix", "url", "could_have_url_duplicate"}
        assert 1 <= len(row["image_info"]) <= 4
        for image, similarity in zip(row["image_info"], row["similarity_matrix"], strict=True):
            assert len(similarity) == len(row["text_list"])
            assert similarity[image["matched_text_index"]] == image["matched_sim"] == max(similarity)
            assert Image.open(tmp_path / "mmc4_images" / f"{image['image_name'][:12]}.jpg").size == (64, 64)
    truth = lines(tmp_path / "truth.jsonl")
    for scene in truth:  # the sentence is about the image it is matched with
        sentence = rows[scene["document"]]["text_list"][scene["sentence"]]
        assert any(caption in sentence for caption in scene["captions"].values())


def test_caption_tars_read_by_datasets(tmp_path):
    import datasets

    world = World()
    write_caption_tars(tmp_path, world, num=5, start=HELD_OUT, per_tar=3)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar"]
    files = sorted(map(str, tmp_path.glob("*.tar")))
    rows = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    assert len(rows) == 5
    for number, row in enumerate(rows):
        scene = world.scene(HELD_OUT + number)
        caption = row["txt"].decode() if isinstance(row["txt"], bytes) else row["txt"]
        assert row["json"]["caption"] == scene.caption("medium") == caption
        assert row["json"]["key"] == row["__key__"] and row["json"]["width"] == 64
        assert np.abs(pixels(row["jpg"]) - pixels(scene.image)).mean() < 4


def test_vqa(tmp_path):
    write_vqa(tmp_path, World(), num=4, split="val2014")
    questions = json.loads((tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    annotations = json.loads((tmp_path / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    truth = {row["image_id"]: row for row in lines(tmp_path / "truth.jsonl")}
    assert [row["question_id"] for row in questions] == [row["question_id"] for row in annotations]
    for question, annotation in zip(questions, annotations, strict=True):
        answers = [answer["answer"] for answer in annotation["answers"]]
        assert len(answers) == 10 and answers.count(annotation["multiple_choice_answer"]) >= 8
        asked = truth[question["image_id"]]["questions"][question["question_id"] % 1000]
        assert (asked["question"], asked["answer"]) == (question["question"], annotation["multiple_choice_answer"])
        assert (tmp_path / "val2014" / f"COCO_val2014_{question['image_id']:012d}.jpg").exists()
    with pytest.raises(ValueError, match="split='test'"):
        write_vqa(tmp_path, World(), num=1, split="test")


def test_pope(tmp_path):
    write_pope(tmp_path, World(), num=20)
    truth = {Path(row["file"]).name: row for row in lines(tmp_path / "truth.jsonl")}
    for sampling in ("random", "popular", "adversarial"):
        rows = lines(tmp_path / f"coco_pope_{sampling}.json")
        assert set(rows[0]) == {"question_id", "image", "text", "label"}
        assert [row["label"] for row in rows].count("yes") * 2 == len(rows)
        for row in rows:
            there = {(thing["color"], thing["kind"]) for thing in truth[row["image"]]["objects"]}
            asked = (first_color(row["text"]), first_kind(row["text"]))
            assert (asked in there) == (row["label"] == "yes")
            if sampling == "adversarial" and row["label"] == "no":
                assert any(asked[0] == color or asked[1] == kind for color, kind in there)


def test_robustvqa(tmp_path):
    write_robustvqa(tmp_path, World(), num=30)
    items = json.loads((tmp_path / "robustvqa_test.json").read_text())
    truth = {row["file"]: row for row in lines(tmp_path / "truth.jsonl")}
    assert set(items) == {"imagenet_a", "imagenet_r", "imagenet_v2"} and sum(map(len, items.values())) == 30
    for name, rows in items.items():
        assert rows
        for row in rows:
            assert set(row) == {"file_name", "gt_caption", "error_caption"}
            assert (tmp_path / row["file_name"]).exists()
            main = truth[row["file_name"]]["objects"][0]
            assert row["gt_caption"] == main["kind"] != row["error_caption"]
            assert truth[row["file_name"]]["shifted"] == (name != "imagenet_v2")
            assert ((main["kind"], main["color"]) in UNSEEN) == (name == "imagenet_a")


def test_truth_masks_are_coco_run_lengths(tmp_path):
    scene = World().scene(3)
    for row, mask in zip(scene.truth()["objects"], scene.masks, strict=True):
        counts = row["segmentation"]["counts"]
        values = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(values.reshape(64, 64).T.astype(bool), mask)


def test_command_line(tmp_path):
    script = Path(__file__).resolve().parents[3] / "recipes" / "world.py"
    out, logs = tmp_path / "world", tmp_path / "logs"
    command = (script, "--out", out, "--num", "3", "--size", "32")
    done = run_script(*command, logs=logs, cwd=tmp_path)
    assert done.returncode == 0 and "Wrote 3 images of 32 px" in done.stdout, done.stderr
    assert {path.name for path in out.iterdir()} == {
        *("mmc4_annts", "mmc4_images", "truth.jsonl", "captions", "vqa", "pope", "robustvqa")
    }
    bad = run_script(*command, "--formats", "cocoa", logs=logs, cwd=tmp_path)
    assert bad.returncode != 0 and "cocoa" in bad.stderr and "robustvqa" in bad.stderr


def test_bad_arguments_of_the_writers(tmp_path):
    with pytest.raises(ValueError, match="num=0"):
        write_mmc4(tmp_path, World(), num=0)
    with pytest.raises(ValueError, match="Unknown format.*mmc4, captions, vqa, pope, robustvqa, okvqa"):
        write_formats(tmp_path, World(), num=1, formats=["laion"])
