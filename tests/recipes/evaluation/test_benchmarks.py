# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Each benchmark end to end: files of the world in the real layout, a tiny DEEM and a tiny LLaVA, figures, page."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_fixtures import checkpoint, lines_of, run

from recipes import evaluate
from recipes.data.readers.grounding import box_text
from recipes.data.samples import IMAGE
from recipes.evaluation.answering import Answerer, Question, load_model
from recipes.evaluation.benchmark import Request, scored
from recipes.evaluation.benchmarks import BENCHMARKS
from recipes.evaluation.benchmarks.robustvqa import named
from recipes.evaluation.sources import DataSource
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers.benchmarks import (
    write_captioned,
    write_described_regions,
    write_easy_vqa,
    write_mmvp,
    write_referred_boxes,
    write_vizwiz,
)
from recipes.synthetic.writers.captions import write_paragraphs
from recipes.synthetic.writers.evaluation import write_pope, write_robustvqa
from recipes.synthetic.writers.questions import write_gqa, write_okvqa, write_textvqa, write_vqa


@pytest.fixture(params=["deem", "llava"])
def model(request: pytest.FixtureRequest) -> Path:
    return checkpoint(request.param)


def check(results: dict[str, Any], out: Path, name: str) -> dict[str, Any]:
    """What holds for every benchmark; returns its results."""
    result = results[name]
    lines = lines_of(out / name)
    assert json.loads((out / "results.json").read_text()).keys() == results.keys()
    assert len({line["id"] for line in lines}) == len(lines) == result["samples"]
    assert all(line["prompt"] and "raw" in line and "score" in line for line in lines)
    assert result["failed"] == [] and not evaluate.has_failed(results)
    for figure in result["figures"].values():
        assert figure["low"] is None or figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
        assert figure["count"] > 0
    assert result["headline"] in result["figures"]
    assert name in (out / "evaluation.html").read_text()
    return result


def test_pope(model: Path, tmp_path: Path) -> None:
    write_pope(tmp_path / "data" / "pope", World(), 4, HELD_OUT)
    results = run(model, tmp_path / "out", tmp_path / "data", "pope")
    figures = check(results, tmp_path / "out", "pope")["figures"]
    assert {"accuracy", "f1", "yes_ratio", "unparsed", "random_f1", "adversarial_accuracy", "mean_f1"} <= set(figures)
    assert any(name.startswith(("official_rule_", "deem_rule_")) for name in figures)
    assert figures["accuracy"]["chance"] == 0.5 and figures["accuracy"]["clusters"] == 4
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")


def test_robustvqa(model: Path, tmp_path: Path) -> None:
    write_robustvqa(tmp_path / "data" / "robustvqa", World(), 6, HELD_OUT)
    results = run(model, tmp_path / "out", tmp_path / "data", "robustvqa")
    figures = check(results, tmp_path / "out", "robustvqa")["figures"]
    assert figures["accuracy"]["count"] == 12 and figures["accuracy"]["clusters"] == 6
    assert figures["item_accuracy"]["count"] == 6 and figures["item_accuracy"]["chance"] == 0.25
    assert figures["choice_accuracy"]["count"] == 12 and "choice_first_ratio" in figures
    assert "imagenet_v2_accuracy" in figures
    prompts = [line["prompt"] for line in lines_of(tmp_path / "out" / "robustvqa")]
    assert any("Please anwser yes or no \n ## ASSISTANT: The answer is" in one for one in prompts) == (
        model == checkpoint("deem")
    )


