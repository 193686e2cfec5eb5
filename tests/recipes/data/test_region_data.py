# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Boxes, masks and region dialogues on files of the real layouts, written by the synthetic world."""

import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from processing import DeemDataCollator
from recipes.data.faults import BadSample, DataReport
from recipes.data.formats import READERS, find_files
from recipes.data.readers import grounding, pickles
from recipes.data.samples import IMAGE, content, dialogue, released_dialogue
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream import steps
from recipes.data.stream.shuffle import ReaderPass
from recipes.synthetic import writers
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import KINDS
from recipes.synthetic.writers.objects import bounding_box, expression

WORLD = World(size=48)


def read(folder: Path, family: str, epoch: int = 0, **options) -> tuple[list[dict], dict]:
    found, files = find_files(str(folder))
    assert found == family
    reader, report = READERS[family](files, **options), DataReport()
    samples = [sample for _, sample in ReaderPass(reader, report, seed=0, epoch=epoch)]
    return samples, report.to_dict().get(reader.name, {"skipped": {}, "dropped_by_rule": 0})


def texts(sample: dict) -> list[str]:
    """What is said, turn by turn, with <image> for images."""
    return [
        "".join("<image>" if item["type"] == "image" else item["text"] for item in message["content"])
        for message in sample["messages"]
    ]


def check(sample: dict) -> None:
    """As many images and masks as places for them; the first is whole, the others are marked."""
    places = "".join(texts(sample)).count("<image>")
    assert places == len(sample["images"]) == len(sample["region_masks"]) and sample["mode"] == "image_to_text"
    assert sample["region_masks"][0] is None and all(mask.any() for mask in sample["region_masks"][1:])
    assert all(mask.shape == (48, 48) and mask.dtype == bool for mask in sample["region_masks"][1:])


# ---- boxes ----


