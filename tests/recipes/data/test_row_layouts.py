# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Data as people have them: folders of images, tables of captions, chats with images in their parts."""

import base64
import csv
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_fixtures import fault, read_source, texts
from PIL import Image

from recipes.data.faults import DataError
from recipes.data.formats import find_files
from recipes.data.readers.row_layouts import layout_of
from recipes.data.sources import DataArguments, build_dataset, make_reader

COLORS = {"a": (200, 30, 30), "b": (30, 200, 30), "c": (30, 30, 200)}


def image_file(file: Path, color: tuple[int, int, int] = COLORS["a"]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), color).save(file)
    return file


def images(folder: Path, place: str = "") -> None:
    for name, color in COLORS.items():
        image_file(folder / place / f"{name}.png", color)


def write_jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def captions(samples: list[dict]) -> dict[str, str]:
    """What is said of the image of each name."""
    found = {}
    for sample in samples:
        (image,) = sample["images"]
        middle = image.getpixel((5, 5))
        name = next(name for name, color in COLORS.items() if max(map(abs, map(int.__sub__, color, middle))) < 9)
        found[name] = sample["text"].replace("<image>", "")
    return found


SAID = {"a": "a red thing", "b": "a green, thing", "c": "a blue thing"}


def check_captions(data: Path, processor: Any, expected: dict[str, str] = SAID) -> None:
    samples, skipped = read_source(data, processor)
    assert captions(samples) == expected and not skipped
    for form, mode in (("describe", "image_to_text"), ("draw", "text_to_image")):
        assert {sample["mode"] for sample in read_source(data, processor, form)[0]} == {mode}


# ---- tables of captions ----


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv", "x.tsv", "y.CSV"]
)
@pytest.mark.parametrize("columns", [("file_name", "text"), ("image", "caption"), ("image_path", "description")])
@pytest.mark.parametrize("place", ["", "images", "deep/er"])
def test_tables_of_images_and_captions(tmp_path, tiny_processor, name, columns, place):
    images(tmp_path, place)
    rows = [dict(zip(columns, (f"{place}/{key}.png".lstrip("/"), said), strict=True)) for key, said in SAID.items()]
    if name.endswith("jsonl"):
        write_jsonl(tmp_path / name, [{**row, "width": 32} for row in rows])
    else:
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    check_captions(tmp_path, tiny_processor)
    check_captions(tmp_path / name, tiny_processor)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("image;caption\na.png;a red thing\nb.png;a green, thing\n", {"a": "a red thing", "b": "a green, thing"}),
        ("\ufeffimage,caption\r\na.png,a red thing\r\n", {"a": "a red thing"}),
        ('id,image,caption\n1,a.png,"a ""red""\nthing"\n2,b.png,green\n', {"a": 'a "red"\nthing', "b": "green"}),
        ("caption,image\nred,a.png\n\ngreen,b.png\n", {"a": "red", "b": "green"}),
        ("image\tcaption\na.png\tred\n", {"a": "red"}),
    ],
)
def test_tables_in_text_of_several_kinds(tmp_path, tiny_processor, text, expected):
    images(tmp_path)
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    check_captions(tmp_path / "a.csv", tiny_processor, expected)


def test_rows_of_a_table_that_cannot_be_used_are_counted(tmp_path, tiny_processor):
    images(tmp_path)
    rows = [b"image,caption", b"a.png,red", b"a.png,", b",red", b"a.png,red,more", b"a.png", b"gone.png,red"]
    rows += [b"a.png,\xff\xfe", b"a.png,NaN", b"https://x.example/a.png,red"]
    (tmp_path / "a.csv").write_bytes(b"\n".join(rows))
    samples, skipped = read_source(tmp_path / "a.csv", tiny_processor)
    assert [sample["text"].replace("<image>", "") for sample in samples] == ["red", "nan"]
    assert skipped == {
        "image without caption": 2,
        "row without an image": 1,
        "row of another layout": 2,
        "missing image": 1,
        "image is not on disk": 1,
    }


def test_a_table_with_other_columns_says_which_it_has(tmp_path, tiny_processor):
    images(tmp_path)
    for name, text in (("a.csv", "photo,words\na.png,red\n"), ("b.jsonl", '{"photo": "a.png", "words": "red"}\n')):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"columns of .* are \['photo', 'words'\]; expected .*file_name.*Rename"):
            make_reader(str(tmp_path / name), tiny_processor)


@pytest.mark.parametrize("as_list", [False, True])
def test_one_of_several_captions_is_drawn(tmp_path, tiny_processor, as_list):
    images(tmp_path)
    said = ["one", "two", "", None, "three"]
    write_jsonl(tmp_path / "a.jsonl", [{"image": ["a.png"] if as_list else "a.png", "caption": said}])
    drawn = {captions(read_source(tmp_path, tiny_processor, epoch=epoch)[0])["a"] for epoch in range(30)}
    assert drawn == {"one", "two", "three"}


