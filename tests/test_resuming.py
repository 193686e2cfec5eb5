# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The data position is part of a checkpoint; parts for processes and workers; too much rot stops a run."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from deem_fixtures import tiny_model
from PIL import Image
from torch.utils.data import DataLoader

from processing import DeemDataCollator
from recipes.data.captions import CaptionReader
from recipes.data.dataset import POSITION, PositionCollator, SourceStream, flip_images
from recipes.data.interleaved import InterleavedReader
from recipes.data.reading import DataError, DataReport
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.streaming import RecordStream
from recipes.trainer import DeemTrainer, DeemTrainingArguments
from recipes.world import World, write_caption_tars, write_formats


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_formats(folder, World(size=32), 60, formats=["mmc4"])
    write_caption_tars(folder / "captions", World(size=32), 90, per_tar=40)
    return folder


def make_dataset(world: Path, processor, seed: int = 3, **options):
    options = {"shuffle_buffer": 8, "pack_length": 120, "max_images": 4} | options
    sources = [str(world / "mmc4_annts"), str(world / "captions")]
    return build_dataset(DataArguments(data=sources, **options), processor, 2, seed)[0]


def names(samples: list[dict]) -> dict:
    return {"ids": [sample["id"] for sample in samples], "tokens": [sample.get("input_ids") for sample in samples]}


def consume(dataset, batches: int, workers: int) -> list[dict]:
    """Batches as a trainer takes them."""
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=PositionCollator(names))
    taken = []
    for batch, _ in zip(loader, range(batches), strict=False):
        if (position := batch.pop(POSITION, None)) is not None:
            dataset.note(position)
        taken.append(batch)
        if len(taken) == batches:
            break
    return taken


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pack_length": 0, "shuffle_buffer": 0, "data_stopping": "sum"},
        {"data_stopping": "shortest", "data_mixing": "sample", "random_flip": True, "caption_group_prob": 0.5},
    ],
)
def test_a_saved_position_goes_on_with_the_same_samples(world, tiny_processor, tmp_path, workers, options):
    whole_set = make_dataset(world, tiny_processor, **options)
    whole = consume(whole_set, 40, workers)
    at = random.Random(f"{workers} {options}").randrange(3, 30)
    cut = make_dataset(world, tiny_processor, **options)
    assert consume(cut, at, workers) == whole[:at]
    torch.save(cut.state_dict(workers), tmp_path / "position.pt")
    resumed = make_dataset(world, tiny_processor, **options)
    resumed.load_state_dict(torch.load(tmp_path / "position.pt", weights_only=True))
    assert consume(resumed, 40 - at, workers) == whole[at:]
    assert resumed.report.to_dict() == whole_set.report.to_dict()
    assert len({name for batch in whole for name in batch["ids"]}) > 10


