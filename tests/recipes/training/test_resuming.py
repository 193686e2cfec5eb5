# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The data position is part of a checkpoint; parts for processes and workers; too much rot stops a run."""

import hashlib
import io
import json
import os
import random
import signal
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from scripts import run_script
from torch.utils.data import DataLoader

from processing import DeemDataCollator
from recipes.data.faults import DataError, DataReport
from recipes.data.readers.captions import CaptionReader
from recipes.data.readers.interleaved import InterleavedReader
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.dataset import POSITION, PositionCollator
from recipes.data.stream.shuffle import ReaderPass
from recipes.data.stream.source_stream import SourceStream
from recipes.data.stream.steps import flip_images
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_caption_tars, write_formats


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


def consume(dataset, batches: int, workers: int, batch_size: int = 2, collator=names) -> list[dict]:
    """Batches as a trainer takes them."""
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=PositionCollator(collator))
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
    for name in ("make_sample", "entries"):
        original = getattr(CaptionReader, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(CaptionReader, name, counted)
    again = make_dataset(world, tiny_processor)
    again.load_state_dict(dataset.state_dict(0))
    iter(again).__next__()
    # what is left for packing and what the next two sequences take, and for entries also the buffer
    assert 0 < calls["make_sample"] <= 16 and calls["entries"] <= 16 + 8
    assert dataset.report.to_dict()[str(world / "captions")]["read"] > 40


def write_chats(file: Path, number: int) -> None:
    """Chats of one image each, which every third draws and the others read."""
    rows = []
    for index in range(number):
        World(size=32).scene(index).image.save(file.with_name(f"{index}.png"))
        image, words = {"type": "image", "text": ""}, {"type": "text", "text": "a thing"}
        asked, answered = ([words], [image]) if index % 3 == 0 else ([image, words], [words])
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows.append(json.dumps({"messages": messages, "images": [f"{index}.png"]}))
    file.write_text("\n".join(rows))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixing", ["micro_batch", "sample"])
def test_every_micro_batch_has_one_mode(world, tiny_processor, tmp_path, workers, mixing):
    """Sources of different modes, with captions in all forms; without data workers also one that gives two modes."""
    write_chats(tmp_path / "chats.jsonl", 31)
    write_formats(tmp_path, World(size=32), 31, formats=["vqa"])
    sources = [str(tmp_path / ("vqa" if workers else "chats.jsonl")), str(world / "captions")]
    data = DataArguments(data=sources, shuffle_buffer=5, pack_length=0, data_mixing=mixing, random_flip=True)

    def dataset():
        return build_dataset(data, tiny_processor, 3, 0, ("plain", "describe", "draw"))[0]

    def modes(samples: list[dict]) -> dict:
        DeemDataCollator(tiny_processor, return_targets=False)(samples)  # refuses a mixture
        images = [hashlib.sha1(image.tobytes()).hexdigest() for sample in samples for image in sample["images"]]
        return {
            "mode": samples[0].get("mode", "interleaved"),
            "ids": [sample["id"] for sample in samples],
            "images": images,
        }

    whole_set = dataset()
    whole = consume(whole_set, 48, workers, 3, modes)  # several passes over the chats
    assert {batch["mode"] for batch in whole} == {"interleaved", "image_to_text", "text_to_image"}
    mixed = [len({"tar" in name for name in batch["ids"]}) > 1 for batch in whole]
    assert any(mixed) == (mixing == "sample")
    held = 0
    for at in (4, 22, 40):
        cut, resumed = dataset(), dataset()
        assert consume(cut, at, workers, 3, modes) == whole[:at]
        state = cut.state_dict(workers)
        held += sum(len(stream["held"]) for stream in state["states"].values())
        torch.save(state, tmp_path / "position.pt")
        resumed.load_state_dict(torch.load(tmp_path / "position.pt", weights_only=True))
        assert consume(resumed, 48 - at, workers, 3, modes) == whole[at:]
        assert resumed.report.to_dict() == whole_set.report.to_dict()
    assert (held > 0) == (mixing == "sample" or workers == 0)


@pytest.mark.parametrize("per_tar, count", [(3, 4), (12, 4), (30, 3)])
def test_parts_share_the_entries_out(tmp_path, per_tar, count):
    write_caption_tars(tmp_path, World(size=16), 30, per_tar=per_tar)
    reader = CaptionReader(sorted(tmp_path.glob("*.tar")))
    ids = [
        [record["id"] for _, record in ReaderPass(reader, DataReport(), 0, 0, 5, (index, count))]
        for index in range(count)
    ]
    assert sorted(name for part in ids for name in part) == sorted(
        record["id"] for _, record in ReaderPass(reader, DataReport(), 0)
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
    with pytest.raises(ValueError, match=r"data \[.*mmc4_annts', .*\], this run has \['.*captions'\]: give the same"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="written by an older version"):
        again.load_state_dict({name: value for name, value in state.items() if name != "version"})


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"data_probs": [100, 1]},
            r"data_probs or data_weights \[2.0, 1.0\], this run has \[100.0, 1.0\]: give the same",
        ),
        ({"data_stopping": "sum"}, "data_stopping longest, this run has sum"),
        ({"data_mixing": "sample"}, "data_mixing micro_batch, this run has sample"),
        ({"seed": 4}, "seed 3, this run has 4"),
        ({"shuffle_buffer": 5}, "shuffle_buffer 8, this run has 5"),
        ({"random_flip": True}, "random_flip False, this run has True"),
        ({"caption_group_prob": 0.5}, r"caption_group_prob 0.0, this run has \[0.0, 0.5\]"),
        ({"pack_length": 130}, "pack_length 120, this run has 130"),
        ({"pack_length": 0}, "pack_length 120, this run has 0"),
        ({"max_images": 5}, "max_images 4, this run has 5"),
    ],
)
def test_changed_settings_are_refused(world, tiny_processor, options, message):
    dataset = make_dataset(world, tiny_processor)
    consume(dataset, 4, 0)
    with pytest.raises(ValueError, match=message):
        make_dataset(world, tiny_processor, **options).load_state_dict(dataset.state_dict(0))
    make_dataset(world, tiny_processor, max_skipped=0.5).load_state_dict(dataset.state_dict(0))


