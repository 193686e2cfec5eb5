# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What readers make of files that are faulty, hostile or laid out in a way that is easily misread."""

import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.data.faults import BadSample, DataReport
from recipes.data.formats import READERS, find_files
from recipes.data.readers import grounding, pickles
from recipes.data.readers.captions import CaptionReader
from recipes.data.readers.images import open_image
from recipes.data.readers.masks import vcr_mask
from recipes.data.readers.reader import parse_json
from recipes.data.stream.shuffle import ReaderPass


def write_image(path: Path, size: tuple[int, int] = (32, 32), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 30)).save(path, **options)
    return path


def read(data: Path, family: str, **options) -> tuple[list[dict], dict[str, int]]:
    """Records, and how often each reason was given."""
    found, files = find_files(str(data))
    assert found == family
    reader, report = READERS[family](files, **options), DataReport()
    samples = [sample for _, sample in ReaderPass(reader, report, seed=0)]
    skipped = report.to_dict().get(reader.name, {"skipped": {}})["skipped"]
    return samples, {reason: fault["count"] for reason, fault in skipped.items()}


def texts(sample: dict) -> list[str]:
    return [
        "".join("<image>" if item["type"] == "image" else item["text"] for item in message["content"])
        for message in sample["messages"]
    ]


def chat(user, answer="A shape.", **more) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["a.png"], **more}


def write_lines(file: Path, lines: list) -> Path:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


# ---- text and images ----


def test_half_a_surrogate_pair_is_taken_out(tmp_path, tiny_processor):
    write_image(tmp_path / "a.png")
    (sample,), _ = read(write_lines(tmp_path / "a.jsonl", [chat("What \ud83d?")]), "rows")
    assert texts(sample)[0] == "<image>What ?"
    assert tiny_processor.tokenizer(texts(sample)[0])["input_ids"]


def test_json_nested_without_end_is_broken():
    with pytest.raises(BadSample, match="broken json: x"):
        parse_json("[" * 100_000, "x")


def test_an_image_name_that_no_file_can_have(tmp_path):
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(BadSample, match="missing image"):
            open_image(tmp_path / name, name)


def test_gray_images_of_sixteen_bits_keep_their_shades(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "gray.png")
    Image.fromarray(np.full((8, 8), 30000, np.int32)).save(tmp_path / "gray.tif")
    for name in ("gray.png", "gray.tif"):
        opened = open_image(tmp_path / name, name)
        assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (117, 117, 117)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(BadSample, match="image of floating point numbers: float.tif"):
        open_image(tmp_path / "float.tif", "float.tif")


