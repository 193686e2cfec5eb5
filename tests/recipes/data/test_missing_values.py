# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What is missing, empty or no text becomes no word: it is refused and counted."""

import json
from pathlib import Path

import datasets
import pytest
from data_fixtures import SPOILT, fault, read_source, spoil_format, texts, write_tar
from PIL import Image

from recipes.data.faults import BadSample
from recipes.data.readers.questions import read_answers
from recipes.data.readers.reader import parse_json

NO_WORDS = ("none", "nan", "null", "[", "{")


def image_bytes(folder: Path) -> bytes:
    Image.new("RGB", (32, 32), (200, 0, 0)).save(folder / "a.png")
    return (folder / "a.png").read_bytes()


def check(samples: list[dict]) -> None:
    """Every answer says something, and nothing that is missing was written out."""
    for sample in samples:
        said = texts(sample) if "messages" in sample else [sample["text"]]
        # the instruction of some region stages says "none"-like words of ours nowhere
        assert not any(word in text.lower() for text in said for word in NO_WORDS), said
        if "messages" in sample:
            answers = [
                text for text, turn in zip(said, sample["messages"], strict=True) if turn["role"] == "assistant"
            ]
            assert answers and all(answer.removeprefix("The answer is").strip() for answer in answers), said


@pytest.mark.parametrize("value", [None, "", " ", float("nan"), float("inf"), [], {}, True, "<image>"], ids=repr)
@pytest.mark.parametrize("name", SPOILT)
def test_no_format_makes_words_of_missing_texts(tmp_path, tiny_processor, name, value):
    samples, skipped = read_source(spoil_format(tmp_path, name, value), tiny_processor)
    check(samples)
    assert samples or skipped


@pytest.mark.parametrize(
    "members",
    [
        {"json": b'{"caption": NaN}'},
        {"json": b'{"caption": null}'},
        {"json": b'{"caption": ""}'},
        {"json": b'{"caption": []}'},
        {"json": b'{"caption": [null, NaN]}'},
        {"json": b'{"caption": -Infinity}'},
        {"json": b'{"caption": 1e999}'},
        {"json": b"null"},
        {"txt": b"\xef\xbb\xbf"},
        {"txt": b" \n"},
    ],
)
def test_captions_of_tars_that_are_missing(tmp_path, tiny_processor, members):
    named = {f"0.{suffix}": data for suffix, data in members.items()}
    tar = write_tar(tmp_path / "0.tar", {"0.png": image_bytes(tmp_path), **named})
    assert read_source(tar, tiny_processor) == ([], {"image without caption": 1})
    (sample,), _ = read_source(
        write_tar(tmp_path / "0.tar", {"0.png": image_bytes(tmp_path), **named, "0.txt": b"a car"}), tiny_processor
    )
    assert sample["text"].replace("<image>", "") == "a car"


def test_a_mark_at_the_beginning_of_a_text_is_no_part_of_it(tmp_path, tiny_processor):
    members = {"0.png": image_bytes(tmp_path), "0.txt": b"\xef\xbb\xbfa car", "1.png": image_bytes(tmp_path)}
    members["1.json"] = b'\xef\xbb\xbf{"caption": "a car"}'
    samples, skipped = read_source(write_tar(tmp_path / "0.tar", members), tiny_processor)
    assert [sample["text"].replace("<image>", "") for sample in samples] == ["a car"] * 2 and not skipped


def test_json_that_says_nothing():
    assert parse_json('[NaN, Infinity, -Infinity, null, 1.5, "NaN"]', "x") == [None, None, None, None, 1.5, "NaN"]
    with pytest.raises(BadSample, match="broken json: x"):
        parse_json("[nan]", "x")


@pytest.mark.parametrize(
    "given, said",
    [
        ("two", ["two"]),
        (2, ["2"]),
        (2.0, ["2"]),
        (0, ["0"]),
        (2.5, ["2.5"]),
        (None, []),
        (float("nan"), []),
        (float("inf"), []),
        ("", []),
        ([], []),
        (["a", "", None, {"answer": "b"}, {"answer": None}, 3], ["a", "b", "3"]),
        ({"answer": "c"}, ["c"]),
    ],
)
def test_answers_that_say_something(given, said):
    assert read_answers(given) == said


@pytest.mark.parametrize("given", [True, b"x", [True], object(), {"text": "x"}])
def test_what_is_no_answer(given):
    with pytest.raises((TypeError, KeyError)):
        read_answers(given)


