# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Unusable data: it is skipped and counted, whatever is wrong with it; too much of it stops a run."""

import io
import json
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from deem_fixtures import tiny_model
from PIL import Image

from processing import DeemDataCollator
from recipes.data.faults import BadSample, DataError, DataReport
from recipes.data.readers.captions import CaptionReader
from recipes.data.sources import DataArguments, build_dataset, count_entries
from recipes.data.stream.shuffle import ReaderPass
from recipes.data.stream.steps import count_tokens
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_caption_tars
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer


def huge_png() -> bytes:
    """A whole header that promises 40 000 x 40 000 pixels."""
    data = io.BytesIO()
    Image.new("1", (9, 9)).save(data, "PNG")
    huge = bytearray(data.getvalue())
    huge[16:24] = (40_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    return bytes(huge)


def rotten_tars(folder: Path, bad: dict[int, set[int]]) -> None:
    """Tars of 50 samples; per tar the numbers of those that are bad, in five kinds by turns."""
    folder.mkdir()
    kind = 0
    for number, spoilt in bad.items():
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for index in range(50):
                data = io.BytesIO()
                World(size=32).scene(50 * number + index).image.save(data, "JPEG")
                jpg, side = data.getvalue(), json.dumps({"caption": f"picture {index}"}).encode()
                if index in spoilt:
                    jpg, side = [
                        (jpg[: len(jpg) // 2], side),
                        (jpg, b'{"caption": '),
                        (b"", side),
                        (huge_png(), side),
                        (b"this is text", side),
                    ][kind % 5]
                    kind += 1
                for suffix, content in (("jpg", jpg), ("json", side)):
                    info = tarfile.TarInfo(f"{index:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def rot_trainer(folder: Path, processor, out: Path, max_steps: int, workers: int = 0, **options) -> RecipeTrainer:
    args = DeemTrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=max_steps,
        per_device_train_batch_size=16,
        dataloader_num_workers=workers,
        save_strategy="no",
        freeze=["*vision_tower*", "model.language_model", "image_decoder"],
    )
    data = DataArguments(data=[str(folder)], pack_length=0, shuffle_buffer=20, **options)
    dataset, report = build_dataset(data, processor, 16, 0)
    return RecipeTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=dataset,
        data_collator=DeemDataCollator(processor, return_targets=False),
        processing_class=processor,
        data_report=report,
    )


def test_a_tar_set_with_bad_members_trains_through_and_reports_each_kind(tiny_processor, tmp_path):
    rotten_tars(tmp_path / "tars", {0: {3, 17, 20}, 1: {0, 49}, 2: {5, 6, 7, 8, 30}})  # 10 of 150
    rot_trainer(tmp_path / "tars", tiny_processor, tmp_path / "out", max_steps=10).train()
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())[str(tmp_path / "tars")]
    assert {reason: fault["count"] for reason, fault in report["skipped"].items()} == {
        "truncated or broken image": 2,
        "broken json": 2,
        "empty image": 2,
        "image too large": 2,
        "not an image": 2,
    }
    assert report["read"] >= 160


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_members_stop_the_run_with_the_worst_shard(tiny_processor, tmp_path, workers):
    rotten_tars(tmp_path / "tars", {0: set(range(0, 50, 5)), 1: set(range(10, 50))})  # 10 and 40 of 50
    message = r"of the first 1\d\d entries of .*tars are unusable \(\d\d%\).*Worst: 00001.tar with \d+ of "
    with pytest.raises(DataError, match=message) as e:
        rot_trainer(tmp_path / "tars", tiny_processor, tmp_path / "out", 40, workers).train()
    assert "Traceback" not in str(e.value) and "raise --max_skipped" in str(e.value)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())[str(tmp_path / "tars")]
    assert len(report["skipped"]) == 5