def test_labels_of_robustvqa_are_compared_with_the_paths(tmp_path: Path) -> None:
    write_robustvqa(tmp_path / "robustvqa", World(), 6, HELD_OUT)
    file = tmp_path / "robustvqa" / "robustvqa_test.json"
    items = [item for items in json.loads(file.read_text()).values() for item in items]
    part = {Path(item["file_name"]).parts[-2]: item["gt_caption"] for item in items}
    by_number = {name: label for name, label in part.items() if name.isdigit()}
    index = {str(n): [f"n{n:08d}", "other"] for n in range(1000)}
    index |= {number: ["n99999999", label] for number, label in by_number.items()}
    index |= {str(2000 + i): [name, label] for i, (name, label) in enumerate(part.items()) if not name.isdigit()}
    (tmp_path / "robustvqa" / "imagenet_class_index.json").write_text(json.dumps(index))
    benchmark = BENCHMARKS["robustvqa"]
    loaded = benchmark.load(DataSource("robustvqa", str(tmp_path)))
    assert benchmark.notes(loaded) == ["labels: 0 of 6 items name another class than their path"]
    sets = json.loads(file.read_text())
    sets["imagenet_v2"][0]["gt_caption"] = "somethingelse"
    file.write_text(json.dumps(sets))
    loaded = benchmark.load(DataSource("robustvqa", str(tmp_path)))
    assert benchmark.notes(loaded) == ["labels: 1 of 6 items name another class than their path"]


def test_a_choice_is_the_one_name_that_is_said() -> None:
    names = ["tiger_shark", "tiger"]
    assert named("It is a Tiger Shark.", names) == "tiger_shark"
    assert named("tiger", names) == "tiger"
    assert named("tiger shark or tiger", names) is None
    assert named("tigers", names) is None


def test_mmvp(model: Path, tmp_path: Path) -> None:
    write_mmvp(tmp_path / "data", World(), 8, HELD_OUT)
    results = run(model, tmp_path / "out", tmp_path / "data", "mmvp")
    figures = check(results, tmp_path / "out", "mmvp")["figures"]
    assert figures["pair_accuracy"]["clusters"] * 2 == figures["accuracy"]["count"]
    assert {"original_accuracy", "a_ratio", "unparsed"} <= set(figures)


def test_mmvp_counts_pairs_and_both_answer_sheets() -> None:
    benchmark = BENCHMARKS["mmvp"]
    lines = []
    for index, (truth, original, raw) in enumerate(
        [("A", "A", "(a)"), ("B", "B", "B."), ("B", "A", "(b)"), ("A", "A", "(b)")], start=1
    ):
        line = {
            "id": str(index),
            "protocol": "standard",
            "raw": raw,
            "truth": truth,
            "cluster": f"pair {(index + 1) // 2}",
        }
        lines.append(scored(benchmark, line | {"about": {"original": original}}))
    figures = benchmark.figures(lines)
    assert figures["accuracy"].value == 0.75 and figures["pair_accuracy"].value == 0.5
    assert figures["original_accuracy"].value == 0.5 and figures["original_pair_accuracy"].value == 0.5


QUESTION_SETS = {
    "vqav2": (partial(write_vqa, split="val2014"), {"question_id", "answer"}),
    "okvqa": (write_okvqa, {"question_id", "answer"}),
    "textvqa": (write_textvqa, {"question_id", "answer"}),
    "vizwiz": (write_vizwiz, {"image", "answer"}),
    "gqa": (write_gqa, {"questionId", "prediction"}),
}


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_open_questions(name: str, tmp_path: Path) -> None:
    write, keys = QUESTION_SETS[name]
    write(tmp_path / "data" / name, World(), 3, HELD_OUT)
    kind = "deem" if name in ("vqav2", "vizwiz") else "llava"
    results = run(checkpoint(kind), tmp_path / "out", tmp_path / "data", name, limit=6, num_beams=1)
    result = check(results, tmp_path / "out", name)
    assert 0 < result["figures"]["accuracy"]["chance"] <= 1
    rows = json.loads((tmp_path / "out" / name / "submission.json").read_text())
    assert len(rows) == result["samples"] and all(set(row) == keys for row in rows)


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_right_answers_to_open_questions_count_fully(name: str, tmp_path: Path) -> None:
    QUESTION_SETS[name][0](tmp_path / name, World(), 3, HELD_OUT)
    benchmark = BENCHMARKS[name]
    samples = benchmark.load(DataSource(name, str(tmp_path))).samples
    lines = []
    for sample in samples:
        assert sample.fault is None and sample.images[0].read()[0].size == (64, 64)
        truth = sample.truth[0] if isinstance(sample.truth, list) else sample.truth
        line = {"id": sample.id, "truth": sample.truth, "about": sample.about, "cluster": sample.cluster}
        lines.append(scored(benchmark, line | {"protocol": "standard", "raw": truth}))
    assert benchmark.figures(lines)["accuracy"].value == 1
    failed = [scored(benchmark, line | {"error": "missing image", "raw": ""}) for line in lines]
    assert benchmark.figures(failed)["accuracy"].value == 0


