# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Readers on files of the real layouts: exact text, order of images, what is skipped, counted and refused."""

import io
import itertools
import json
import random
import zipfile
import zlib
from pathlib import Path

import pytest
from data_fixtures import write_tar
from PIL import Image
from torch.utils.data import DataLoader

from processing import DeemDataCollator, image_reading_deem
from recipes.data.faults import BadSample, DataReport
from recipes.data.readers.captions import CaptionReader, caption_sample
from recipes.data.readers.images import open_image
from recipes.data.readers.interleaved import InterleavedReader, interleave
from recipes.data.readers.questions import QuestionReader
from recipes.data.sources import DataArguments, build_dataset, find_files
from recipes.data.stream.shuffle import ReaderPass
from recipes.prompts import ONE_WORD_REQUEST
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training import defaults

SHARED = Path(__file__).resolve().parents[3] / "../shared"


def jpeg(color: tuple[int, int, int] = (255, 0, 0), side: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), color).save(data, "JPEG")
    return data.getvalue()


def read(reader, shuffle_buffer: int = 0, seed: int = 0, epoch: int = 0) -> tuple[list[dict], dict]:
    report = DataReport()
    samples = [sample for _, sample in ReaderPass(reader, report, seed, epoch, shuffle_buffer)]
    return samples, report.to_dict().get(reader.name, {})


# ---- interleaved documents ----


def test_interleaved_text_equals_the_released_one():
    file = SHARED / "vectors" / "interleaved_text.json"
    if not file.is_file():
        pytest.skip("The test vectors are not there.")
    vectors = json.loads(file.read_text())
    unit = "<|startofimage|><|sniffer|><|sniffer|>"
    for case in vectors["cases"]:
        placed = [(match["sentence_index"], match["image_before_sentence"], match) for match in case["matches"]]
        text, images = interleave(case["sentences"], placed, "<image>")
        assert text.replace("<image>", unit) + "</s>" == case["expected"]
        assert [image["sentence_index"] for image in images] == sorted(i["sentence_index"] for i in case["matches"])
    for case in vectors["laion"]:
        texts = set()
        for seed in range(9):
            sample = caption_sample("x", case["caption"].lower(), None, "plain", random.Random(seed), "<image>")
            texts.add(sample["text"])
        assert len(texts) == 2
        (text,) = (text for text in texts if text.startswith("<image>") == case["image_first"])
        assert text.replace("<image>", unit) + "</s>" == case["expected"]


def test_images_follow_the_order_of_their_placeholders():
    placed = [(0, False, "after a"), (0, True, "before b"), (0, False, "after c"), (1, True, "before d")]
    assert interleave(["x y.", "z."], placed, "<image>") == (
        "<image>x y.<image><image><image>z.",
        ["before b", "after a", "after c", "before d"],
    )


