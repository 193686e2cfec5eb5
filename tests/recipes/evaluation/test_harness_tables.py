# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Benchmarks as rows of lmms-eval and tables of VLMEvalKit, read back as these do; what DEEM is asked by a harness."""

import base64
import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from evaluation_fixtures import checkpoint, lines_of, run
from PIL import Image

from recipes.data.samples import IMAGE
from recipes.evaluation.benchmarks import benchmark_named
from recipes.evaluation.harnesses.kept_answers import KeptAnswers
from recipes.evaluation.harnesses.lmms_tasks import pope_task, refcocog_region_task, robustvqa_task, visdial_task
from recipes.evaluation.harnesses.requests import asked, told
from recipes.evaluation.sources import DataSource
from recipes.export_benchmark import ExportArguments, main
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.synthetic.writers import write_formats

csv.field_size_limit(1 << 30)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    write_formats(folder, World(), 3, HELD_OUT, "medium", ["pope", "robustvqa", "mmvp", "visdial"])
    return folder


def export(data: Path, out: Path, benchmark: str, to: str, **options) -> list[str]:
    return main(ExportArguments(benchmark=benchmark, data=str(data), to=to, out=str(out), **options))


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_a_table_of_vlmevalkit_holds_each_image_once(data: Path, tmp_path: Path) -> None:
    assert export(data, tmp_path, "pope", "vlmevalkit") == []
    rows = table(tmp_path / "pope.tsv")
    samples = benchmark_named("pope").load(DataSource("pope", str(data))).samples
    assert [row["answer"] for row in rows] == [sample.truth for sample in samples]
    assert [row["index"] for row in rows] == [str(number) for number in range(len(rows))]
    assert rows[0]["category"] == "random" and rows[0]["question"].startswith(samples[0].asked)
    held = {}
    for row, sample in zip(rows, samples, strict=True):
        image = row["image"] if len(row["image"]) > 64 else rows[int(row["image"])]["image"]
        held.setdefault(sample.images[0].name, set()).add(image)
        assert base64.b64decode(image) == sample.images[0].where.read_bytes()
    assert all(len(images) == 1 for images in held.values())
    assert sum(len(row["image"]) > 64 for row in rows) == len(held) < len(rows)


def test_choices_are_a_table_of_their_own(data: Path, tmp_path: Path) -> None:
    export(data, tmp_path, "robustvqa", "vlmevalkit")
    free, choices = table(tmp_path / "robustvqa.tsv"), table(tmp_path / "robustvqa_choice.tsv")
    assert {row["answer"] for row in free} == {"yes", "no"} and "A" not in free[0]
    assert [row["answer"] for row in choices[:2]] == ["A", "B"]  # the right name first, then second
    assert choices[0]["A"] == choices[1]["B"] != choices[0]["B"]
    export(data, tmp_path, "mmvp", "vlmevalkit")
    first = table(tmp_path / "mmvp.tsv")[0]
    assert first["answer"] in ("A", "B") and first["A"] and first["B"] and "(a)" not in first["question"]


def test_rows_of_lmms_eval_score_as_ours(data: Path, tmp_path: Path) -> None:
    """The functions of the task give the figures that recipes/evaluate.py gives for the same answers."""
    for name, task in ("robustvqa", robustvqa_task), ("pope", pope_task):
        results = run(checkpoint("llava"), tmp_path / "out", data, name)[name]
        assert export(data, tmp_path / "lmms", name, "lmms_eval") == []
        rows = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / "lmms" / f"{name}.parquet"), split="train", cache_dir=str(tmp_path)
        )
        lines = lines_of(tmp_path / "out" / name)
        found = [task.process_results(row, [line["raw"]]) for row, line in zip(rows, lines, strict=True)]
        assert rows[0]["image"].size and task.doc_to_visual(rows[0])[0].mode == "RGB"
        assert lines[0]["prompt"].replace("<image>", "").split("ASSISTANT")[0].strip().endswith(rows[0]["question"])
        for metric in task.METRICS:
            value = getattr(task, metric)([one[metric] for one in found])
            assert value == results["figures"][metric]["value"], metric
        config = yaml.safe_load(next((tmp_path / "lmms").glob(f"{name}*.yaml")).read_text())
        assert Path(config["include"]).is_file() and config["generation_kwargs"]["num_beams"] == 1