def test_easy_vqa(tmp_path: Path) -> None:
    write_easy_vqa(tmp_path / "data" / "easy_vqa", World(), 3, HELD_OUT)
    results = run(checkpoint("llava"), tmp_path / "out", tmp_path / "data", "easy_vqa")
    figures = check(results, tmp_path / "out", "easy_vqa")["figures"]
    assert figures["accuracy"]["count"] == 9 and figures["yes_no_accuracy"]["count"] == 6
    assert figures["images_all_right"]["count"] == 3


@pytest.mark.parametrize("name", ["coco", "nocaps", "flickr30k", "textcaps"])
def test_captions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # without Java: METEOR takes seconds to start
    write_captioned(tmp_path / "data" / name, World(), 6, HELD_OUT, name)
    kind = "deem" if name == "coco" else "llava"
    results = run(checkpoint(kind), tmp_path / "out", tmp_path / "data", name, num_beams=1)
    result = check(results, tmp_path / "out", name)
    assert {"cider", "rouge_l", "bleu_1", "bleu_4", "single_reference_cider"} <= set(result["figures"])
    assert ("in-domain cider" in result["figures"]) == (name == "nocaps")
    assert result["samples"] == 6 and any("Java" in note for note in result["notes"])
    benchmark = BENCHMARKS[name]
    right = [scored(benchmark, line | {"raw": line["truth"][1]}) for line in lines_of(tmp_path / "out" / name)]
    figures = benchmark.figures(right)
    assert figures["bleu_4"].value == pytest.approx(1) and figures["rouge_l"].value == pytest.approx(1)
    assert figures["cider"].value > 1
    assert sum(benchmark.scores(right)) / 6 == pytest.approx(figures["cider"].value)
    failed = [scored(benchmark, line | {"error": "missing image", "raw": ""}) for line in right]
    assert benchmark.figures(failed)["cider"].value == 0


def test_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    write_paragraphs(tmp_path / "data", World(), 11, HELD_OUT)
    results = run(checkpoint("deem"), tmp_path / "out", tmp_path / "data", "image2paragraph", num_beams=1)
    assert check(results, tmp_path / "out", "image2paragraph")["samples"] == 2  # not in train_split.json
    (tmp_path / "data" / "test_split.json").write_text("[1, 2, 3]")
    loaded = BENCHMARKS["image2paragraph"].load(DataSource("image2paragraph", str(tmp_path / "data")))
    assert [sample.id for sample in loaded.samples] == ["1", "2", "3"]
    assert all(sample.images[0].read() for sample in loaded.samples)


def test_described_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    write_described_regions(tmp_path / "data", World(), 2, HELD_OUT)
    file = tmp_path / "data" / "finetune_refcocog_val_with_mask.json"
    content = json.loads(file.read_text())
    content["annotations"].append(content["annotations"][0] | {"id": 99, "segmentation": [[1, 2]]})
    file.write_text(json.dumps(content))
    results = run(checkpoint("deem"), tmp_path / "out", tmp_path / "data", "refcocog_region", num_beams=1)
    lines = lines_of(tmp_path / "out" / "refcocog_region")
    assert [one["error"] for one in results["refcocog_region"]["failed"]] == ["broken mask: 99"]
    assert all(line["prompt"].count("<image>") == 2 for line in lines)
    assert results["refcocog_region"]["figures"]["cider"]["count"] == len(content["annotations"])
    with pytest.raises(ValueError, match="marks regions by masks"):
        run(checkpoint("llava"), tmp_path / "other", tmp_path / "data", "refcocog_region")
    benchmark, line = BENCHMARKS["refcocog_region"], {"truth": ["a red ball"], "about": {}, "protocol": "deem"}
    assert benchmark.parse("## asistant: a red\nball ## user:", line) == "a red ball"


