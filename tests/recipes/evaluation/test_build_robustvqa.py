# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""recipes/build_robustvqa.py with a tiny CLIP, a tiny classifier and a function as judges."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from evaluation_fixtures import checkpoint, run
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessorPil,
)

from recipes.build_robustvqa import BuildArguments, main
from recipes.evaluation.building import labelled_images, read_class_names
from recipes.evaluation.judges import load_judge, nearest_class
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT, KINDS
from recipes.synthetic.writers.captions import write_image_folder
from recipes.synthetic.writers.files import jpeg


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": 259,
        "max_position_embeddings": 48,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    CLIPModel(config).eval().save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, build_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_image_folder(tmp_path / "world", World(), 12, HELD_OUT)
    return tmp_path / "world" / "images"


@pytest.mark.parametrize("rule", ["released", "clean"])
def test_a_two_tower_judge_builds_a_benchmark_that_runs(clip: Path, images: Path, tmp_path: Path, rule: str) -> None:
    file = tmp_path / "built" / "robustvqa_test.json"
    arguments = BuildArguments(
        images=[f"imagenet_a={images}"], judge=str(clip), rule=rule, out=str(file), batch_size=5
    )
    header = main(arguments)
    built = json.loads(file.read_text())
    counts = header["sets"]["imagenet_a"]
    assert built["header"] == json.loads(json.dumps(header)) and header["rule"] == rule
    assert counts["right"] + counts["wrong"] == counts["images"] == 12 and header["judge_files"]["weights"]
    assert len(built["imagenet_a"]) == counts["wrong"] > 0
    for item in built["imagenet_a"]:
        assert item["gt_caption"] == Path(item["file_name"]).parent.name != item["error_caption"]
        assert (file.parent / item["file_name"]).is_file()
    results = run(checkpoint("llava"), tmp_path / "out", file.parent, "robustvqa")
    assert results["robustvqa"]["failed"] == []
    assert results["robustvqa"]["figures"]["item_accuracy"]["count"] == counts["wrong"]
    assert main(arguments) == header  # again, the same


def test_the_rules_differ_where_texts_differ_in_length() -> None:
    images, texts = torch.tensor([[1.0, 0.2]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    assert nearest_class(images, texts, "clean").tolist() == [0]
    assert nearest_class(images, texts, "released").tolist() == [1]
    with pytest.raises(ValueError, match="Unknown rule"):
        nearest_class(images, texts, "other")


def test_a_classifier_judges_by_its_labels(images: Path, tmp_path: Path) -> None:
    labels = dict(enumerate(sorted({kind.replace(" ", "_") for kind in KINDS})))
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32, id2label=labels)
    torch.manual_seed(0)
    ConvNextForImageClassification(config).eval().save_pretrained(tmp_path / "judge")
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path / "judge")
    header = main(BuildArguments([str(images)], str(tmp_path / "judge"), str(tmp_path / "built" / "file.json")))
    assert header["sets"]["images"]["images"] == 12
    with pytest.raises(ValueError, match="None of the labels"):
        load_judge(str(tmp_path / "judge"), ["goldfish", "tench"], "clean")


def test_imagenet_layouts_and_broken_images(tmp_path: Path) -> None:
    image = jpeg(World().scene(HELD_OUT).image)
    for name in ("a/n01443537/1.jpg", "v2/1/2.jpeg", "a/n01443537/broken.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no image" if "broken" in name else image)
    index = tmp_path / "imagenet_class_index.json"
    index.write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}))
    arguments = BuildArguments(
        [f"imagenet_a={tmp_path / 'a'}", f"imagenet_v2={tmp_path / 'v2'}"], class_names=str(index)
    )
    arguments.out = str(tmp_path / "robustvqa_test.json")
    header = main(arguments, judge=lambda given: ["tench"] * len(given))
    built = json.loads(Path(arguments.out).read_text())
    assert built["imagenet_a"] == [
        {"file_name": "a/n01443537/1.jpg", "gt_caption": "goldfish", "error_caption": "tench"}
    ]
    assert built["imagenet_v2"][0]["gt_caption"] == "goldfish" and header["classes"] == 2
    assert header["sets"]["imagenet_a"]["not an image"] == 1
    with pytest.raises(ValueError, match="has no name"):
        labelled_images(tmp_path / "a", {})
    with pytest.raises(ValueError, match="No labelled images"):
        labelled_images(tmp_path / "nowhere", read_class_names(index))


def test_photographs_in_tars_are_read() -> None:
    shards = Path(__file__).resolve().parents[3] / "../shared/photos"
    if not shards.is_dir():
        pytest.skip("the photographs ../shared/photos are not here")
    found = labelled_images(shards / "00000.tar", {})
    assert found and found[0].label and found[0].read()[:2] == b"\xff\xd8"