def test_a_resumed_stream_reads_only_what_it_held(world, tiny_processor, monkeypatch):
    dataset = make_dataset(world, tiny_processor)
    consume(dataset, 30, 0)
    calls = Counter()
    for name in ("record", "entries"):
        original = getattr(CaptionReader, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(CaptionReader, name, counted)
    again = make_dataset(world, tiny_processor)
    again.load_state_dict(dataset.state_dict(0))
    iter(again).__next__()
    # what is left for packing and what the next two sequences take, and for entries also the buffer
    assert 0 < calls["record"] <= 16 and calls["entries"] <= 16 + 8
    assert dataset.report.to_dict()[str(world / "captions")]["read"] > 40


@pytest.mark.parametrize("per_tar, count", [(3, 4), (12, 4), (30, 3)])
def test_parts_share_the_entries_out(tmp_path, per_tar, count):
    write_caption_tars(tmp_path, World(size=16), 30, per_tar=per_tar)
    reader = CaptionReader(sorted(tmp_path.glob("*.tar")))
    ids = [
        [record["id"] for _, record in RecordStream(reader, DataReport(), 0, 0, 5, (index, count))]
        for index in range(count)
    ]
    assert sorted(name for part in ids for name in part) == sorted(
        record["id"] for _, record in RecordStream(reader, DataReport(), 0)
    )
    assert all(len(part) >= 30 // count - per_tar for part in ids)


def test_processes_read_different_parts(world, tiny_processor):
    seen = []
    for rank in range(2):
        dataset = make_dataset(world, tiny_processor, pack_length=0, data_stopping="shortest")
        dataset.set_process(rank, 2)
        seen.append({name for batch in consume(dataset, 6, 0) for name in batch["ids"]})
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_a_position_that_does_not_fit_is_refused(world, tiny_processor, tmp_path):
    dataset = make_dataset(world, tiny_processor)
    consume(dataset, 4, 2)
    state = dataset.state_dict(2)
    again = make_dataset(world, tiny_processor)
    again.load_state_dict(state)
    with pytest.raises(ValueError, match="2 data streams per process, now there are 1: set dataloader_num_workers"):
        next(iter(again))
    again.set_process(0, 4)
    with pytest.raises(ValueError, match="processes 1, this run has 4"):
        again.load_state_dict(state)
    other = build_dataset(DataArguments(data=[str(world / "captions")], pack_length=120), tiny_processor, 2, 3)[0]
    other.load_state_dict({**state, "workers": 1})
    with pytest.raises(DataError, match="give the same --data"):
        next(iter(other))
    unpacked = make_dataset(world, tiny_processor, pack_length=0)
    unpacked.load_state_dict({**state, "workers": 1})
    with pytest.raises(DataError, match="keep pack_length"):
        next(iter(unpacked))


def test_files_that_changed_are_refused(tmp_path):
    write_caption_tars(tmp_path, World(size=16), 30, per_tar=30)
    reader = CaptionReader([tmp_path / "00000.tar"])
    stream = RecordStream(reader, DataReport(), 0, 0, 10)
    for _, _ in zip(range(5), stream, strict=False):
        pass
    state = stream.state_dict()
    write_caption_tars(tmp_path, World(size=64, seed=5), 30, per_tar=30)
    with pytest.raises(DataError, match="cannot be read any more|has changed since"):
        RecordStream(reader, DataReport(), 0, 0, 10).load_state_dict(state)
    (tmp_path / "00000.tar").rename(tmp_path / "00001.tar")
    with pytest.raises(DataError, match="are not those that the checkpoint"):
        RecordStream(CaptionReader([tmp_path / "00001.tar"]), DataReport(), 0, 0, 10).load_state_dict(state)


def test_sources_in_proportion_to_their_size(world, tiny_processor):
    documents = len((world / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl").read_text().splitlines())
    for rule, weights in (("equal", [2, 1]), ("size", [documents, 90]), ("sqrt", [documents**0.5, 90**0.5])):
        assert make_dataset(world, tiny_processor, data_weights=rule).probabilities == weights
    assert make_dataset(world, tiny_processor, data_weights="size", data_probs=[1, 3]).probabilities == [1, 3]


def test_the_same_data_given_twice_is_two_sources(world, tiny_processor):
    tars = str(world / "captions")
    data = DataArguments(data=[tars, tars], shuffle_buffer=8, pack_length=0)
    dataset = build_dataset(data, tiny_processor, 2, 0, ("describe", "draw"))[0]
    names = [f"{tars} (describe)", f"{tars} (draw)"]
    names += [f"{name} (number 2)" for name in names]
    assert [source.reader.name for source in dataset.sources] == names
    consume(dataset, 20, 0)
    assert list(dataset.report.to_dict()) == sorted(names)
    orders = [
        [entry["id"] for entry, _ in zip(SourceStream(source, DataReport(), (0, 1)), range(9), strict=False)]
        for source in dataset.sources
    ]
    assert len(set(map(tuple, orders))) == 4


def test_captions_are_grouped_as_often_as_asked(world, tiny_processor):
    bos, numbers = tiny_processor.tokenizer.bos_token_id, []
    for probability in (0.0, 1.0):
        dataset = make_dataset(world, tiny_processor, caption_group_prob=probability, pack_length=200)
        samples = [sample for sample, _ in zip(dataset, range(40), strict=False) if "tar" in sample["id"]]
        numbers.append([sample["input_ids"].count(bos) for sample in samples])
    pairs = [(before, after) for before, after in zip(*numbers, strict=True) if before > 1]
    assert len(pairs) > 5 and all(after < before for before, after in pairs)


def test_flips_depend_on_the_generator_alone():
    left = Image.new("RGB", (8, 8))
    left.putpixel((0, 0), (255, 0, 0))
    outcomes = Counter()
    for seed in range(200):
        (image,) = flip_images({"images": [left]}, random.Random(seed))["images"]
        outcomes[image.getpixel((7, 0)) == (255, 0, 0)] += 1
        assert image.tobytes() == flip_images({"images": [left]}, random.Random(seed))["images"][0].tobytes()
    assert 70 < outcomes[True] < 130 and left.getpixel((0, 0)) == (255, 0, 0)


# ---- killed runs ----


def test_three_sigkills_leave_ids_and_losses_as_they_were(world, tiny_processor, tmp_path):
    """Two data workers, documents mixed with tars; killed in two steps and within a save, at random."""
    tiny_processor.save_pretrained(tmp_path / "processor")
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    kills = [("step", chance.randrange(1, 4)), ("save", chance.choice([4, 6])), ("step", chance.randrange(7, 9))]
    runs = [{"out": str(tmp_path / "killed"), "kill": kill, "workers": 2} for kill in kills]
    runs += [{"out": str(tmp_path / name), "workers": 2} for name in ("killed", "whole")]
    settings = {"world": str(world), "processor": str(tmp_path / "processor"), "runs": runs}
    driver = Path(__file__).with_name("resuming_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    codes = [line for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert codes == [str(-signal.SIGKILL)] * 3 + ["0", "0"], f"seed {seed}\n{done.stdout}\n{done.stderr[-3000:]}"

    def ids(name: str) -> dict[int, list]:
        seen: dict[int, list] = {}
        for line in (tmp_path / name / "ids.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert seen.setdefault(row["step"], row["ids"]) == row["ids"], f"step {row['step']}, seed {seed}"
        return seen

    assert ids("killed") == ids("whole") and list(ids("whole")) == list(range(9))

    def history(name: str) -> list[dict]:
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in log[:9]]

    assert history("killed") == history("whole") and all("image_loss" in row for row in history("whole"))
    reports = [json.loads((tmp_path / name / "data_report.json").read_text()) for name in ("killed", "whole")]
    assert reports[0] == reports[1]


# ---- rot ----


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


def rot_trainer(folder: Path, processor, out: Path, max_steps: int, workers: int = 0, **options) -> DeemTrainer:
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
    return DeemTrainer(
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


def test_a_zipped_file_goes_on_within(world, tmp_path):
    """Offsets count in the unzipped text, over all members of the archive."""
    lines = (world / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl").read_text().splitlines(keepends=True)
    with zipfile.ZipFile(tmp_path / "docs.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", "".join(lines[:7]) + "\n")
        archive.writestr("b.jsonl", "".join(lines[7:]))

    def stream() -> RecordStream:
        reader = InterleavedReader([tmp_path / "docs.jsonl.zip"], world / "mmc4_images", single_image_drop=0.0)
        return RecordStream(reader, DataReport(), 0, 0, 4)

    whole = [record["id"] for _, record in stream()]
    assert len(set(whole)) == len(whole) > 15
    for at in (2, 6, 9, 14):
        cut, resumed = stream(), stream()
        taken = [record["id"] for _, (_, record) in zip(range(at), cut, strict=False)]
        resumed.load_state_dict(cut.state_dict())
        assert taken + [record["id"] for _, record in resumed] == whole