def test_a_mask_decides_what_is_described() -> None:
    model, processor = load_model(checkpoint("deem"))
    image, answerer = World().scene(HELD_OUT).image, Answerer(model, processor, "deem")
    prompt = answerer.prompt(Request((IMAGE, " What is this? ", IMAGE)))
    left = np.zeros((64, 64), bool)
    left[:, :32] = True
    ask = [Question(str(n), prompt, (image, image), ("a", "a"), (None, mask)) for n, mask in enumerate((left, ~left))]
    inputs = answerer._inputs(ask)
    assert inputs["region_masks"].flatten(1).mean(1).tolist() == [1, 0.5, 1, 0.5]
    assert len(answerer.answer(ask, max_new_tokens=2)) == 2 and answerer.encoded == 0


def test_grounding(model: Path, tmp_path: Path) -> None:
    write_referred_boxes(tmp_path / "data", World(), 2, HELD_OUT)
    results = run(model, tmp_path / "out", tmp_path / "data", "refcoco_grounding", num_beams=1)
    figures = check(results, tmp_path / "out", "refcoco_grounding")["figures"]
    assert {"iou", "center_accuracy", "unparsed", "accuracy_at_0.9", "refcoco_val"} <= set(figures)
    benchmark, right = BENCHMARKS["refcoco_grounding"], []
    for line in lines_of(tmp_path / "out" / "refcoco_grounding"):
        x1, y1, x2, y2 = line["truth"]
        if line["protocol"] == "deem":
            raw = box_text((x1, y1, x2, y2), 64, 64)
        else:
            raw = f"It is [{x1 / 64:.4f}, {y1 / 64:.4f}, {x2 / 64:.4f}, {y2 / 64:.4f}]."
        right.append(scored(benchmark, line | {"raw": raw}))
    figures = benchmark.figures(right)
    assert figures["accuracy"].value == 1 and figures["iou"].value > 0.9 and figures["center_accuracy"].value == 1


def test_a_test_split_without_answers_is_answered_for_submission(tmp_path: Path) -> None:
    write_vqa(tmp_path / "data", World(), 1, HELD_OUT, split="val2014")
    questions = tmp_path / "data" / "v2_OpenEnded_mscoco_val2014_questions.json"
    (tmp_path / "data" / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ValueError, match="has no answers beside it"):
        run(checkpoint("llava"), tmp_path / "out", tmp_path / "data", "vqav2")
    (tmp_path / "data" / "val2014").rename(tmp_path / "data" / "test2015")
    for image in (tmp_path / "data" / "test2015").iterdir():
        image.rename(image.with_name(image.name.replace("val2014", "test2015")))
    questions.rename(tmp_path / "data" / "v2_OpenEnded_mscoco_test2015_questions.json")
    results = run(checkpoint("llava"), tmp_path / "out", tmp_path / "data", "vqav2")
    assert list(results["vqav2"]["figures"]) == ["empty"] and results["vqav2"]["failed"] == []
    rows = json.loads((tmp_path / "out" / "vqav2" / "submission.json").read_text())
    assert len(rows) == results["vqav2"]["samples"] > 0


def test_the_world_is_one_of_the_benchmarks(tmp_path: Path) -> None:
    none = {f"num_{name}": 0 for name in ("captions", "consistency", "drawings", "regions", "samples")}
    write_mmvp(tmp_path / "data", World(), 3, HELD_OUT)
    model, names = checkpoint("deem"), ("world", "mmvp")
    results = run(model, tmp_path / "out", tmp_path / "data", *names, num_questions=3, num_beams=1, **none)
    assert set(results) == {"world", "mmvp"} and results["world"]["color"]["count"] == 3
    assert json.loads((tmp_path / "out" / "world" / "metrics.json").read_text()) == results["world"]
    assert not evaluate.has_failed(results)
