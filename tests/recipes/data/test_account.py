# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The account of what was read: every record of every format is yielded, skipped with its reason, or left out by a rule."""

import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from data_fixtures import write_tar
from PIL import Image

from recipes.data.faults import BadSample, DataError, DataReport, LeftOut
from recipes.data.formats import FORMATS, READERS, find_files
from recipes.data.readers.captions import CaptionReader
from recipes.data.readers.reader import Entry, Reader
from recipes.data.stream.shuffle import ReaderPass
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import MORE_FORMATS, write_formats

LAID_OUT = {"mmc4": "mmc4_annts", "karpathy": "karpathy/annotations/coco_karpathy_train.json"}
LAID_OUT["imagefolder"] = "imagefolder/images"
NAMES = ("mmc4", "captions", "vqa", *MORE_FORMATS)


def load(file: Path) -> Any:
    return json.loads(file.read_text())


def lines(file: Path) -> int:
    return sum(bool(line.strip()) for line in file.read_bytes().splitlines())


def samples_of_tar(file: Path) -> int:
    with tarfile.open(file) as tar:
        return len({name.rpartition(".")[0] for name in tar.getnames()})


def captions_of(row: Any) -> int:
    said = row.get("caption") if isinstance(row, dict) else None
    return len(said) if isinstance(said, list) else 1


def rounds_of(row: Any) -> int:
    return (len(row["conversations"]) + 1) // 2 if isinstance(row, dict) and "conversations" in row else 1


def questions_of(row: Any) -> int:
    return len(row["questions"]) if isinstance(row, dict) and "questions" in row else 1


def regions_of(row: Any) -> int:
    return len(row["regions"]) if isinstance(row, dict) and "regions" in row else 1


ROWS: dict[str, Callable[[Path], int]] = {
    ".jsonl": lines,
    ".csv": lambda file: lines(file) - 1,
    ".parquet": lambda file: pyarrow.parquet.read_table(file).num_rows,
}
RECORDS: dict[str, Callable[[Path], int]] = {  # family -> how many records a file holds
    "captions": samples_of_tar,
    "interleaved": lines,
    "vcr": lines,
    "narratives": lines,
    "rows": lambda file: ROWS[file.suffix](file),
    "questions": lambda file: len(load(file)["questions"]),
    "textvqa": lambda file: len(load(file)["data"]),
    "textcaps": lambda file: len(load(file)["data"]),
    "aokvqa": lambda file: len(load(file)),
    "gqa": lambda file: len(load(file)),
    "easy_vqa": lambda file: len(load(file)),
    "osprey": lambda file: len(load(file)),
    "flickr30k": lambda file: len(load(file)),
    "paragraphs": lambda file: len(load(file)["annotations"]),
    "regions": lambda file: len(load(file)["images"]),
    "karpathy": lambda file: sum(map(captions_of, load(file))),
    "llava": lambda file: sum(map(rounds_of, load(file))),
    "ocrvqa": lambda file: sum(map(questions_of, load(file).values())),
    "vg": lambda file: sum(map(regions_of, load(file))),
    "refcoco": lambda file: len(pickle.loads(file.read_bytes())),
    "imagefolder": lambda file: 1,
}
LISTS = ("questions", "data", "annotations", "images")  # where the rows of a file are