# ---- files ----


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["refs(google).p", "refs(unc).p", "refs(unc).json"], "refs(unc).p"),
        (["refs(google).p", "refs(umd).p"], "refs(umd).p"),
        (["refs(google).p", "refs(google).json"], "refs(google).p"),
    ],
)
def test_one_file_of_refs_is_read(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert find_files(str(tmp_path)) == ("refcoco", [tmp_path / chosen])


def test_several_unknown_refs_are_refused(tmp_path):
    for name in ("refs(google).p", "refs(mine).p"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="several refs .*Name the file"):
        find_files(str(tmp_path))
    assert find_files(str(tmp_path / "refs(mine).p"))[1] == [tmp_path / "refs(mine).p"]


def test_splits_are_told_by_folders_below_the_given_one(tmp_path):
    root = tmp_path / "test_and_train"
    for split in ("train", "test"):
        (root / "default" / split).mkdir(parents=True)
        (root / "default" / split / "0000.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="several splits .*train/0000.parquet"):
        find_files(str(root))
    assert len(find_files(str(root / "default" / "train"))[1]) == 1


def test_encrypted_zips_are_unreadable_files(tmp_path):
    file = tmp_path / "a.jsonl.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", '{"text_list": []}')
    data = bytearray(file.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(data)
    (tmp_path / "images").mkdir()
    assert read(file, "interleaved") == ([], {"unreadable annotation file": 1})


def test_hostile_pickles_are_refused(tmp_path):
    (tmp_path / "a.p").write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match="a.p is not read"):
        pickles.load_pickle(tmp_path / "a.p")


def karpathy(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "coco_karpathy_train.json"
    file.write_text(json.dumps([{"image": name, "caption": "a thing"} for name in names]))
    return file


def test_names_of_images_do_not_lead_out_of_the_searched_folders(tmp_path):
    out = write_image(tmp_path / "out.png")
    home = tmp_path / "a" / "b" / "c"
    write_image(tmp_path / "a" / "b" / "images" / "in.png")
    elsewhere = write_image(tmp_path / "elsewhere" / "linked.png")
    file = karpathy(home, str(out), "../../../out.png", "x" * 5000, "in.png", "../images/in.png", "linked.png")
    (home / "images").symlink_to(elsewhere.parent)
    samples, skipped = read(file, "karpathy")
    assert len(samples) == 3 and skipped == {"missing image": 3}


def test_the_cause_of_an_unusable_annotation_file_is_told(tmp_path):
    (tmp_path / "paragraphs_coco.json").write_text('{"annotations": []}')
    reader, report = READERS["paragraphs"](find_files(str(tmp_path))[1]), DataReport()
    assert not list(ReaderPass(reader, report, seed=0))
    assert "train_split.json" in str(report)


# ---- words ----


def test_only_words_are_mirrored():
    phrase, _, _ = grounding.flipped("Bright LEFT man, rightmost", (0, 0, 1, 1), Image.new("RGB", (4, 4)))
    assert phrase == "Bright RIGHT man, leftmost"


# ---- one row of many ----

ASKED = {"question": "?", "answers": ["!"], "direct_answers": ["!"], "answer": "!", "image": "a.png", "image_id": "7"}


@pytest.mark.parametrize(
    "family, name, good, wrap",
    [
        ("karpathy", "coco_karpathy_train.json", {"image": "a.png", "caption": "A thing"}, list),
        ("textvqa", "TextVQA_train.json", ASKED, lambda rows: {"data": rows}),
        ("aokvqa", "aokvqa_train.json", ASKED, list),
        ("gqa", "train_balanced_questions.json", ASKED, list),
        (
            "ocrvqa",
            "dataset.json",
            {"imageURL": "x.png", "questions": ["?"], "answers": ["!"], "split": 1},
            lambda rows: dict(zip(("a", "b", "c"), rows, strict=True)),
        ),
        (
            "llava",
            "llava.json",
            {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
            list,
        ),
        (
            "vg",
            "region_descriptions.json",
            {"regions": [{"image_id": "a", "x": 1, "y": 1, "width": 5, "height": 5, "phrase": "a thing"}]},
            list,
        ),
        (
            "regions",
            "instances_train.json",
            {"id": 1, "file_name": "a.png", "width": 32, "height": 32},
            lambda rows: {
                "images": rows,
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]},
                    3,
                ],
            },
        ),
    ],
)
def test_one_malformed_row_does_not_cost_its_file(tmp_path, family, name, good, wrap):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "7.jpg")
    (tmp_path / name).write_text(json.dumps(wrap([good, {"image": "x"}, 7])))
    samples, skipped = read(tmp_path / name, family)
    assert len(samples) == 1 and skipped == {"row of another layout": 2}


def refs(folder: Path, size: tuple[int, int], box: list[float], phrase: str = "a thing", more: tuple = ()) -> Path:
    write_image(folder / "train2014" / "COCO_train2014_000000000001.jpg", (64, 48))
    sentences = [{"raw": phrase}]
    ref = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train", "sentences": sentences}
    (folder / "refs(unc).p").write_bytes(pickle.dumps([ref, *more]))
    image = {"id": 1, "width": size[0], "height": size[1]}
    (folder / "instances.json").write_text(
        json.dumps({"images": [image], "annotations": [{"id": 1, "bbox": box}, {"x": 1}]})
    )
    return folder


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"size": (640, 480), "box": [1, 1, 9, 9]}, "image of another size than its annotations say"),
        ({"size": (64, 48), "box": [70, 50, 9, 9]}, "empty box"),
        ({"size": (64, 48), "box": [1, 1, float("inf"), 9]}, "row of another layout"),
        ({"size": (64, 48), "box": [1, 1, 9, 9], "phrase": " "}, "box without phrase"),
        ({"size": (64, 48), "box": [1, 1, 9, 9], "more": ({"split": "train"},)}, "ref without annotation"),
    ],
)
def test_refs_that_do_not_fit_their_image(tmp_path, given, reason):
    samples, skipped = read(refs(tmp_path, **given), "refcoco")
    assert len(samples) == ("more" in given) and skipped == {reason: 1}


