# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Questions, captions, chats and rows of `datasets` on files of the real layouts, written by the synthetic world."""

import itertools
import json
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
import pytest

from processing import DeemDataCollator
from recipes.data.faults import DataError, DataReport
from recipes.data.formats import FORMATS, READERS, find_files
from recipes.data.readers import rows
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.shuffle import ReaderPass
from recipes.prompts import DESCRIBE_REQUESTS, DRAW_REQUESTS, ONE_WORD_REQUEST
from recipes.synthetic import writers
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import MORE_FORMATS, write_formats
from recipes.synthetic.writers.files import ten_answers

WORLD = World(size=32)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Ten images in every further format."""
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, WORLD, 10, formats=list(MORE_FORMATS))
    return folder


def read(data: Path, family: str, epoch: int = 0, **options) -> tuple[list[dict], dict]:
    found, files = find_files(str(data))
    assert found == family
    reader, report = READERS[family](files, **options), DataReport()
    stream = ReaderPass(reader, report, seed=0, epoch=epoch)
    samples = {(stream.shards[place[0]].name, *place): sample for place, sample in stream}
    return [samples[place] for place in sorted(samples)], report.to_dict().get(reader.name, {"skipped": {}})


def texts(sample: dict) -> list[str]:
    """What is said, turn by turn, with <image> for images."""
    return [
        "".join("<image>" if item["type"] == "image" else item["text"] for item in message["content"])
        for message in sample["messages"]
    ]


def shows(image, index: int) -> bool:
    """Whether an image is that scene, JPEG aside."""
    return np.abs(np.asarray(image, float) - pixels(index)).mean() < 6


@lru_cache
def pixels(index: int) -> np.ndarray:
    return np.asarray(WORLD.scene(index).image, float)


# ---- questions ----

QUESTION_PREFIX = "Based on the image, please answer the question. <image>"


@pytest.mark.parametrize(
    "name, family", [("okvqa", "questions"), *((n, n) for n in ("textvqa", "aokvqa", "gqa", "ocrvqa", "llava"))]
)
def test_questions(world, name, family):
    scenes = [index for index in range(10) if name != "ocrvqa" or (index + 1) % 5]
    per_scene = 3 if name == "llava" else None
    expected = [(index, asked) for index in scenes for asked in WORLD.scene(index).questions()[:per_scene]]
    given, requested = {}, 0
    for epoch in range(4):
        samples, counts = read(world / name, family, epoch)
        assert len(samples) == len(expected) and not counts["skipped"]
        for number, (sample, (index, asked)) in enumerate(zip(samples, expected, strict=True)):
            question, answer = texts(sample)
            requested += question.endswith(ONE_WORD_REQUEST)
            assert question.removesuffix(ONE_WORD_REQUEST) == QUESTION_PREFIX + asked["question"]
            (image,) = sample["images"]
            assert shows(image, index) and sample["mode"] == "image_to_text"
            assert answer.removeprefix("The answer is ") in ten_answers(asked["answer"])
            given.setdefault(number, set()).add(answer)
    drawn = name in ("textvqa", "aokvqa")  # one of ten people's answers; the others have one, or give the first
    assert (max(map(len, given.values())) == 2) == drawn
    share = requested / (4 * len(expected))
    assert share == 0 if name == "llava" else 0.3 < share < 0.7


@pytest.mark.parametrize(
    "name, write, option", [("aokvqa", writers.write_aokvqa, "with_image"), ("gqa", writers.write_gqa, "as_list")]
)
def test_later_copies_of_question_files_are_the_same(world, tmp_path, name, write, option):
    write(tmp_path / name, WORLD, 10, **{option: True})
    later, first = read(tmp_path / name, name)[0], read(world / name, name)[0]
    assert [(r["id"], texts(r)) for r in later] == [(r["id"], texts(r)) for r in first]
    assert all(a["images"][0].tobytes() == b["images"][0].tobytes() for a, b in zip(later, first, strict=True))


def test_llava_trains_the_answer_alone(world, tiny_processor):
    samples, _ = read(world / "llava", "llava")
    assert len({sample["id"] for sample in samples}) == len(samples)
    batch = DeemDataCollator(tiny_processor)(samples[:1])
    trained = tiny_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert trained == f" The answer is {WORLD.scene(0).questions()[0]['answer']}</s>"


def test_bad_question_rows_are_skipped_and_counted(world, tmp_path):
    shutil.copytree(world / "textvqa", tmp_path / "textvqa")
    file = tmp_path / "textvqa" / "TextVQA_0.5.1_train.json"
    data = json.loads(file.read_text())
    data["data"][0]["answers"] = []
    del data["data"][1]["question"]
    data["data"][2]["question"] = 5
    data["data"][3]["image_id"] = "gone"
    file.write_text(json.dumps(data))
    _, counts = read(tmp_path / "textvqa", "textvqa")
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {
        "question without answer": 1,
        "row of another layout": 2,
        "missing image": 1,
    }
    file.write_text("[1, 2]")
    assert read(tmp_path / "textvqa", "textvqa")[1]["skipped"]["annotation file of another layout"]["count"] == 1
    file.write_text('{"data": [')
    assert read(tmp_path / "textvqa", "textvqa")[1]["skipped"]["broken json"]["count"] == 1


# ---- captions ----


def captions_of(name: str) -> list[tuple[int, str]]:
    """(scene, caption) of each row of a caption set that is trained on."""
    scenes = [(index, WORLD.scene(index)) for index in range(10)]
    if name == "karpathy":
        return [(i, scene.caption(detail)) for i, scene in scenes for detail in ("coarse", "medium", "full")]
    if name == "flickr30k":
        return [(i, scene.caption("full")) for i, scene in scenes if (i + 1) % 5]
    if name == "textcaps":
        return [(i, scene.caption()) for i, scene in scenes]
    if name == "paragraphs":
        told = "There is {}. The main object is a {}."
        return [(i, told.format(scene.caption("full"), scene.main.kind)) for i, scene in scenes if (i + 1) % 5]
    return [(i, f"in this image we can see {scene.caption('full')}.") for i, scene in scenes]


CAPTION_SETS = ("karpathy", "flickr30k", "textcaps", "paragraphs", "narratives")


def caption_file(world: Path, name: str) -> Path:
    places = {"karpathy": "annotations/coco_karpathy_train.json", "imagefolder": "images"}
    return world / name / places.get(name, "")


@pytest.mark.parametrize("name", CAPTION_SETS)
def test_captions_in_both_directions_and_plain(world, tiny_processor, name):
    expected = captions_of(name)
    collator, seen = DeemDataCollator(tiny_processor), Counter()
    for form in ("plain", "describe", "draw"):
        samples, counts = read(caption_file(world, name), name, form=form)
        assert len(samples) == len(expected) and not counts["skipped"]
        for sample, (index, caption) in zip(samples, expected, strict=True):
            (image,) = sample["images"]
            assert shows(image, index)
            if form == "plain":
                assert sample["text"] in (f"<image>{caption}", f"{caption}<image>")
                seen[sample["text"].startswith("<image>")] += 1
                continue
            user, answer = texts(sample)
            if form == "describe":
                assert user[8:-1] in DESCRIBE_REQUESTS and answer == f"A photo of {caption}"
            else:
                assert user.endswith(f"{caption} ") and user.removesuffix(f"{caption} ") in DRAW_REQUESTS
                assert answer == "<image>"
            seen[user] += 1
        if form != "plain":
            batch = collator(samples[:1])
            trained = tiny_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
            said = f" A photo of {expected[0][1]}</s>" if form == "describe" else " <|startofimage|></s>"
            assert trained == said
            assert ("image_loss_weight" in batch) == (form == "describe")
    assert seen[True] and seen[False]


def test_karpathy_validation_gives_every_caption(world):
    file = world / "karpathy" / "annotations" / "coco_karpathy_val.json"
    samples, _ = read(file, "karpathy")
    assert [r["text"].replace("<image>", "") for r in samples] == [said for _, said in captions_of("karpathy")]
    with pytest.raises(ValueError, match="several splits .*coco_karpathy_train.json.*Name the file"):
        find_files(str(world / "karpathy"))


# ---- rows of datasets ----


def test_interleaved_rows(world):
    expected, index = [], 0
    while index < 10:
        document = WORLD.document(index, max_images=min(4, 10 - index))
        pieces = []
        for number, sentence in enumerate(document.text_list):
            pieces += ["<image>" * document.matched_text_index.count(number), sentence]
        expected.append((rows.spaces_removed(" ".join(filter(None, pieces)), "<image>"), document.scenes))
        index += len(document.scenes)
    samples, counts = read(world / "obelics", "rows")
    assert len(samples) == len(expected) > 2 and not counts["skipped"]
    by_text = dict(expected)
    for sample in samples:
        scenes = by_text[sample["text"]]
        assert len(scenes) == len(sample["images"])
        assert all(shows(image, scene.index) for image, scene in zip(sample["images"], scenes, strict=True))


def write_parquet(path: Path, table: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(table).to_parquet(path)
    return path


def test_interleaved_rows_with_too_many_and_broken_images(world, tmp_path):
    good = (world / "llava" / "coco" / "train2017" / "000000000001.jpg").read_bytes()
    many = {"images": [{"bytes": good, "path": None}, None] * 8, "texts": [None, "x"] * 8}
    broken = [{"bytes": good[:300], "path": None}, None, {"bytes": None, "path": "https://away.example/a.jpg"}]
    paths = [{"bytes": None, "path": "here.jpg"}, None, None]
    (tmp_path / "here.jpg").write_bytes(good)
    table = [many, {"images": [None] * 2, "texts": ["a", "b"]}]
    table += [{"images": images, "texts": [None, "Text.", None]} for images in (broken, paths)]
    samples, counts = read(write_parquet(tmp_path / "rows.parquet", table), "rows")
    assert [len(sample["images"]) for sample in samples] == [6, 1] and samples[1]["text"] == "<image>Text."
    assert samples[0]["text"].count("x") == 8 and samples[0]["text"].count("<image>") == 6
    assert counts["dropped_by_rule"] == 1
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {
        "truncated or broken image": 1,
        "image is not on disk": 1,
        "document without a readable image": 1,
    }


def test_chat_rows(world, tiny_processor):
    samples, counts = read(world / "chats", "rows")
    assert len(samples) == 10 and not counts["skipped"]
    for index, sample in enumerate(samples):
        first, second = WORLD.scene(index).questions()[:2]
        said = [f"<image>{first['question']}", first["answer"], second["question"], second["answer"]]
        assert texts(sample) == said and shows(sample["images"][0], index)
        batch = DeemDataCollator(tiny_processor)([sample])
        trained = tiny_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
        assert trained == f" {first['answer']}</s> {second['answer']}</s>"


def test_chats_as_json_lines_with_placeholders_in_the_text(world, tmp_path):
    image = str(shutil.copy(world / "llava" / "coco" / "train2017" / "000000000001.jpg", tmp_path / "a.jpg"))
    chats = [
        [{"role": "user", "content": "What <image>is this?"}, {"role": "assistant", "content": "A </s>shape."}],
        [{"role": "user", "content": "No placeholder."}, {"role": "assistant", "content": "Yes."}],
        [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": "<image>"}],
        [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "Two."}],
    ]
    lines = [json.dumps({"messages": messages, "images": [image]}) for messages in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    samples, counts = read(tmp_path, "rows", reserved=("</s>",))
    assert [texts(sample) for sample in samples] == [
        ["What <image>is this?", "A shape."],
        ["<image>No placeholder.", "Yes."],
        ["Draw.", "<image>"],
    ]
    assert [sample["mode"] for sample in samples] == ["image_to_text", "image_to_text", "interleaved"]
    assert counts["skipped"]["images and their places differ in number"]["count"] == 1


def test_question_rows(world):
    samples, _ = read(world / "vqa_rows", "rows")
    for index, sample in enumerate(samples):
        question, answer = texts(sample)
        (asked,) = (
            q for q in WORLD.scene(index).questions() if q["question"] == question.removeprefix(QUESTION_PREFIX)
        )
        assert answer.removeprefix("The answer is ") in ten_answers(asked["answer"])
        assert shows(sample["images"][0], index)


def test_rounds_of_the_cauldron_and_captions(world, tmp_path):
    image = {"bytes": (world / "llava" / "coco" / "train2017" / "000000000001.jpg").read_bytes(), "path": None}
    turns = [
        {"user": "What?", "assistant": "A shape.", "source": "x"},
        {"user": "Why?", "assistant": "So.", "source": "x"},
    ]
    (sample,), _ = read(
        write_parquet(tmp_path / "a" / "0.parquet", [{"images": [image, image], "texts": turns}]), "rows"
    )
    assert texts(sample) == ["<image><image>What?\n", "A shape.", "Why?\n", "So."] and len(sample["images"]) == 2
    file = write_parquet(tmp_path / "b" / "0.parquet", [{"image": image, "caption": "A Shape"}])
    (plain,), (drawn,) = read(file, "rows")[0], read(file, "rows", form="draw")[0]
    assert plain["text"].replace("<image>", "") == "a shape" and drawn["mode"] == "text_to_image"
    with pytest.raises(DataError, match=r"columns of .* are \['photo'\]; expected messages or conversations"):
        rows.DatasetReader([write_parquet(tmp_path / "c" / "0.parquet", [{"photo": image}])])


def test_hub_ids_take_the_same_way(world, monkeypatch):
    """The Hub cannot be reached here: `load_dataset` gets local files for the id, everything else is as it is."""
    asked = []

    def load(name, configuration=None, *, load=datasets.load_dataset, **options):
        if name != "owner/name":
            return load(name, configuration, **options)
        asked.append((name, configuration, options))
        files = sorted(map(str, (world / "chats").rglob("*.parquet")))
        return load("parquet", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    samples, _ = read("hub:owner/name:config:validation", "rows")
    local, _ = read(world / "chats", "rows")
    assert asked == [("owner/name", "config", {"split": "validation", "streaming": True})]
    assert [texts(sample) for sample in samples] == [texts(sample) for sample in local]
    assert [sample["id"] for sample in samples][:2] == ["owner/name/00000:1", "owner/name/00000:2"]


# ---- all of them ----


def data_of(world: Path, name: str) -> str:
    return str(caption_file(world, name))


@pytest.mark.parametrize("name", list(MORE_FORMATS))
def test_every_format_trains_and_goes_on_where_it_was(world, tiny_processor, name):
    packed = name in (*CAPTION_SETS, "obelics", "imagefolder", "imagefolder_rows", "csv")
    options = {"pack_length": 150 if packed else 0, "shuffle_buffer": 7}
    data = DataArguments(data=[data_of(world, name)], **options)
    whole = build_dataset(data, tiny_processor, 2, 0)[0]
    samples = list(itertools.islice(whole, 8))
    batch = DeemDataCollator(tiny_processor)(samples[:2])
    assert (batch["labels"] != -100).any() and len(batch["pixel_values"]) == sum(len(s["images"]) for s in samples[:2])
    cut = build_dataset(data, tiny_processor, 2, 0)[0]
    assert [s["id"] for s in itertools.islice(cut, 4)] == [s["id"] for s in samples[:4]]
    resumed = build_dataset(data, tiny_processor, 2, 0)[0]
    resumed.load_state_dict(cut.state_dict(0))
    assert [s["id"] for s in itertools.islice(resumed, 4)] == [s["id"] for s in samples[4:]]
    assert not whole.report.to_dict()[whole.sources[0].reader.name]["skipped"]


def trained_runs(batch: dict, row: int) -> list[tuple[int, int]]:
    """First and last position + 1 of each stretch of trained tokens."""
    trained = np.flatnonzero(batch["labels"][row].numpy() != -100)
    cuts = np.flatnonzero(np.diff(trained) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(trained, cuts)]


@pytest.mark.parametrize("name", list(MORE_FORMATS))
def test_what_is_trained_of_every_format(world, tiny_processor, name):
    """Of dialogues what the assistant says, each with its eos, behind its marker; of documents and captions all text,
    eos and start-of-image tokens, but not the one behind bos."""
    collator, decode = DeemDataCollator(tiny_processor), tiny_processor.tokenizer.decode
    data = DataArguments(data=[data_of(world, name)], pack_length=0, shuffle_buffer=7)
    start = tiny_processor.tokenizer.convert_ids_to_tokens(tiny_processor.start_of_image_token_id)
    for sample in itertools.islice(build_dataset(data, tiny_processor, 1, 0)[0], 10):
        batch = collator([sample])
        ids, trained = batch["input_ids"][0], batch["labels"][0] != -100
        assert (batch["labels"][0][trained] == ids[trained]).all()
        runs, said = trained_runs(batch, 0), decode(ids[trained])
        if "messages" in sample:
            answers = texts({"messages": [m for m in sample["messages"] if m["role"] == "assistant"]})
            assert said == "".join(f" {answer.replace('<image>', start)}</s>" for answer in answers)
            begins = [begin for begin, _ in runs if begin == 0 or ids[begin - 1] != tiny_processor.image_token_id]
            assert len(begins) == len(answers)
            assert all(decode(ids[:begin]).endswith("## ASSISTANT:") for begin in begins)
        else:
            expected = sample["text"].replace("<image>", start) + "</s>"
            assert said == expected.removeprefix(start) and not trained[0]


def test_every_family_has_a_format_that_the_world_writes(world):
    found = {find_files(data_of(world, name))[0] for name in MORE_FORMATS}
    assert found | {"captions", "interleaved", "questions"} == {format.family for format in FORMATS}