def spoil(file: Path) -> None:
    """Add rows of another layout, and break one."""
    strange = [7, None, "text", {}, {"image": "gone.jpg"}, {"id": [1]}]
    if file.suffix == ".jsonl":
        file.write_text(file.read_text() + "\n".join(["{broken", *map(json.dumps, strange)]) + "\n\n")
    elif file.suffix == ".p":
        file.write_bytes(pickle.dumps([*pickle.loads(file.read_bytes()), *strange, {"split": "val"}]))
    elif file.suffix == ".json":
        rows = load(file)
        if isinstance(rows, dict) and not any(name in rows for name in LISTS):
            rows |= {f"strange{number}": row for number, row in enumerate(strange)}
        else:
            (rows if isinstance(rows, list) else next(rows[n] for n in LISTS if n in rows)).extend(strange)
        file.write_text(json.dumps(rows))
    elif file.suffix == ".csv":
        file.write_bytes(file.read_bytes() + b"gone.jpg,a car\n,\na.jpg,a,b\na.jpg,\xff\n")
    elif file.suffix == ".tar":
        with tarfile.open(file, "a") as tar:
            for name in ("a.txt", "b.jpg", "c.heic", "d"):
                tar.addfile(tarfile.TarInfo(name))


def balance(reader: Reader, **options: Any) -> tuple[int, dict[str, Any]]:
    """Number of samples, and the account of the reader, which must agree."""
    report = DataReport()
    samples = sum(1 for _ in ReaderPass(reader, report, seed=0, **options))
    counts = report.to_dict()[reader.name]
    entries = sum(1 for shard in reader.shards for _ in reader.entries(shard))
    assert counts["read"] == samples and counts["entries"] == entries
    assert sum(counts["left_out"].values()) == counts["dropped_by_rule"]
    of_entries = counts["dropped_by_rule"] - sum(rules(reader).values())
    parts = sum(fault["count"] for fault in counts["skipped"].values()) - (entries - samples - of_entries)
    assert parts >= 0  # of samples that were used
    return entries, counts


def rules(reader: Reader) -> dict[str, int]:
    """How many rows never become entries, by rule."""
    found: dict[str, int] = {}
    for shard in reader.shards:
        for reason, number in reader.left_out.get(shard, {}).items():
            found[reason] = found.get(reason, 0) + number
    return found


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_record_is_accounted_for(tmp_path, name, spoilt):
    write_formats(tmp_path, World(size=32), 6, formats=[name])
    family, files = find_files(str(tmp_path / LAID_OUT.get(name, name)))
    if spoilt:
        for file in files:
            spoil(file)
        next(tmp_path.rglob("*1.jpg"), files[0]).with_suffix(".jpg").write_bytes(b"")
    reader = READERS[family](files)
    entries, counts = balance(reader)
    about_images = {"annotation of an image that the file does not list", "annotation without image_id"}
    left_out = sum(number for rule, number in rules(reader).items() if rule not in about_images)
    assert entries + left_out == sum(map(RECORDS[family], files))
    assert rules(reader).items() <= counts["left_out"].items()
    assert bool(counts["skipped"]) == (spoilt and files[0].suffix != ".parquet")


def test_every_family_is_tested():
    assert set(RECORDS) == {one.family for one in FORMATS}


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("name", ["llava", "captions", "mmc4"])
def test_processes_account_for_all_of_it_together(tmp_path, name, count):
    write_formats(tmp_path, World(size=32), 12, formats=[name])
    family, files = find_files(str(tmp_path / LAID_OUT.get(name, name)))
    whole, parts = DataReport(), DataReport()
    list(ReaderPass(READERS[family](files), whole, seed=0))
    for index in range(count):
        one = DataReport()
        list(ReaderPass(READERS[family](files), one, seed=0, share=(index, count)))
        parts.add_state(one.state_dict())
    assert parts.to_dict() == whole.to_dict()


# ---- what used to vanish ----


def image_file(folder: Path, name: str = "a.jpg") -> bytes:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / name)
    return (folder / name).read_bytes()


def coco(folder: Path, ids: list[Any], of_annotations: list[Any]) -> Path:
    image_file(folder, "train2017/a.jpg")
    images = [{"id": one, "file_name": "a.jpg", "width": 32, "height": 32} for one in ids]
    region = {"category_id": "1", "segmentation": [[1, 1, 9, 1, 9, 9]]}
    annotations = [{"id": n, "image_id": one, **region} for n, one in enumerate(of_annotations)]
    file = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}
    (folder / "instances_train2017.json").write_text(json.dumps(file))
    return folder / "instances_train2017.json"