def test_masks_of_a_resized_image_are_refused(tmp_path):
    write_image(tmp_path / "a.png")
    about = {"id": 1, "file_name": "a.png", "width": 64, "height": 48}
    region = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    file = tmp_path / "instances_train.json"
    file.write_text(
        json.dumps({"images": [about], "annotations": [region], "categories": [{"id": 1, "name": "thing"}]})
    )
    assert read(file, "regions") == ([], {"image of another size than its annotations say": 1})


def test_a_broken_first_line_tells_nothing_of_the_columns(tmp_path):
    write_image(tmp_path / "a.png")
    file = tmp_path / "a.jsonl"
    file.write_text("{broken\n[1]\n" + json.dumps(chat('"messages"?')) + "\n")
    assert read(file, "rows")[1] == {"broken json": 1, "row of another layout": 1}


@pytest.mark.parametrize("value", [1e300, float("nan"), float("inf")])
def test_boxes_of_vcr_without_end_are_refused(value):
    with pytest.raises(ValueError, match="A box at "):
        vcr_mask([0, 0, value, 4], [[[0, 0], [4, 0], [4, 4]]], 6, 6)


def test_captions_of_tars_must_be_texts_that_say_something():
    reader, data = CaptionReader([Path("0.tar")]), io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    for caption, reason in (({"a": 1}, "caption is not text"), (" ", "image without caption")):
        members = {"json": json.dumps({"caption": caption}).encode(), "png": data.getvalue()}
        with pytest.raises(BadSample, match=reason):
            reader.make_sample("x", members, random.Random(0), print)


def test_a_tar_that_was_zeroed_since_gives_no_entry(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    assert list(CaptionReader([tmp_path / "0.tar"]).fetch(tmp_path / "0.tar", [(3, 1024)])) == []


def test_an_index_without_end_is_another_layout(tmp_path):
    (tmp_path / "images").mkdir()
    line = '{"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": 1e999, "matched_sim": 1}]}'
    (tmp_path / "a.jsonl").write_text(line)
    assert read(tmp_path / "a.jsonl", "interleaved") == ([], {"line without text_list and image_info": 1})


def test_questions_that_are_no_objects_cost_themselves_alone(tmp_path):
    write_image(tmp_path / "images" / "x.jpg")
    asked = ["text", {"question_id": 1, "image_id": "x", "question": "?"}]
    (tmp_path / "a_questions.json").write_text(json.dumps({"questions": asked}))
    answers = [3, {"question_id": 1, "multiple_choice_answer": "!"}]
    (tmp_path / "a_annotations.json").write_text(json.dumps({"annotations": answers}))
    samples, skipped = read(tmp_path, "questions")
    assert len(samples) == 1 and skipped == {"question of another layout": 1}


@pytest.mark.parametrize("rows", [None, 7, {"a": 1}, "text"])
@pytest.mark.parametrize("spoilt", ["questions", "annotations"])
def test_files_of_questions_whose_rows_are_no_list(tmp_path, spoilt, rows):
    write_image(tmp_path / "images" / "x.jpg")
    for name in ("questions", "annotations"):
        (tmp_path / f"a_{name}.json").write_text(json.dumps({name: rows if name == spoilt else []}))
    samples, skipped = read(tmp_path, "questions")
    assert not samples and skipped == {"question or annotation file of another layout": 1}


@pytest.mark.parametrize("name", ["\ud83d", "x" * 5000, "a\0b"])
def test_names_that_nobody_can_print_end_no_run_and_no_report(tmp_path, name):
    write_image(tmp_path / "a.jpg")
    rows = [{**ASKED, "image_id": "a", "question_id": name}, {**ASKED, "image_id": name, "question_id": name}]
    (tmp_path / "TextVQA_train.json").write_text(json.dumps({"data": rows}))
    reader, report = READERS["textvqa"](find_files(str(tmp_path / "TextVQA_train.json"))[1]), DataReport()
    (sample,) = (sample for _, sample in ReaderPass(reader, report, seed=0))
    assert sample["id"].encode() and len(str(report).encode()) < 2000
    (fault,) = report.to_dict()[reader.name]["skipped"].values()
    assert fault["count"] == 1
