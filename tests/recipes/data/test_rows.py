# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Rows of chats in every file form: the same samples, with several data workers, whatever the form of their turns."""

import io
import json
from pathlib import Path

import datasets
import pytest
from data_fixtures import fault, read_source, texts
from PIL import Image
from torch.utils.data import DataLoader

from processing import DeemDataCollator
from recipes.data.faults import DataError, DataReport
from recipes.data.formats import READERS, find_files
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.shuffle import ReaderPass


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(data, "PNG")
    return data.getvalue()


def chat(question: str, answer: str, as_items: bool) -> list[dict]:
    if not as_items:
        return [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    said = [{"type": "image"}, {"type": "text", "text": question}]
    return [
        {"role": "user", "content": said},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def read(path: Path) -> tuple[list[list[str]], dict]:
    family, files = find_files(str(path))
    reader, report = READERS[family](files), DataReport()
    samples = [sample for _, sample in ReaderPass(reader, report, seed=0)]
    spoken = [
        ["".join(item.get("text", "<image>") for item in message["content"]) for message in sample["messages"]]
        for sample in samples
    ]
    return spoken, report.to_dict()[reader.name]["skipped"]


def write_jsonl(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "red.png").write_bytes(png("red"))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chats.jsonl"


def test_turns_of_both_forms_in_one_file(tmp_path) -> None:
    rows = [{"messages": chat("What?", "Yes", number > 2), "images": ["red.png"]} for number in range(6)]
    spoken, skipped = read(write_jsonl(tmp_path / "chats", list(map(json.dumps, rows))))
    assert spoken == [["<image>What?", "Yes"]] * 6 and not skipped


def test_items_alone_and_a_broken_line(tmp_path) -> None:
    lines = [json.dumps({"messages": chat(f"{n}?", "Yes", True), "images": ["red.png"]}) for n in range(54)]
    lines[3] = lines[3][:30]
    spoken, skipped = read(write_jsonl(tmp_path / "chats", lines))
    assert spoken == [[f"<image>{n}?", "Yes"] for n in range(54) if n != 3]
    assert {reason: fault["count"] for reason, fault in skipped.items()} == {"broken json": 1}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "Yes"}],
        [{"role": "user", "content": "<image>What?"}],
        [
            {"role": "user", "content": "<image>"},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "a"},
        ],
    ],
)
def test_chats_that_cannot_be_learned_are_counted(tmp_path, messages) -> None:
    rows = [
        {"messages": messages, "images": ["red.png"]},
        {"messages": chat("What?", "Yes", True), "images": ["red.png"]},
    ]
    spoken, skipped = read(write_jsonl(tmp_path / "chats", list(map(json.dumps, rows))))
    assert spoken == [["<image>What?", "Yes"]] and sum(fault["count"] for fault in skipped.values()) == 1


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_every_data_worker_reads_its_own_rows(tmp_path, tiny_processor, kind: str, workers: int) -> None:
    """`datasets` shares rows out among data workers by itself; the readers do so already."""
    colors = [{"bytes": png("red"), "path": None}] * 13
    rows = [chat(f"{n}?", "Yes", False) for n in range(13)]
    if kind == "jsonl":
        lines = [json.dumps({"messages": row, "images": ["red.png"]}) for row in rows]
        path = write_jsonl(tmp_path / "chats", lines)
    else:
        features = datasets.Features(
            messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            images=datasets.List(datasets.Image()),
        )
        dataset = datasets.Dataset.from_dict({"messages": rows, "images": [[c] for c in colors]}, features=features)
        path = tmp_path / f"chats.{kind}"
        if kind == "parquet":
            dataset.to_parquet(path)
        else:
            dataset.save_to_disk(tmp_path / "disk")
            (tmp_path / "disk" / "data-00000-of-00001.arrow").rename(path)
    data = DataArguments(data=[str(path)], pack_length=0, shuffle_buffer=0, data_stopping="sum")
    dataset = build_dataset(data, tiny_processor, 1, 0)[0]
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=lambda samples: samples[0]["id"])
    seen = [name for name, _ in zip(loader, range(13), strict=False)]
    assert len(set(seen)) > 9


def test_rows_that_cannot_be_read_at_all_say_why(tmp_path) -> None:
    (tmp_path / "chats.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match="No row of .* can be read: unreadable data file: chats.parquet"):
        read(tmp_path / "chats.parquet")


PLACED = [
    [("user", "First <image> then <image>. Which is red?"), ("assistant", "the first")],
    [("user", "Hello."), ("assistant", "Hi."), ("user", "<image> What is it?"), ("assistant", "red")],
    [("user", "<image> What?"), ("assistant", "red"), ("user", "<image> And this?"), ("assistant", "blue")],
    [("user", "Draw a red square."), ("assistant", "<image>")],
    [
        ("user", "Draw <image> as a star.</s>"),
        ("assistant", "Here: <image>"),
        ("user", "?"),
        ("assistant", "<image>!"),
    ],
    [("system", "Be short."), ("user", "<pad>W<image>"), ("assistant", "W<image>")],
]


def test_placeholders_in_plain_strings_stay_where_they_were_written(tmp_path, tiny_processor) -> None:
    """Also with the special tokens of a real processor, of which the placeholder is one."""
    rows = []
    for turns in PLACED:
        count = sum(said.count("<image>") for _, said in turns)
        messages = [{"role": role, "content": said} for role, said in turns]
        rows.append({"messages": messages, "images": ["red.png"] * count})
    samples, skipped = read_source(write_jsonl(tmp_path / "chats", list(map(json.dumps, rows))), tiny_processor)
    said = [[text.replace("</s>", "").replace("<pad>", "") for _, text in turns] for turns in PLACED]
    assert [texts(sample) for sample in samples] == said and not skipped
    assert [sample["mode"] for sample in samples] == ["image_to_text"] * 3 + ["interleaved"] * 3
    collator, image = DeemDataCollator(tiny_processor), tiny_processor.image_token_id
    for sample, turns in zip(samples, PLACED, strict=True):
        ids = collator([sample])["input_ids"][0]
        expected = sum(text.count("<image>") for _, text in turns) * tiny_processor.num_image_tokens
        assert (ids == image).sum() == expected


def test_the_given_chats_keep_their_places(tiny_processor) -> None:
    samples, skipped = read_source(fault("rows/chats.jsonl"), tiny_processor)
    assert not skipped and [texts(sample) for sample in samples] == [
        ["First <image> then <image>. Which is red?", "the first"],
        ["Hello.", "Hi.", "<image> What is it?", "red"],
        ["<image> What?", "red", "<image> And this?", "blue"],
        ["Draw a red square.", "<image>"],
        ["Draw a red square.", "<image>"],
    ]
    assert [sample["mode"] for sample in samples] == ["image_to_text"] * 3 + ["interleaved"] * 2
    trained = DeemDataCollator(tiny_processor)([samples[3]])["labels"][0]
    assert tiny_processor.start_of_image_token_id in trained.tolist()