@pytest.mark.parametrize("columns", [("image", "text"), ("image", "caption"), ("jpg", "text"), ("image", "label")])
def test_parquet_and_saved_folders(tmp_path, tiny_processor, columns):
    images(tmp_path / "from")
    given = [str(tmp_path / "from" / f"{name}.png") for name in SAID]
    table = datasets.Dataset.from_dict({columns[0]: given, columns[1]: list(SAID.values()), "width": [32] * 3})
    table = table.cast_column(columns[0], datasets.Image())
    table.to_parquet(
        tmp_path / "from" / "0.parquet"
    )  # with the paths of the images; the folders below hold their bytes
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "split")
    for folder in ("from", "saved", "split"):
        check_captions(tmp_path / folder, tiny_processor)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "several")
    with pytest.raises(ValueError, match="several splits"):
        find_files(str(tmp_path / "several"))
    check_captions(tmp_path / "several" / "train", tiny_processor)


def test_labels_of_classes_are_their_names(tmp_path, tiny_processor):
    images(tmp_path / "from")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["red_thing", "b", "c"]))
    given = {"image": [str(tmp_path / "from" / f"{name}.png") for name in ("a", "b", "c")], "label": [0, 1, None]}
    datasets.Dataset.from_dict(given, features=features).save_to_disk(tmp_path / "saved")
    samples, skipped = read_source(tmp_path / "saved", tiny_processor)
    assert captions(samples) == {"a": "red thing", "b": "b"} and skipped == {"image without caption": 1}


# ---- folders of images ----


@pytest.mark.parametrize("split", ["", "train"])
def test_sub_folders_named_by_what_they_show(tmp_path, tiny_processor, split):
    for name, label in (("a", "Red_thing"), ("b", "val"), ("c", "valley/test")):
        image_file(tmp_path / split / label / f"train_{name}.png", COLORS[name])
    (tmp_path / split / "Red_thing" / "._train_a.png").write_bytes(b"x")
    (tmp_path / "README.md").write_text("x")
    samples, skipped = read_source(tmp_path / split, tiny_processor)
    assert captions(samples) == {"a": "red thing"} and skipped == {"image without caption": 2}


def test_labels_below_a_folder_of_the_split(tmp_path, tiny_processor):
    for name, label in (("a", "red"), ("b", "green"), ("c", "blue thing")):
        image_file(tmp_path / "train" / label / "1.png", COLORS[name])
    check_captions(tmp_path, tiny_processor, {"a": "red", "b": "green", "c": "blue thing"})
    check_captions(tmp_path / "train", tiny_processor, {"a": "red", "b": "green", "c": "blue thing"})
    image_file(tmp_path / "test" / "red" / "1.png")
    with pytest.raises(ValueError, match=r"several splits \(test, train\). Name the folder"):
        find_files(str(tmp_path))


def test_captions_in_files_beside(tmp_path, tiny_processor):
    images(tmp_path)
    (tmp_path / "a.txt").write_text("\ufeffA red thing\n")
    (tmp_path / "b.json").write_text('{"caption": "a green, thing"}')
    (tmp_path / "c.txt").write_text("  ")
    samples, skipped = read_source(tmp_path, tiny_processor)
    assert captions(samples) == {"a": "a red thing", "b": "a green, thing"} and skipped == {"image without caption": 1}


def test_images_of_which_nothing_is_said_are_refused(tmp_path):
    images(tmp_path / "photos")
    with pytest.raises(ValueError, match="nothing says what they show. Write a .txt beside each, a metadata.jsonl"):
        find_files(str(tmp_path / "photos"))


def test_images_beside_a_table_belong_to_it(tmp_path, tiny_processor):
    images(tmp_path, "red")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "red/a.png", "text": "one"}])
    (tmp_path / "dataset_info.json").write_text('{"conversations": 1}')
    check_captions(tmp_path, tiny_processor, {"a": "one"})


# ---- chats ----


def part(**items: Any) -> dict:
    return {"type": "image", **items}


def chat(*content: Any, answer: Any = "Red.") -> list[dict]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