def mmc4(
    folder: Path, documents: list[tuple[list[str], list[tuple[str, int, float]]]], zipped: bool = False
) -> list[Path]:
    """MMC4 files with documents of (sentences, [(image name, sentence, similarity)]); images are not written."""
    (folder / "mmc4_annts").mkdir(parents=True)
    (folder / "mmc4_images").mkdir()
    lines = [
        {
            "text_list": sentences,
            "image_info": [
                {"image_name": name, "matched_text_index": at, "matched_sim": similarity}
                for name, at, similarity in images
            ],
        }
        for sentences, images in documents
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file = folder / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl"
    if zipped:
        file = file.with_name(file.name + ".zip")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("docs_no_face_shard_0_v3.jsonl", text)
    else:
        file.write_text(text)
    return [file]


@pytest.mark.parametrize("zipped", [False, True])
def test_mmc4_documents(tmp_path, zipped):
    names = ["aaaaaaaaaaaa1111.png", "bbbbbbbbbbbb.jpg", "cccccccccccc.jpg"]
    shards = mmc4(
        tmp_path,
        [(["One.", "T<image>wo.", "Three."], [(names[0], 2, 0.3), (names[1], 0, 0.24), (names[2], 1, 0.239)])],
        zipped,
    )
    colors = {"aaaaaaaaaaaa": (250, 0, 0), "bbbbbbbbbbbb": (0, 250, 0), "cccccccccccc": (0, 0, 250)}
    for name, color in colors.items():
        (tmp_path / "mmc4_images" / f"{name}.jpg").write_bytes(jpeg(color))
    assert find_files(str(tmp_path / "mmc4_annts")) == ("interleaved", shards)
    reader = InterleavedReader(shards, tmp_path / "mmc4_images")
    texts = set()
    for epoch in range(40):
        ((sample,), counts) = read(reader, epoch=epoch)
        texts.add(sample["text"])
        assert sample["text"].count("<image>") == len(sample["images"]) == 2  # the third is too unlike its sentence
        assert [image.getpixel((5, 5)).index(max(image.getpixel((5, 5)))) for image in sample["images"]] == [1, 0]
        assert counts.pop("example") == {"caption": "One. Two. Three."}
        assert counts == {"read": 1, "rows": 1, "dropped_by_rule": 0, "skipped": {}, "entries": 1, "left_out": {}}
    assert texts == {
        "<image>One. Two.<image>Three.",
        "<image>One. Two. Three.<image>",
        "One.<image>Two.<image>Three.",
        "One.<image>Two. Three.<image>",
    }


def test_mmc4_rules_on_the_number_of_images(tmp_path):
    names = [f"{letter * 12}.jpg" for letter in "abcdefgh"]
    shards = mmc4(
        tmp_path,
        [(["One."], [(names[0], 0, 0.1)]), (["One."], [(names[0], 0, 0.9)]), (["x"], [(n, 0, 0.9) for n in names])],
    )
    for name in names:
        (tmp_path / "mmc4_images" / name).write_bytes(jpeg())
    reader = InterleavedReader(shards, tmp_path / "mmc4_images")
    single = 0
    for epoch in range(200):
        samples, _ = read(reader, epoch=epoch)
        numbers = [len(sample["images"]) for sample in samples]
        assert numbers in ([6], [1, 6])  # none left: dropped; one: half of the time; eight: six of them
        single += len(numbers) == 2
    assert 70 < single < 130


def test_mmc4_bad_lines_and_images_are_skipped_and_counted(tmp_path):
    names = [f"{letter * 12}.jpg" for letter in "abcd"]
    (shard,) = mmc4(tmp_path, [(["One.", "Two."], [(name, 1, 0.9) for name in names])])
    good = shard.read_text()
    shard.write_text(
        "{broken\n"
        + '{"text_list": ["a"]}\n'
        + good
        + good.replace('"matched_text_index": 1', '"matched_text_index": 7')
    )
    for name in names[:2]:
        (tmp_path / "mmc4_images" / name).write_bytes(jpeg())
    (tmp_path / "mmc4_images" / names[2]).write_bytes(jpeg()[:200])
    (sample,), counts = read(InterleavedReader([shard], tmp_path / "mmc4_images"))
    assert len(sample["images"]) == 2 and sample["id"] == f"{shard.name}:3"
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {
        "broken json": 1,
        "line without text_list and image_info": 1,
        "matched_text_index outside text_list": 1,
        "missing image": 1,
        "truncated or broken image": 1,
    }
    assert counts["skipped"]["missing image"]["examples"] == [names[3]]


# ---- captions ----


def test_caption_tars(tmp_path):
    tar = write_tar(
        tmp_path / "00000.tar",
        {
            "0001.jpg": jpeg(),
            "0001.json": json.dumps({"caption": "A Red <image>CAR"}).encode(),
            "0001.txt": b"not this",
            "0002.png": jpeg(),
            "0002.json": json.dumps({"caption": ["Two", "Parts"]}).encode(),
            "sub/0002.jpg": jpeg(),
            "sub/0002.json": b'{"label": 3}',
            "sub/0002.txt": b"From Txt\n",
        },
    )
    assert find_files(str(tmp_path / "*.tar")) == ("captions", [tar])
    texts = set()
    for epoch in range(20):
        samples, _ = read(CaptionReader([tar]), epoch=epoch)
        assert [sample["id"] for sample in samples] == ["00000.tar/0001", "00000.tar/0002", "00000.tar/sub/0002"]
        texts |= {sample["text"] for sample in samples}
    captions = ("a red car", "two parts", "from txt")
    assert texts == {f"<image>{caption}" for caption in captions} | {f"{caption}<image>" for caption in captions}


def test_bad_members_of_a_tar_are_skipped_and_counted(tmp_path):
    caption = json.dumps({"caption": "fine"}).encode()
    tar = write_tar(
        tmp_path / "00000.tar",
        {
            "01.jpg": jpeg()[:300],
            "01.json": caption,
            "02.jpg": b"",
            "02.json": caption,
            "03.jpg": jpeg(),
            "03.json": b"{wrong",
            "04.jpg": jpeg(),
            "05.txt": b"alone",
            "06.jpg": b"this is text",
            "06.txt": b"text as image",
            "07.jpg": jpeg(),
            "07.txt": b"\xff\xfe\xff",
            "08.jpg": jpeg(),
            "08.json": caption,
            "09.jpg": jpeg(),
            "09.json": caption,
            "10.jpg": jpeg(),
            "10.json": caption,
        },
    )
    data = bytearray(tar.read_bytes())
    at = data.index(b"09.jpg")  # the header of this member is destroyed: what follows it must not be lost
    data[at : at + 300] = b"\xaa" * 300
    tar.write_bytes(data)
    (tmp_path / "00001.tar").write_bytes(b"no tar at all")
    for name, size in (("00002.tar", 4000), ("00003.tar", 3000)):  # ends within a member, and within a header
        whole = {"11.jpg": jpeg(), "11.txt": b"ok", "12.jpg": jpeg(side=300), "12.txt": b"cut"}
        write_tar(tmp_path / name, whole).write_bytes((tmp_path / name).read_bytes()[:size])
    samples, counts = read(CaptionReader(sorted(tmp_path.glob("*.tar"))))
    assert {sample["id"] for sample in samples} == {
        f"{tar}.tar/{n}" for tar, n in (("00000", "08"), ("00000", "10"), ("00002", "11"), ("00003", "11"))
    }
    found = {reason: (fault["count"], fault["examples"]) for reason, fault in counts["skipped"].items()}
    assert found == {
        "truncated or broken image": (1, ["00000.tar/01.jpg"]),
        "empty image": (1, ["00000.tar/02.jpg"]),
        "not an image": (1, ["00000.tar/06.jpg"]),
        "broken json": (1, ["00000.tar/03.json"]),
        "image without caption": (1, ["00000.tar/04"]),
        "caption without image": (2, ["00000.tar/05", "00000.tar/09"]),
        "caption is not utf-8": (1, ["00000.tar/07.txt"]),
        "unreadable tar": (2, ["00001.tar", "00002.tar"]),
        "tar cut short": (1, ["00003.tar"]),
    }
    assert counts["read"] == 4


@pytest.mark.parametrize("form, mode", [("describe", "image_to_text"), ("draw", "text_to_image")])
def test_caption_dialogues(tmp_path, tiny_processor, form, mode):
    tar = write_tar(tmp_path / "0.tar", {"1.jpg": jpeg(), "1.txt": b"A CAT"})
    (sample,), _ = read(CaptionReader([tar], form=form))
    assert sample["mode"] == mode
    batch = DeemDataCollator(tiny_processor)([sample])
    trained = tiny_processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert trained == (" A photo of a cat</s>" if form == "describe" else " <|startofimage|></s>")


def test_an_image_of_absurd_size_is_skipped_before_it_is_decoded(monkeypatch):
    strip = io.BytesIO()
    Image.new("RGB", (310, 10)).save(strip, "PNG")
    with pytest.raises(BadSample, match="image too large: strip.png"):
        open_image(strip.getvalue(), "strip.png")
    header = io.BytesIO()
    Image.new("1", (9, 9)).save(header, "PNG")
    huge = bytearray(header.getvalue())
    huge[16:24] = (40_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    with pytest.raises(BadSample, match="image too large: huge.png"):
        open_image(bytes(huge), "huge.png")
    monkeypatch.setattr(image_reading_deem, "MAX_PIXELS", 100)
    with pytest.raises(BadSample, match="image too large: big.jpg"):
        open_image(jpeg(), "big.jpg")


# ---- questions ----


def test_questions(tmp_path, tiny_processor):
    world = World(size=32)
    write_formats(tmp_path, world, 3, formats=["vqa"])
    family, shards = find_files(str(tmp_path / "vqa"))
    assert family == "questions" and len(shards) == 1
    samples, counts = read(QuestionReader(shards))
    expected = [asked for index in range(3) for asked in world.scene(index).questions()]
    assert counts["read"] == len(samples) == len(expected) and not counts["skipped"]
    requested = 0
    for sample, asked in zip(samples, expected, strict=True):
        question = sample["messages"][0]["content"][2]["text"]
        requested += question.endswith(ONE_WORD_REQUEST)
        assert question.removesuffix(ONE_WORD_REQUEST) == asked["question"]
        assert sample["messages"][1]["content"][0]["text"] == f"The answer is {asked['answer']}"
    assert 0.3 < requested / len(samples) < 0.7
    batch = DeemDataCollator(tiny_processor)(samples[:1])
    text = tiny_processor.tokenizer.decode(batch["input_ids"][0])
    unit = tiny_processor.expand_image_tokens("<image>")
    question = samples[0]["messages"][0]["content"][2]["text"]
    assert text == (
        "<s>You are a helpful assistant.\n\n ## USER: Based on the image, please answer the question. "
        f"{unit}{question}\n ## ASSISTANT: The answer is {expected[0]['answer']}</s>"
    )


def test_questions_without_answer_or_image_are_skipped_and_counted(tmp_path):
    write_formats(tmp_path, World(size=32), 2, formats=["vqa"])
    _, (shard,) = find_files(str(tmp_path / "vqa"))
    annotations = shard.with_name("v2_mscoco_train2014_annotations.json")
    rows = json.loads(annotations.read_text())["annotations"]
    second = [row for row in rows if row["image_id"] == 2]
    answers = [{**rows[1], "multiple_choice_answer": None, "answers": [{"answer": "first"}]}, *rows[2:]]
    annotations.write_text(json.dumps({"annotations": answers}))
    (tmp_path / "vqa" / "train2014" / "COCO_train2014_000000000002.jpg").unlink()
    samples, counts = read(QuestionReader([shard]))
    assert samples[0]["messages"][1]["content"][0]["text"] == "The answer is first"
    assert counts["skipped"]["question without answer"]["count"] == 1
    assert counts["skipped"]["missing image"]["examples"] == ["COCO_train2014_000000000002.jpg"]
    assert len(samples) == len(rows) - len(second) - 1
    annotations.unlink()
    with pytest.raises(ValueError, match="No answers for"):
        QuestionReader([shard])


# ---- order ----


def test_order_differs_between_epochs_and_repeats_between_runs(tmp_path):
    write_formats(tmp_path, World(size=16), 30, formats=["captions"])
    reader = CaptionReader([tmp_path / "captions" / "00000.tar"])
    orders = [
        [sample["id"] for sample in read(reader, 10, seed, epoch)[0]]
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


# ---- sources ----


def test_sources_are_found_by_content(tmp_path):
    write_formats(tmp_path, World(size=16), 4, formats=["mmc4", "captions", "vqa"])
    assert [find_files(str(tmp_path / name))[0] for name in ("mmc4_annts", "captions", "vqa")] == [
        "interleaved",
        "captions",
        "questions",
    ]
    with pytest.raises(ValueError, match="several formats"):
        find_files(str(tmp_path))
    with pytest.raises(ValueError, match="No data at .*nowhere.*Expected a folder, file or glob of .*MMC4"):
        find_files(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="Nothing usable among the"):
        find_files(str(tmp_path / "mmc4_images"))


def test_the_default_data_is_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(defaults, "NUM_IMAGES", 3)
    folders = defaults.default_data("mmc4", "captions", "vqa")
    assert [find_files(folder)[0] for folder in folders] == ["interleaved", "captions", "questions"]
    samples, counts = read(InterleavedReader(find_files(folders[0])[1], Path("runs/world/mmc4_images")))
    assert not counts["skipped"] and not Path("runs/world.unfinished").exists()
    made = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    assert defaults.default_data("captions", "vqa") == folders[1:]
    assert made == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}


def test_annotations_without_image_folder(tmp_path, tiny_processor):
    write_formats(tmp_path, World(size=16), 2, formats=["mmc4"])
    (tmp_path / "mmc4_images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="No image folder for the MMC4 annotations"):
        build_dataset(DataArguments(data=[str(tmp_path / "mmc4_annts")]), tiny_processor, 2, 0)


def test_the_packed_mixture_is_endless_repeatable_and_fits_the_collator(tmp_path, tiny_processor):
    write_formats(tmp_path, World(size=32), 24, formats=["mmc4", "captions"])
    folders = [str(tmp_path / name) for name in ("mmc4_annts", "captions")]
    arguments = DataArguments(data=folders, shuffle_buffer=8, pack_length=200, max_images=5)
    dataset, report = build_dataset(arguments, tiny_processor, batch_size=2, seed=3)
    assert dataset.probabilities == [2.0, 1.0]
    runs = [list(itertools.islice(dataset, 60)) for _ in range(2)]  # many passes over 24 images
    assert [sample["id"] for sample in runs[0]] == [sample["id"] for sample in runs[1]]
    assert len({sample["id"] for sample in runs[0]}) > 20
    for pair in zip(runs[0][::2], runs[0][1::2], strict=True):
        assert len({("tar" in sample["id"]) for sample in pair}) == 1
    for batch in itertools.islice(DataLoader(dataset, batch_size=2, collate_fn=DeemDataCollator(tiny_processor)), 5):
        assert batch["input_ids"].shape[1] <= 200 and len(batch["pixel_values"]) <= 10
        assert len(batch["document_starts"]) == len(batch["target_pixel_values"]) == len(batch["pixel_values"])
    assert set(report.to_dict()) == set(folders)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": []}, "No --data given"),
        ({"data_probs": [1.0]}, "2 --data sources but 1 --data_probs"),
    ],
)
def test_bad_data_options(tmp_path, tiny_processor, options, message):
    write_formats(tmp_path, World(size=16), 2, formats=["captions", "vqa"])
    given = {"data": [str(tmp_path / "captions"), str(tmp_path / "vqa")], "pack_length": 0, **options}
    with pytest.raises(ValueError, match=message):
        build_dataset(DataArguments(**given), tiny_processor, 2, 0)


def test_a_source_without_enough_samples_stops_with_its_name(tmp_path, tiny_processor):
    write_tar(tmp_path / "0.tar", {"1.jpg": b"broken", "1.txt": b"x"})
    dataset, report = build_dataset(DataArguments(data=[str(tmp_path)], pack_length=0), tiny_processor, 2, 0)
    with pytest.raises(ValueError, match="no usable sample"):
        next(iter(dataset))
    assert "skipped 1 x not an image, e.g. 0.tar/1.jpg" in str(report)


def test_real_photographs(tiny_processor):
    if not (SHARED / "photos").is_dir():
        pytest.skip("The photographs are not there.")
    arguments = DataArguments(data=[str(SHARED / "photos" / "*.tar")], shuffle_buffer=50, pack_length=160)
    dataset, report = build_dataset(arguments, tiny_processor, batch_size=2, seed=0)
    samples = list(itertools.islice(dataset, 8))
    batch = DeemDataCollator(tiny_processor)(samples[:2])
    assert batch["pixel_values"].shape[1:] == (3, 64, 64)
    assert all(not counts["skipped"] for counts in report.to_dict().values())