@pytest.mark.parametrize(
    "ids, of_annotations, read, left_out",
    [
        ([1, 2, 3], [1, "2", 3], 3, {}),
        (["1", "2", "000000000003"], [1, 2, 3], 3, {}),
        (["a", "b", "c"], ["a", "b", "b"], 2, {"image without annotations": 1}),
        (
            [1, 2],
            [1, 7, "x", 8],
            1,
            {"annotation of an image that the file does not list": 3, "image without anno": 1},
        ),
        ([1], [1, None, [1], float("nan")], 1, {"annotation without image_id": 3}),
        ([1, 1.0], [1], 2, {}),
    ],
)
def test_ids_of_images_and_annotations(tmp_path, ids, of_annotations, read, left_out):
    family, files = find_files(str(coco(tmp_path, ids, of_annotations)))
    _, counts = balance(READERS[family](files))
    assert counts["read"] == read and not counts["skipped"]
    assert {reason[:18]: n for reason, n in counts["left_out"].items()} == {r[:18]: n for r, n in left_out.items()}


def test_questions_and_answers_whose_ids_differ_in_type(tmp_path):
    image_file(tmp_path / "images", "x.jpg")
    asked = [{"question_id": str(n), "image_id": "x", "question": "?"} for n in range(4)]
    (tmp_path / "a_questions.json").write_text(json.dumps({"questions": asked}))
    answers = [{"question_id": n, "multiple_choice_answer": "!"} for n in (0, 1, 2, [3])]
    (tmp_path / "a_annotations.json").write_text(json.dumps({"annotations": answers}))
    family, files = find_files(str(tmp_path))
    entries, counts = balance(READERS[family](files))
    assert entries == 4 and counts["read"] == 3
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {"question without answer": 1}


def llava(folder: Path, *rows: dict) -> Reader:
    image_file(folder)
    (folder / "llava.json").write_text(json.dumps(rows))
    family, files = find_files(str(folder / "llava.json"))
    assert family == "llava"
    return READERS[family](files)


def test_conversations_without_an_image_are_counted(tmp_path):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}] * 2
    rows = [
        {"conversations": turns},
        {"image": None, "conversations": turns},
        {"image": "", "conversations": turns[:3]},
    ]
    entries, counts = balance(llava(tmp_path, *rows, {"image": "a.jpg", "conversations": turns}, {"image": "a.jpg"}))
    assert counts["left_out"] == {"round of a conversation without an image": 6}
    assert entries == 3 and counts["read"] == 2 and list(counts["skipped"]) == ["row of another layout"]


def test_samples_of_one_name_are_counted_each_at_its_place(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(200):
            (tmp_path / "t.txt").write_text("" if number % 50 == 0 else f"a car {number}")
            image_file(tmp_path)
            tar.add(tmp_path / "a.jpg", "0.jpg")
            tar.add(tmp_path / "t.txt", "0.txt")
    entries, counts = balance(CaptionReader([tmp_path / "0.tar"]))
    assert entries == 200 and counts["read"] == 196
    assert counts["skipped"] == {"image without caption": {"count": 4, "examples": ["0.tar/0"]}}


# ---- the account itself ----


class Odd(Reader):
    """Entries of which each has another outcome."""

    name = "odd"

    def __init__(self, error: BaseException | None = None) -> None:
        self.shards, self.error = [Path("a")], error

    def entries(self, shard, number=0, offset=0):
        for index in range(number, 6):
            yield Entry(index, 0, f"a:{index}", index)

    def make_sample(self, key, payload, rng, skip):
        if payload == 1:
            raise BadSample("bad", key)
        if payload == 2:
            raise LeftOut("rule")
        if payload == 3:
            raise KeyError(key)
        if payload == 4 and self.error is not None:
            raise self.error
        skip("part", f"{key}/0")
        return {"id": key}


def test_outcomes_are_told_apart():
    report = DataReport()
    assert [sample["id"] for _, sample in ReaderPass(Odd(), report, 0)] == ["a:0", "a:4", "a:5"]
    counts = report.to_dict()["odd"]
    assert (counts["entries"], counts["read"], counts["dropped_by_rule"]) == (6, 3, 1)
    assert {reason: fault["count"] for reason, fault in counts["skipped"].items()} == {
        "bad": 1,
        "part": 3,
        "unusable entry (KeyError)": 1,
    }
    assert "left out 1 x rule" in str(report)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), DataError("enough")], ids=repr)