def rows_file(folder: Path, rows: list[dict]) -> Path:
    """Rows as parquet; `image` and `images` of them get an image."""
    image = {"bytes": image_bytes(folder), "path": None}
    filled = [
        {**row, **{k: [image] * row[k] if k == "images" else image for k in ("image", "images") if k in row}}
        for row in rows
    ]
    datasets.Dataset.from_list(filled).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize(
    "good, bad, reason",
    [
        ({"image": 1, "caption": "a car"}, {"image": 1, "caption": None}, "image without caption"),
        ({"image": 1, "caption": "a car"}, {"image": 1, "caption": " "}, "image without caption"),
        ({"image": 1, "question": "?", "answer": "a"}, {"image": 1, "question": "?", "answer": None}, "question"),
        ({"image": 1, "question": "?", "answer": "a"}, {"image": 1, "question": "?", "answer": ""}, "question"),
        ({"image": 1, "question": "?", "answer": 3}, {"image": 1, "question": "?", "answer": None}, "question"),
        ({"image": 1, "question": "?", "answer": "a"}, {"image": 1, "question": "", "answer": "a"}, "answer without"),
        ({"image": 1, "question": "?", "answer": ["a"]}, {"image": 1, "question": "?", "answer": ["", None]}, "quest"),
        ({"images": 1, "texts": [{"user": "?", "assistant": "a"}]}, {"images": 1, "texts": []}, "dialogue without"),
        (
            {"images": 1, "texts": [{"user": "?", "assistant": "a"}]},
            {"images": 1, "texts": [{"user": "?", "assistant": ""}]},
            "question without answer",
        ),
    ],
)
def test_rows_without_a_text(tmp_path, tiny_processor, good, bad, reason):
    samples, skipped = read_source(rows_file(tmp_path, [bad, good, bad]), tiny_processor)
    check(samples)
    assert len(samples) == 1 and sum(skipped.values()) == 2
    assert all(name.startswith(reason) for name in skipped)


@pytest.mark.parametrize("answer", ["", " ", "</s>", None, []])
def test_chats_without_an_answer(tmp_path, tiny_processor, answer):
    image_bytes(tmp_path)
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": answer}]
    turns += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes"}]
    rows = [{"messages": turns, "images": ["a.png"]}, {"messages": turns[2:], "images": "a.png"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, skipped = read_source(tmp_path / "a.jsonl", tiny_processor)
    assert [texts(sample) for sample in samples] == [["<image>?", "Yes"]] and sum(skipped.values()) == 1


@pytest.mark.parametrize("name", ["sentence_null", "text_is_string"])
def test_the_given_documents(tiny_processor, name):
    samples, skipped = read_source(fault(f"mmc4/{name}"), tiny_processor)
    assert not samples and skipped == {"text_list is not a list of texts": 6}


@pytest.mark.parametrize("name", ["llava/empty_answer", "questions/gqa_none", "questions/textvqa_empty"])
def test_the_given_questions(tiny_processor, name):
    assert read_source(fault(name), tiny_processor) == ([], {"question without answer": 6})


def test_the_given_captions_that_are_missing_or_marked(tiny_processor):
    assert read_source(fault("tars/caption/json_nan.tar"), tiny_processor) == ([], {"image without caption": 6})
    samples, skipped = read_source(fault("tars/caption/bom_txt.tar"), tiny_processor)
    assert {sample["text"].replace("<image>", "") for sample in samples} == {"a red thing"} and not skipped


def test_the_given_rows(tiny_processor):
    samples, skipped = read_source(fault("rows/pq_qa_int"), tiny_processor)
    assert [texts(sample)[1] for sample in samples] == ["The answer is 3"] * 6 and not skipped
    samples, skipped = read_source(fault("rows/pq_cauldron_empty_texts"), tiny_processor)
    assert samples and list(skipped) == ["dialogue without a round"]
    assert len(samples) + skipped["dialogue without a round"] == 6
    samples, skipped = read_source(fault("rows/one_second_system"), tiny_processor)
    assert samples and list(skipped) == ["chat with a system's turn that is not its first"]
    samples, skipped = read_source(fault("rows/image_string"), tiny_processor)
    assert [texts(sample) for sample in samples] == [["<image>What?", "A thing."]] * 6 and not skipped