@pytest.mark.parametrize("split_by", ["unc", "umd"])
def test_refcoco(tmp_path, split_by):
    writers.write_refcoco(tmp_path, WORLD, 12, split_by=split_by)
    things = [thing for index in range(12) for thing in WORLD.scene(index).objects]
    training = [thing for number, thing in enumerate(things, start=1) if number % 10]
    tasks, said = Counter(), set()
    for epoch in range(12):
        samples, counts = read(tmp_path, "refcoco", epoch, flip_probability=0.0, crop_probability=0.0)
        assert len(samples) == len(training) and not counts["skipped"]
        for sample, thing in zip(samples, training, strict=True):
            user, answer = texts(sample)
            expressions = {expression(thing), f"{thing.color} {thing.kind}"}
            x, y, width, height = bounding_box(thing.mask)
            if len(sample["images"]) == 1:
                tasks["grounding"] += 1
                asked = user.removeprefix(
                    "<image> Provide the bounding box coordinate of the region this sentence describes: "
                )
                assert asked.removesuffix(". ") in expressions
                corners = [v * 999 // 48 for v in (x, y, x + width, y + height)]
                box = "({:03d},{:03d})({:03d},{:03d})".format(*corners)
                assert answer == f"the bounding box coordinate is<box>{box}</box>"
                said.add(asked)
            else:
                tasks["referring"] += 1
                check(sample)
                assert user == "<image> Provide a sentence that describes the region <image>. "
                assert answer in expressions
                expected = np.zeros((48, 48), bool)
                expected[y : y + height, x : x + width] = True
                assert np.array_equal(sample["region_masks"][1], expected)
    assert 0.4 < tasks["grounding"] / tasks.total() < 0.6  # both branches, about equally often
    assert len(said) > len(training)  # both sentences are drawn


def test_refcoco_as_json_is_the_same(tmp_path):
    writers.write_refcoco(tmp_path, WORLD, 4)
    as_pickle, _ = read(tmp_path, "refcoco")
    script = Path(pickles.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    subprocess.run([sys.executable, str(script), str(tmp_path / "refs(unc).p")], check=True, env=environment)
    assert json.loads((tmp_path / "refs(unc).json").read_text()) == pickle.loads(
        (tmp_path / "refs(unc).p").read_bytes()
    )
    (tmp_path / "refs(unc).p").unlink()
    as_json, _ = read(tmp_path, "refcoco", tasks=("grounding",))
    assert len(as_pickle) == len(as_json) and all(len(sample["images"]) == 1 for sample in as_json)


def test_visual_genome(tmp_path):
    writers.write_vg(tmp_path, World(size=160), 6)
    samples, counts = read(tmp_path, "vg", tasks=("referring",), flip_probability=0.0)
    things = [thing for index in range(6) for thing in World(size=160).scene(index).objects]
    boxes = [bounding_box(thing.mask) for thing in things]
    small = [thing for thing, (_, _, width, height) in zip(things, boxes, strict=True) if width * height < 16384]
    assert [texts(sample)[1] for sample in samples] == [expression(thing) for thing in small]
    assert 0 < len(small) and not counts["skipped"]


class Never(random.Random):
    def random(self) -> float:
        return 0.9


class Always(random.Random):
    def random(self) -> float:
        return 0.0


def test_flips_mirror_image_box_and_words():
    image = Image.new("RGB", (100, 50))
    image.paste((255, 0, 0), (10, 5, 30, 25))
    phrase, box, mirrored = grounding.flipped("LEFT thing, right of the Left one", (10, 5, 30, 25), image)
    assert phrase == "RIGHT thing, left of the Right one" and box == (70, 5, 90, 25)
    assert mirrored.crop((70, 5, 90, 25)).getcolors() == [(400, (255, 0, 0))]
    assert grounding.box_text((10, 5, 30, 25), 100, 50) == "(099,099)(299,499)"


@pytest.mark.parametrize("seed", range(30))
def test_crops_hold_the_box_and_what_is_in_it(seed):
    rng = random.Random(seed)
    image = Image.new("RGB", (rng.randint(20, 90), rng.randint(20, 90)))
    left, top = rng.randrange(image.width - 12), rng.randrange(image.height - 12)
    box = (left, top, left + rng.randint(2, 12), top + rng.randint(2, 12))
    image.paste((0, 255, 0), box)
    (x1, y1, x2, y2), crop = grounding.cropped(box, image, rng)
    assert 0 <= x1 < x2 <= crop.width and 0 <= y1 < y2 <= crop.height
    assert (x2 - x1, y2 - y1) == (box[2] - box[0], box[3] - box[1])
    assert crop.crop((x1, y1, x2, y2)).getcolors() == [((x2 - x1) * (y2 - y1), (0, 255, 0))]


def test_both_branches_of_flip_and_crop(tmp_path):
    writers.write_refcoco(tmp_path, WORLD, 1)
    _, files = find_files(str(tmp_path))
    reader = READERS["refcoco"](files, tasks=("grounding",))
    entry = next(reader.entries(files[0]))
    ref, *_ = entry.payload[1]

    def sample(rng: random.Random, phrase: str) -> dict:
        ref["sentences"] = [{"raw": phrase}]
        return reader.make_sample(entry.key, entry.payload, rng, print)

    plain, changed = sample(Never(0), "a thing"), sample(Always(0), "a thing")
    assert plain["images"][0].size == (48, 48) and changed["images"][0].size != (48, 48)
    flipped = sample(Always(0), "the left thing")  # a word for a place: no crop
    assert flipped["images"][0].size == (48, 48) and "right thing" in texts(flipped)[0]


def test_bad_refs_are_skipped_and_counted(tmp_path):
    writers.write_refcoco(tmp_path, WORLD, 3)
    refs = pickle.loads((tmp_path / "refs(unc).p").read_bytes())
    refs[0]["ann_id"] = 99999
    del refs[1]["sentences"]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs))
    (tmp_path / "train2014" / "COCO_train2014_000000000003.jpg").write_bytes(b"")
    of_empty = sum(ref["image_id"] == 3 for ref in refs[2:])
    _, counts = read(tmp_path, "refcoco")
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {
        "ref without annotation": 1,
        "row of another layout": 1,
        "empty image": of_empty,  # each ref of the image
    }