WORDS = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "messages, beside, said",
    [
        (chat(part(image="a.png"), WORDS), {}, "<image>What?"),
        (chat(WORDS, part(path="a.png")), {}, "What?<image>"),
        (chat(part(image="a.png"), WORDS, part(image="b.png")), {"images": []}, "<image>What?<image>"),
        (chat({"type": "image_url", "image_url": {"url": "a.png"}}, WORDS), {}, "<image>What?"),
        (chat(part(image={"bytes": None, "path": "a.png"}), WORDS), {}, "<image>What?"),
        (chat(part(image=None), WORDS), {"images": ["a.png"]}, "<image>What?"),
        (chat(part(image="a.png"), part(), WORDS), {"image": "b.png"}, "<image><image>What?"),
        (
            chat({"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}),
            {},
            "<image>What?",
        ),
    ],
)
def test_images_in_the_parts_of_chats(tmp_path, tiny_processor, messages, beside, said):
    images(tmp_path)
    (sample,), skipped = read_source(
        write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, **beside}]), tiny_processor
    )
    assert texts(sample)[0] == said and not skipped
    assert sample["images"][0].getpixel((5, 5)) == COLORS["a"] and len(sample["images"]) == said.count("<image>")


def test_a_drawn_image_in_a_part(tmp_path, tiny_processor):
    images(tmp_path)
    rows = [{"messages": chat(WORDS, answer=[{"type": "image", "image": "b.png"}])}]
    (sample,), _ = read_source(write_jsonl(tmp_path / "a.jsonl", rows), tiny_processor)
    assert sample["mode"] == "interleaved" and sample["images"][0].getpixel((5, 5)) == COLORS["b"]