def test_an_interrupted_run_has_an_account_that_is_balanced(error):
    report = DataReport()
    with pytest.raises(type(error)):
        list(ReaderPass(Odd(error), report, 0))
    assert report.to_dict()["odd"]["entries"] == 4


def test_an_entry_without_an_outcome_or_with_two_is_an_error():
    report = DataReport()
    report.take("a", "0.tar")
    report.take("a", "0.tar")
    report.read("a", "0.tar", 0)
    with pytest.raises(
        RuntimeError, match="2 entries of a were taken, but the outcome of 1 is known .1 read, 0 dropped"
    ):
        report.to_dict()
    report.drop("a", "rule", "x", "0.tar:1")
    report.read("a", "0.tar", 0)
    with pytest.raises(RuntimeError, match="outcome of 3 is known"):
        str(report)


def test_the_number_of_rows_left_out_is_that_of_the_files_however_they_are_read(tmp_path):
    image = image_file(tmp_path)
    members = {f"{dots}{n}.{kind}": image for n in range(6) for kind in ("jpg", "txt") for dots in ("._", "")}
    members = {name: b"a car" if name.endswith("txt") else data for name, data in members.items()}
    reader = CaptionReader([write_tar(tmp_path / "0.tar", members)])
    whole, cut = DataReport(), DataReport()
    list(ReaderPass(reader, whole, 0))
    first = ReaderPass(reader, cut, 0)
    for _ in zip(first, range(4), strict=False):
        state = first.state_dict()
    report = DataReport()
    report.add_state(cut.state_dict())
    rest = ReaderPass(CaptionReader(reader.shards), report, 0)
    rest.load_state_dict(state)
    list(rest)
    list(ReaderPass(reader, whole, 0, epoch=1))
    for one in (report, whole):
        assert one.to_dict()[reader.name]["left_out"] == {"file that macOS or Windows has added": 12}


def test_rows_count_once_in_all_passes_forms_and_processes(tmp_path):
    image = image_file(tmp_path)
    members = {f"{n}.{kind}": image if kind == "jpg" else b"a car" for n in range(10) for kind in ("jpg", "txt")}
    tar = write_tar(tmp_path / "0.tar", members)
    plain, drawn = CaptionReader([tar]), CaptionReader([tar], form="draw")
    report, other = DataReport(), DataReport(keep_events=True)
    for epoch in range(3):
        list(ReaderPass(plain, report, 0, epoch=epoch, share=(0, 2)))
        list(ReaderPass(plain, other, 0, epoch=epoch, share=(1, 2)))
    list(ReaderPass(drawn, other, 0))
    saved = DataReport()
    saved.add_state(other.state_dict())
    repeated = DataReport()
    repeated.repeat(other.take_events())
    assert repeated.to_dict() == other.to_dict()
    report.add_state(saved.state_dict())
    ours, theirs = (report.to_dict()[reader.name] for reader in (plain, drawn))
    assert (ours["read"], ours["rows"], theirs["read"], theirs["rows"]) == (30, 10, 10, 0)
    assert ours["example"] == {"caption": "a car"}
    assert "a car" in repeated.to_dict()[drawn.name]["example"]["caption"]