def test_files_that_changed_are_refused(tmp_path):
    write_caption_tars(tmp_path, World(size=16), 30, per_tar=30)
    reader = CaptionReader([tmp_path / "00000.tar"])
    stream = ReaderPass(reader, DataReport(), 0, 0, 10)
    for _, _ in zip(range(5), stream, strict=False):
        pass
    state = stream.state_dict()
    write_caption_tars(tmp_path, World(size=64, seed=5), 30, per_tar=30)
    with pytest.raises(DataError, match="cannot be read any more|has changed since"):
        ReaderPass(reader, DataReport(), 0, 0, 10).load_state_dict(state)
    (tmp_path / "00000.tar").rename(tmp_path / "00001.tar")
    with pytest.raises(DataError, match="are not those that the checkpoint"):
        ReaderPass(CaptionReader([tmp_path / "00001.tar"]), DataReport(), 0, 0, 10).load_state_dict(state)


def test_sources_in_proportion_to_their_size(world, tiny_processor):
    documents = len((world / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl").read_text().splitlines())
    for rule, weights in (("equal", [2, 1]), ("size", [documents, 90]), ("sqrt", [documents**0.5, 90**0.5])):
        assert make_dataset(world, tiny_processor, data_weights=rule).probabilities == weights
    assert make_dataset(world, tiny_processor, data_probs=[1, 3]).probabilities == [1, 3]
    with pytest.raises(ValueError, match=r"--data_probs 1 3 and --data_weights size .*--data_weights equal"):
        make_dataset(world, tiny_processor, data_weights="size", data_probs=[1, 3])


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
        [entry.sample["id"] for entry, _ in zip(SourceStream(source, DataReport(), (0, 1)), range(9), strict=False)]
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


def test_an_image_that_lies_on_its_side_is_mirrored_as_it_is_seen(tiny_processor):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = io.BytesIO()
    seen = World(size=64).scene(0).image
    seen.transpose(Image.Transpose.ROTATE_90).save(data, "PNG", exif=exif)
    lying = Image.open(data)

    def pixels(image: Image.Image) -> torch.Tensor:
        return tiny_processor.image_processor([image], return_tensors="pt")["pixel_values"]

    assert torch.equal(pixels(lying), pixels(seen))
    outcomes = [flip_images({"images": [lying]}, random.Random(seed))["images"][0] for seed in range(8)]
    flipped = [image for image in outcomes if image is not lying]
    assert 0 < len(flipped) < 8
    assert all(torch.equal(pixels(image), pixels(ImageOps.mirror(seen))) for image in flipped)


# ---- killed runs ----


def test_three_sigkills_leave_ids_and_losses_as_they_were(world, tiny_processor, tmp_path):
    """Two data workers, documents mixed with tars; killed in two steps and within a save, at random."""
    tiny_processor.save_pretrained(tmp_path / "processor")
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    kills = [("step", chance.randrange(1, 4)), ("save", 4), ("step", chance.randrange(4, 7))]
    runs = [{"out": str(tmp_path / "killed"), "kill": kill, "workers": 2} for kill in kills]
    runs += [{"out": str(tmp_path / name), "workers": 2} for name in ("killed", "whole")]
    settings = {"world": str(world), "processor": str(tmp_path / "processor"), "runs": runs}
    driver = Path(__file__).with_name("resuming_driver.py")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run_script(driver, json.dumps(settings), logs=tmp_path / "logs", **environment)
    codes = [line for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert codes == [str(-signal.SIGKILL)] * 3 + ["0", "0"], f"seed {seed}\n{done.stdout}\n{done.stderr[-3000:]}"

    def ids(name: str) -> dict[int, list]:
        seen: dict[int, list] = {}
        for line in (tmp_path / name / "ids.jsonl").read_text().splitlines():
            row = json.loads(line)
            assert seen.setdefault(row["step"], row["ids"]) == row["ids"], f"step {row['step']}, seed {seed}"
        return seen

    assert ids("killed") == ids("whole") and list(ids("whole")) == list(range(7))

    def history(name: str) -> list[dict]:
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [{k: v for k, v in row.items() if k not in ("step_seconds", "peak_memory_gb")} for row in log[:7]]

    assert history("killed") == history("whole") and all("image_loss" in row for row in history("whole"))
    reports = [json.loads((tmp_path / name / "data_report.json").read_text()) for name in ("killed", "whole")]
    assert reports[0] == reports[1]


def test_a_zipped_file_goes_on_within(world, tmp_path):
    """Offsets count in the unzipped text, over all members of the archive."""
    lines = (world / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl").read_text().splitlines(keepends=True)
    with zipfile.ZipFile(tmp_path / "docs.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", "".join(lines[:7]) + "\n")
        archive.writestr("b.jsonl", "".join(lines[7:]))

    def stream() -> ReaderPass:
        reader = InterleavedReader([tmp_path / "docs.jsonl.zip"], world / "mmc4_images", single_image_drop=0.0)
        return ReaderPass(reader, DataReport(), 0, 0, 4)

    whole = [record["id"] for _, record in stream()]
    assert len(set(whole)) == len(whole) > 15
    for at in (2, 6, 9, 14):
        cut, resumed = stream(), stream()
        taken = [record["id"] for _, (_, record) in zip(range(at), cut, strict=False)]
        resumed.load_state_dict(cut.state_dict())
        assert taken + [record["id"] for _, record in resumed] == whole