class FaultyReader(CaptionReader):
    """Trips over some entries, and in the second tar over the reading itself."""

    def entries(self, shard, number=0, offset=0):
        for entry in super().entries(shard, number, offset):
            if shard.name == "00001.tar" and entry.number == 7:
                raise KeyError("no such thing")
            yield entry

    def make_sample(self, key, payload, rng, skip):
        if key.endswith("0003"):
            raise TypeError("expected something else")
        return super().make_sample(key, payload, rng, skip)


def test_what_no_reader_foresaw_is_counted_and_ends_no_run(tmp_path, caplog):
    write_caption_tars(tmp_path, World(size=16), 20, per_tar=10)
    reader, report = FaultyReader(sorted(tmp_path.glob("*.tar"))), DataReport()
    keys = [entry.key for entry in reader.entries(reader.shards[0])]
    keys += [entry.key for entry in islice(reader.entries(reader.shards[1]), 7)]
    first = keys[0]

    def finish(sample, rng):
        if sample["id"] == first:
            raise OverflowError("too long for the tokenizer")
        return sample

    read = [sample["id"] for _, sample in ReaderPass(reader, report, 0, shuffle_buffer=4, finish=finish)]
    skipped = report.to_dict()[reader.name]["skipped"]
    assert {reason: fault["examples"] for reason, fault in skipped.items()} == {
        "unusable entry (OverflowError)": [first],
        "unusable entry (TypeError)": sorted(key for key in keys if key.endswith("0003")),
        "unusable file (KeyError)": ["00001.tar"],
    }
    assert sorted(read) == [key for key in keys[1:] if not key.endswith("0003")] and len(read) == 14
    assert "expected something else" in caplog.text
    assert count_entries(reader) == 17


def test_a_caption_that_cannot_be_tokenized_ends_no_run(tiny_processor, tmp_path, monkeypatch):
    write_caption_tars(tmp_path, World(size=16), 20, per_tar=10)
    data = DataArguments(data=[str(tmp_path)], pack_length=120)
    dataset = build_dataset(data, tiny_processor, 2, 0)[0]
    spoilt = []
    original = CaptionReader.make_sample

    def make_sample(self, key, *args):
        made = original(self, key, *args)
        if len(spoilt) < 2:
            spoilt.append(key)
            made["text"] = [3.5, made["text"] + self.image_token][len(spoilt) - 1]  # no text; a place without an image
        return made

    monkeypatch.setattr(CaptionReader, "make_sample", make_sample)
    assert len(list(islice(dataset, 8))) == 8
    reasons = dataset.report.to_dict()[str(tmp_path)]["skipped"]
    assert len(reasons) == 2 and "images and their places differ in number" in reasons
    assert any(reason.startswith("unusable entry (") for reason in reasons)


def test_a_source_that_gives_nothing_says_why(tiny_processor, tmp_path):
    rotten_tars(tmp_path / "tars", {0: set(range(50))})
    data = DataArguments(data=[str(tmp_path / "tars")], pack_length=0, max_skipped=1.0)
    dataset = build_dataset(data, tiny_processor, 2, 0)[0]
    with pytest.raises(
        DataError, match=r"no usable sample: .*So far were read from it: 0 samples.*10 x broken json \(e.g. "
    ) as e:
        list(islice(dataset, 2))
    assert "10 x empty image" in str(e.value) and "10 x image too large" in str(e.value)


# ---- what the collator and the model would not take ----


def chats(folder: Path, *rows: dict, images: int = 1) -> str:
    Image.new("RGB", (32, 32), (200, 30, 30)).save(folder / "a.png")
    rows = [{"images": ["a.png"] * images, **row} for row in rows]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "chats.jsonl")


def turns(question: str = "What?", *more: dict) -> list[dict]:
    return [*more, {"role": "user", "content": question}, {"role": "assistant", "content": "Red."}]


def read_stream(data: str, processor, number: int, **options) -> tuple[list[dict], dict[str, int]]:
    dataset = build_dataset(DataArguments(data=[data], max_skipped=1.0, **options), processor, 1, 0)[0]
    samples = list(islice(dataset, number))
    (counts,) = dataset.report.to_dict().values()
    return samples, {reason: fault["count"] for reason, fault in counts["skipped"].items()}