def test_options_of_visdial_are_in_order_of_their_agreement(data: Path, tmp_path: Path) -> None:
    assert visdial_task.agreement("Yes, a red one.", "yes a red one") == 1.0
    assert visdial_task.agreement("a red ball", "a blue ball") == pytest.approx(2 / 3)
    assert visdial_task.agreement("", "yes") == visdial_task.agreement("no", "yes") == 0.0
    assert export(data, tmp_path, "visdial", "lmms_eval") == []
    rows = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/visdial.parquet", split="train", cache_dir=str(tmp_path)
    )
    right = [json.loads(row["about"])["options"][json.loads(row["truth"])] for row in rows]
    lines = [visdial_task.process_results(row, [said])["mrr"] for row, said in zip(rows, right, strict=True)]
    assert visdial_task.recall_5(lines) == 1.0 and visdial_task.mrr(lines) > 0.5
    silent = [visdial_task.process_results(row, [""])["mrr"] for row in rows]
    assert visdial_task.mrr(silent) < 0.2


def test_unusable_samples_are_listed_and_left_out(data: Path, tmp_path: Path) -> None:
    write_formats(tmp_path, World(), 3, HELD_OUT, "medium", ["pope"])
    image = next((tmp_path / "pope").rglob("*.jpg"))
    image.write_bytes(b"no image")
    faults = export(tmp_path, tmp_path / "out", "pope", "vlmevalkit")
    assert faults and all("not an image" in fault for fault in faults)
    assert len(table(tmp_path / "out" / "pope.tsv")) + len(faults) == len(
        benchmark_named("pope").load(DataSource("pope", str(tmp_path))).samples
    )
    with pytest.raises(ValueError, match="No task of lmms-eval for 'mmvp'"):
        export(data, tmp_path, "mmvp", "lmms_eval")


def test_regions_are_outlined(tmp_path: Path) -> None:
    folder = tmp_path / "refcocog_region"
    (folder / "train2014").mkdir(parents=True)
    Image.new("RGB", (40, 30), "white").save(folder / "train2014" / "1.png")
    mask = [[10, 5, 30, 5, 30, 25, 10, 25]]
    rows = {
        "images": [{"id": 1, "file_name": "1.png", "caption": "a white box", "width": 40, "height": 30}],
        "annotations": [
            {"id": 7, "image_id": 1, "segmentation": mask},
            {"id": 8, "image_id": 1, "segmentation": []},
        ],
    }
    (folder / "finetune_refcocog_val_with_mask.json").write_text(json.dumps(rows))
    faults = export(tmp_path, tmp_path / "out", "refcocog_region", "lmms_eval")
    assert len(faults) == 1
    (row,) = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/out/refcocog_region.parquet", split="train", cache_dir=str(tmp_path)
    )
    pixels = np.array(row["image"])
    assert (pixels[5, 20] == (255, 0, 0)).all() and (pixels[15, 20] == 255).all() and (pixels[2, 2] == 255).all()
    line = refcocog_region_task.process_results(row, ["a white box"])["rouge_l"]
    assert refcocog_region_task.rouge_l([line]) == 1.0


def test_what_deem_is_asked_by_a_harness() -> None:
    pieces = [IMAGE, "Is there a dog?\nAnswer the question using a single word or phrase."]
    assert asked(pieces, "standard", {}).request.pieces == tuple(pieces)
    released = asked(pieces, "deem", {})
    assert released.cut and released.request.answer_begin == " The answer is"
    assert "".join("<image>" if one is IMAGE else one for one in released.request.pieces) == (
        "Based on the image, please answer the question. <image>Is there a dog?"
        " Please provide an accurate answer within one word."
    )
    assert told("Yes, there is.\nUSER: more", released, ["USER:"]) == "yes"
    free = asked([IMAGE, "Describe the image."], "deem", {})
    assert not free.cut and told(" A dog. ASSISTANT: b", free, ["ASSISTANT:"]) == "A dog."


def test_kept_answers_survive_a_torn_line(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path, ["model", 1])
    kept.append(["a", "b"], ["yes", "no"], [{"task": "t"}, {"task": "t"}])
    with open(kept.file, "a") as stream:
        stream.write('{"key": "c", "te')
    again = KeptAnswers(tmp_path, ["model", 1])
    again.append(["c"], ["maybe"], [{}])
    assert KeptAnswers(tmp_path, ["model", 1], process=1).known == {"a": "yes", "b": "no", "c": "maybe"}
    assert KeptAnswers(tmp_path, ["model", 2]).known == {}