def test_chats_that_do_not_fit_are_counted(tmp_path, tiny_processor):
    images(tmp_path)
    good = {"messages": chat(part(image="a.png"), WORDS)}
    rows = [
        good,
        {"messages": chat(part(), WORDS)},
        {"messages": chat(part(image="a.png"), WORDS), "images": ["b.png"]},
        {"messages": chat(part(image="gone.png"), WORDS)},
        {"messages": chat(part(image="https://x.example/a.png"), WORDS)},
        {"messages": chat({"type": "video", "video": "a.mp4"}, WORDS)},
        {"messages": "What?"},
        {"messages": None},
        {"image": "a.png", "caption": "a caption among chats"},
        {
            "messages": [
                {"role": "system", "content": "x"},
                *chat(WORDS),
                {"role": "system", "content": "y"},
                *chat(WORDS),
            ]
        },
        {"messages": [*chat(WORDS), {"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    samples, skipped = read_source(write_jsonl(tmp_path / "a.jsonl", rows), tiny_processor)
    assert len(samples) == 1 and skipped == {
        "images and their places differ in number": 2,
        "missing image": 1,
        "image is not on disk": 1,
        "row of another layout": 4,
        "chat with a system's turn that is not its first": 1,
        "chat without a user's turn, without an answer at its end, or of other roles": 1,
    }


@pytest.mark.parametrize("people", [("human", "gpt"), ("user", "assistant")])
def test_conversations_in_rows(tmp_path, tiny_processor, people):
    images(tmp_path)
    turns = ["<image>\nWhat?", "Red.", "Why?", "So."]
    said = [{"from": people[n % 2], "value": text} for n, text in enumerate(turns)]
    rows = [{"id": 1, "image": "a.png", "conversations": [{"from": "system", "value": "Be short."}, *said]}]
    (sample,), skipped = read_source(write_jsonl(tmp_path / "a.jsonl", rows), tiny_processor)
    assert texts(sample) == ["Be short.", *turns] and not skipped


def test_images_as_data_uris(tmp_path, tiny_processor):
    data = base64.b64encode(image_file(tmp_path / "a.png").read_bytes()).decode()
    uri = f"data:image/png;base64,{data}"
    rows = [{"messages": chat(WORDS), "images": [uri]}, {"messages": chat(part(image=uri), WORDS)}]
    rows += [{"messages": chat(WORDS), "image": f"data:image/png;base64,{data[:40]}\n{data[40:]}"}]
    rows += [
        {"messages": chat(WORDS), "image": bad} for bad in ("data:image/png,abc", "data:image/png;base64,a#c", "data:")
    ]
    samples, skipped = read_source(write_jsonl(tmp_path / "a.jsonl", rows), tiny_processor)
    assert [texts(sample)[0] for sample in samples] == ["<image>What?"] * 3
    assert skipped == {"data URI that is not base64": 2, "broken data URI": 1}


def test_a_question_with_an_image_by_its_file_name(tmp_path, tiny_processor):
    images(tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "question": "How many?", "answer": 3}])
    (sample,), _ = read_source(tmp_path, tiny_processor)
    assert texts(sample)[1] == "The answer is 3" and sample["images"][0].getpixel((5, 5)) == COLORS["a"]


@pytest.mark.parametrize(
    "row, layout",
    [
        ({"messages": [], "images": []}, "chat"),
        ({"image": 1, "conversations": []}, "chat"),
        ({"images": [], "texts": [{"user": ""}]}, "rounds"),
        ({"images": [], "texts": [None, "a"]}, "document"),
        ({"images": [], "texts": None}, "texts"),
        ({"image": 1, "question": 1, "caption": 1}, "question"),
        ({"file_name": 1, "text": 1}, "caption"),
        ({"question_id": 1, "image": 1, "text": 1, "label": 1}, None),
        ({"file": "a", "caption": "b"}, None),
        ({"text": "a"}, None),
        ({"image": 1}, None),
        ({}, None),
    ],
)
def test_what_columns_tell(row, layout):
    assert layout_of(row) == layout


@pytest.mark.parametrize("name", ["data_uri", "image_string", "pq_qa_int", "pq_caption_upper_token"])
def test_the_given_rows(tiny_processor, name):
    samples, skipped = read_source(fault(f"rows/{name}"), tiny_processor)
    assert len(samples) == 6 and not skipped


# ---- names are data ----


@pytest.mark.parametrize("name", ["../out.png", "{root}/out.png", "x/../../out.png", "./../data/../out.png"])
def test_rows_name_no_image_outside_of_the_data(tmp_path, tiny_processor, name):
    image_file(tmp_path / "out.png")
    images(tmp_path / "data", "in")
    name = name.format(root=tmp_path)
    rows = [{"messages": chat(WORDS), "images": [name]}, {"messages": chat(part(image=name), WORDS)}]
    rows += [{"messages": chat(WORDS), "image": "in/../in/a.png"}, {"messages": chat(WORDS), "image": "./in/b.png"}]
    rows += [{"messages": chat(WORDS), "image": str(tmp_path / "data" / "in" / "c.png")}]
    file = write_jsonl(tmp_path / "data" / "a.jsonl", rows)
    for data in (tmp_path / "data", file):
        samples, skipped = read_source(data, tiny_processor)
        assert len(samples) == 3 and skipped == {"image outside of the data's folder and --image_folders": 2}


def test_an_option_allows_other_folders_and_searches_them(tmp_path, tiny_processor):
    images(tmp_path / "elsewhere" / "deep")
    (tmp_path / "data").mkdir()
    named = ["a.png", "../elsewhere/deep/b.png", str(tmp_path / "elsewhere" / "deep" / "c.png"), "../elsewhere/d.png"]
    file = write_jsonl(tmp_path / "data" / "a.jsonl", [{"image": name, "caption": "x"} for name in named])
    arguments = DataArguments(data=[str(file)], image_folders=[str(tmp_path / "elsewhere" / "deep")], pack_length=0)
    dataset = build_dataset(arguments, tiny_processor, 1, 0, ("plain", "draw"))[0]
    samples = list(itertools.islice(dataset, 12))
    assert {sample["images"][0].getpixel((5, 5)) for sample in samples} == set(COLORS.values())
    for counts in dataset.report.to_dict().values():
        skipped = {reason: fault["count"] for reason, fault in counts["skipped"].items()}
        assert skipped == {"image outside of the data's folder and --image_folders": 1}


def test_rows_in_deeper_folders_name_images_anywhere_below_the_given_one(tmp_path, tiny_processor):
    images(tmp_path, "photos")
    (tmp_path / "tables").mkdir()
    write_jsonl(tmp_path / "tables" / "a.jsonl", [{"image": "../photos/a.png", "caption": "x"}])
    write_jsonl(tmp_path / "tables" / "b.jsonl", [{"image": "photos/b.png", "caption": "y"}])
    assert captions(read_source(tmp_path, tiny_processor)[0]) == {"a": "x", "b": "y"}


@pytest.mark.parametrize("name", ["captions.json", "captions.xml", "labels.csv", "list.jsonl"])
def test_images_beside_data_of_no_known_format_are_refused(tmp_path, name):
    images(tmp_path, "one")
    images(tmp_path, "two")
    (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=f"Nothing usable .* but images, and {name} may say what they show"):
        find_files(str(tmp_path))
    (tmp_path / name).rename(tmp_path / "README.md")
    assert find_files(str(tmp_path))[0] == "imagefolder"


def test_folders_of_coco_are_no_labels(tmp_path):
    for split in ("train2017", "val2017"):
        images(tmp_path, split)
    with pytest.raises(ValueError, match=r"several splits \(train2017, val2017\)"):
        find_files(str(tmp_path))


def test_a_first_row_of_other_columns_costs_itself_alone(tmp_path, tiny_processor):
    images(tmp_path)
    rows = [
        {"version": 1, "license": "x"},
        *({"image": f"{name}.png", "caption": said} for name, said in SAID.items()),
    ]
    samples, skipped = read_source(write_jsonl(tmp_path / "a.jsonl", rows), tiny_processor)
    assert captions(samples) == SAID and skipped == {"row of another layout": 1}