def test_a_chat_that_the_template_refuses_is_skipped(tmp_path, tiny_processor):
    tiny_processor.chat_template = (
        "{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('no system here') }}{%- endif -%}"
        "{%- endfor -%}" + tiny_processor.chat_template
    )
    data = chats(tmp_path, {"messages": turns("?", {"role": "system", "content": "x"})}, {"messages": turns()})
    for length in (0, 1000):
        samples, skipped = read_stream(data, tiny_processor, 3, pack_length=0, max_length=length)
        assert {sample["id"] for sample in samples} == {"chats.jsonl:2"}
        assert skipped == {"chat that the chat template refuses": 1}


def test_what_is_longer_than_any_memory_is_skipped_and_named(tmp_path, tiny_processor):
    data = chats(tmp_path, {"messages": turns("a" * 100_000)}, {"messages": turns()})
    samples, skipped = read_stream(data, tiny_processor, 3, pack_length=0)
    assert {sample["id"] for sample in samples} == {"chats.jsonl:2"} and skipped == {"longer than 4096 tokens": 1}
    tiny_processor.tokenizer.model_max_length = 100
    data = chats(tmp_path, {"messages": turns("a" * 70)}, {"messages": turns("a")})
    _, skipped = read_stream(data, tiny_processor, 3, pack_length=0)
    assert skipped == {"longer than 100 tokens": 1}
    assert not read_stream(data, tiny_processor, 3, pack_length=0, max_length=2000)[1]


def test_a_row_of_more_images_than_fit_is_skipped(tmp_path, tiny_processor):
    many = {"messages": turns("<image>" * 900), "images": ["a.png"] * 900}
    samples, skipped = read_stream(chats(tmp_path, many, {"messages": turns()}), tiny_processor, 2, pack_length=0)
    assert len(samples) == 2 and skipped == {"longer than 4096 tokens": 1}


def test_a_row_of_more_images_than_the_model_has_room_for_is_skipped(tmp_path, tiny_processor):
    many = {"messages": turns("<image>" * 4), "images": ["a.png"] * 4}
    fits = {"messages": turns("<image>" * 3), "images": ["a.png"] * 3}
    data = DataArguments(data=[chats(tmp_path, many, fits)], max_skipped=1.0, pack_length=0)
    dataset = build_dataset(data, tiny_processor, 1, 0, most_images=3)[0]
    assert [len(sample["images"]) for sample in islice(dataset, 2)] == [3, 3]
    (counts,) = dataset.report.to_dict().values()
    assert {reason: fault["examples"] for reason, fault in counts["skipped"].items()} == {
        "more than 3 images, which the model has room for": ["chats.jsonl:1"]
    }


def test_a_long_caption_is_skipped_without_packing_and_cut_with_it(tmp_path, tiny_processor):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png," + "red " * 25_000 + "\na.png,short\n")
    samples, skipped = read_stream(str(tmp_path / "a.csv"), tiny_processor, 2, pack_length=0)
    assert skipped == {"longer than 4096 tokens": 1} and "short" in samples[0]["text"]
    samples, skipped = read_stream(str(tmp_path / "a.csv"), tiny_processor, 2, pack_length=200)
    assert not skipped and max(len(sample["input_ids"]) for sample in samples) <= 200


def test_a_mask_of_another_size_than_its_image_is_skipped(tiny_processor):
    image = Image.new("RGB", (32, 16))
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "Red."}]
    sample = {"messages": messages, "images": [image], "region_masks": [np.ones((16, 32), bool)], "id": "x"}
    assert count_tokens(sample, tiny_processor) > 10
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    for wrong in ({"images": [turned]}, {"region_masks": [np.ones((32, 16), bool)]}):
        with pytest.raises(BadSample, match="region mask of another size than its image: x"):
            count_tokens({**sample, **wrong}, tiny_processor)