def test_pickles_that_would_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.p").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match=r"evil.p is not read: it asks for posix.system, which could run any code"):
        pickles.load_pickle(tmp_path / "evil.p")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.p").write_bytes(pickle.dumps([1, "two", {"three": (4.0, None)}])[:-4])
    with pytest.raises(ValueError, match="cut.p is not read"):
        pickles.load_pickle(tmp_path / "cut.p")
    (tmp_path / "old.p").write_bytes(b"(dp0\nS'caf\\xe9'\np1\nI7\ns.")  # as Python 2 wrote it
    assert pickles.load_pickle(tmp_path / "old.p") == {"caf\xe9": 7}
    done = subprocess.run(
        [sys.executable, pickles.__file__, str(tmp_path / "evil.p")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "any code" in done.stderr and not (tmp_path / "evil.json").exists()


# ---- masks ----


def test_coco_instances(tmp_path):
    writers.write_coco_instances(tmp_path, WORLD, 9)
    samples, counts = read(tmp_path / "annotations", "regions")
    assert len(samples) == 9 and not counts["skipped"]
    for index, sample in enumerate(samples):
        check(sample)
        scene, said = WORLD.scene(index), texts(sample)
        masks = {mask.tobytes(): thing.kind for mask, thing in zip(scene.masks, scene.objects, strict=True)}
        assert len(sample["region_masks"]) == 1 + len(scene.objects)
        assert said[1::2] == [masks[mask.tobytes()] for mask in sample["region_masks"][1:]]
        assert said[0] == "<image> Name the category of each marked region, in one or two words. <image>"
        assert set(said[2::2]) <= {"<image>"}


@pytest.mark.parametrize("joint", [" ", ":"])
def test_parts(tmp_path, joint):
    writers.write_object_halves(tmp_path, WORLD, 5, joint=joint)
    samples, _ = read(tmp_path, "regions")
    for index, sample in enumerate(samples):
        check(sample)
        scene, said = WORLD.scene(index), texts(sample)
        assert "The classes are: square bottom, square top, " in said[0]
        assert sum(mask.sum() for mask in sample["region_masks"][1:]) == sum(mask.sum() for mask in scene.masks)
        assert all(answer.split()[0] in KINDS and answer.split()[1] in ("top", "bottom") for answer in said[1::2])


@pytest.mark.parametrize(
    "kind, hint", [("refcoco", "where it is"), ("refcoco+", "without saying where"), ("vg", "overview")]
)
def test_regions_with_captions(tmp_path, kind, hint):
    writers.write_captioned_masks(tmp_path, WORLD, 6, kind=kind)
    samples, counts = read(tmp_path, "regions")
    assert not counts["skipped"]
    expected = Counter()
    for index in range(6):
        for thing in WORLD.scene(index).objects:
            said = f"{thing.color} {thing.kind}" if kind == "refcoco+" else expression(thing)
            expected[said, int(thing.mask.sum())] += 1
    found = Counter()
    for sample in samples:
        check(sample)
        assert hint in texts(sample)[0]
        for answer, mask in zip(texts(sample)[1::2], sample["region_masks"][1:], strict=True):
            found[answer, int(mask.sum())] += 1
    assert found == expected
    assert len(samples) == (6 if kind == "vg" else sum(expected.values()))


def test_at_most_fifteen_regions_and_no_broken_ones(tmp_path):
    writers.write_coco_instances(tmp_path, WORLD, 2)
    file = tmp_path / "annotations" / "instances_train2017.json"
    rows = json.loads(file.read_text())
    first = rows["annotations"][0]
    rows["annotations"] = [{**first, "id": number} for number in range(20)]
    rows["annotations"] += [{**first, "id": 90, "image_id": 2, "segmentation": [[1, 2]]}]
    rows["annotations"] += [
        {**first, "id": 91, "image_id": 2, "segmentation": {"size": [48, 48], "counts": [48 * 48]}}
    ]
    rows["annotations"] += [{**first, "id": 92, "image_id": 2, "iscrowd": 1}]
    file.write_text(json.dumps(rows))
    (sample,), counts = read(file, "regions")
    assert len(sample["region_masks"]) == 16
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {
        "broken mask": 1,
        "empty mask": 1,
        "image without a usable region": 1,
    }


# ---- several regions ----


def test_vcr(tmp_path):
    writers.write_vcr(tmp_path, WORLD, 8)
    samples, counts = read(tmp_path / "train.jsonl", "vcr")
    assert len(samples) == 8 and not counts["skipped"]
    reasons = set()
    for index, sample in enumerate(samples):
        check(sample)
        scene, (question, answer, why, reason) = WORLD.scene(index), texts(sample)
        listed = ", ".join(f"<ref>region{i}</ref> <image>" for i in range(1, len(scene.objects) + 1))
        assert (
            question.startswith("<image> Here is an overview of the picture.")
            and f"{listed}. What color is " in question
        )
        for mask, expected in zip(sample["region_masks"][1:], scene.masks, strict=True):
            assert np.array_equal(mask, expected)
        number = int(question.removesuffix("?").rpartition("region")[2])
        thing = scene.objects[number - 1]
        assert answer == f"{thing.kind} at region{number} is {thing.color}."
        assert reason == f"{thing.kind} at region{number} is {thing.color}, as can be seen at {thing.position}."
        reasons.add(why)
    assert len(reasons) > 1


def test_vcr_numbers_of_no_object_and_too_many_objects(tmp_path):
    writers.write_vcr(tmp_path, WORLD, 3)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[0]["answer_orig"] = "7 does."
    rows[1]["objects"] = ["star"] * 16
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, counts = read(tmp_path / "train.jsonl", "vcr")
    assert len(samples) == 1 and counts["dropped_by_rule"] == 1
    assert counts["skipped"]["number of no object"]["count"] == 1


@pytest.mark.parametrize("name", ["conversation", "short_form", "part_level", "lvis_positive_negative"])
def test_osprey_conversations(tmp_path, name):
    writers.write_osprey(tmp_path, WORLD, 4)
    samples, _ = read(tmp_path / f"osprey_{name}.json", "osprey")
    given = json.loads((tmp_path / f"osprey_{name}.json").read_text())
    for index, (sample, row) in enumerate(zip(samples, given, strict=True)):
        check(sample)
        said, count = texts(sample), len(WORLD.scene(index).objects)
        listed = ", ".join(f"<ref>region{i}</ref> <image>" for i in range(1, count + 1))
        turns = [turn["value"].replace("<region", "region").replace(">", "") for turn in row["conversations"]]
        assert said[0].endswith(f" {listed}. {turns[0]}") and said[1:] == turns[1:]
        assert [mask.sum() for mask in sample["region_masks"][1:]] == [mask.sum() for mask in WORLD.scene(index).masks]


def test_osprey_descriptions(tmp_path):
    writers.write_osprey(tmp_path, WORLD, 4)
    samples, _ = read(tmp_path / "osprey_detail_description.json", "osprey")
    for index, sample in enumerate(samples):
        check(sample)
        scene = WORLD.scene(index)
        told = {
            mask.tobytes(): f"This is {expression(t)}." for mask, t in zip(scene.masks, scene.objects, strict=True)
        }
        assert texts(sample)[1::2] == [told[mask.tobytes()] for mask in sample["region_masks"][1:]]
        assert len(texts(sample)) == 2 * len(scene.objects)


# ---- what is trained ----


def test_region_dialogues_in_the_chat_template(tmp_path, tiny_processor):
    writers.write_coco_instances(tmp_path, World(size=64), 2)
    data = DataArguments(data=[str(tmp_path / "annotations")], pack_length=0, shuffle_buffer=0)
    samples, _ = build_dataset(data, tiny_processor, 1, 0)
    sample = next(iter(samples))
    batch = DeemDataCollator(tiny_processor)([sample])
    trained = tiny_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert trained == "".join(f" {answer}</s>" for answer in texts(sample)[1::2])
    assert batch["region_masks"][0].all() and batch["image_loss_weight"] == 0.0
    for given, mask in zip(sample["region_masks"][1:], batch["region_masks"][1:], strict=True):
        assert np.array_equal(mask[0].bool().numpy(), given)  # 64 pixels both


def test_region_dialogues_in_the_released_form(tmp_path, tiny_processor):
    writers.write_coco_instances(tmp_path, WORLD, 1)
    data = DataArguments(
        data=[str(tmp_path / "annotations")], pack_length=0, shuffle_buffer=0, region_template="released"
    )
    samples, _ = build_dataset(data, tiny_processor, 1, 0)
    sample = next(iter(samples))
    (raw,), _ = read(tmp_path / "annotations", "regions")
    said = texts(raw)
    turns = "".join(f"## user: {u.strip()}\n## asistant: {a}\n" for u, a in zip(said[::2], said[1::2], strict=True))
    assert sample["text"] == f"You are a helpful assistant.\n\n{turns}</s>"
    batch = DeemDataCollator(tiny_processor)([sample])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert tiny_processor.tokenizer.decode(ids) == "<s>" + tiny_processor.expand_image_tokens(sample["text"])
    trained = tiny_processor.tokenizer.decode(labels[labels != -100])
    assert trained == "".join(f"## user## asistant: {answer}\n" for answer in said[1::2]) + "</s>"
    assert (ids == tiny_processor.image_token_id).sum() == 4 * len(sample["images"])


def test_spans_and_prompt_exclude_each_other(tiny_processor):
    with pytest.raises(ValueError, match="a prompt and trained_spans"):
        DeemDataCollator(tiny_processor)([{"text": "ab", "prompt": "a", "trained_spans": [(1, 2)]}])
    sample = released_dialogue({"messages": dialogue((content("a"), "b")), "id": 1}, "<image>", "</s>")
    assert sample["text"].endswith("## user: a\n## asistant: b\n</s>") and "messages" not in sample


def test_last_rounds_are_left_out_with_their_images(tiny_processor):
    image, mask = Image.new("RGB", (8, 8)), np.ones((8, 8), bool)
    rounds = [(content(IMAGE, "one"), "a"), (content(IMAGE, IMAGE, "two"), "b" * 40), (content("three"), "c")]
    sample = {"messages": dialogue(*rounds), "images": [image] * 3, "region_masks": [None, mask, mask], "id": "x"}
    collator = DeemDataCollator(tiny_processor)
    lengths = [
        len(collator([steps.limit_rounds({**sample, "messages": dialogue(*rounds[:n])}, tiny_processor, 10**6) | {"images": [image] * m, "region_masks": [None] * m}])["input_ids"][0])
        for n, m in ((1, 1), (2, 3), (3, 3))
    ]  # fmt: skip
    for limit, kept, images in (
        (lengths[2], 3, 3),
        (lengths[2] - 1, 2, 3),
        (lengths[1] - 1, 1, 1),
        (lengths[0], 1, 1),
    ):
        cut = steps.limit_rounds(sample, tiny_processor, limit)
        assert (len(cut["messages"]), len(cut["images"]), len(cut["region_masks"])) == (2 * kept, images, images)
        assert len(collator([cut])["input_ids"][0]) <= limit
    with pytest.raises(BadSample, match="longer than max_length"):
        steps.limit_rounds(sample, tiny_processor, lengths[0] - 1)
