# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Few rows train: one is enough, whatever the micro-batch, the packed length, the processes and the data workers."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from data_fixtures import read_source
from deem_fixtures import tiny_model
from PIL import Image
from torch.utils.data import DataLoader

from processing import DeemDataCollator
from recipes.data.faults import DataError
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.dataset import MixedDataset, PositionCollator
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer

DATA = {"captions": "captions", "mmc4": "mmc4_annts", "textvqa": "textvqa", "chats": "chats", "imagefolder_rows": ""}


def data_of(folder: Path, name: str, number: int) -> str:
    write_formats(folder, World(size=32), number, formats=[name])
    return str(folder / (DATA.get(name) or name))


def make(data: list[str], processor: Any, batch_size: int, **options) -> MixedDataset:
    return build_dataset(DataArguments(data=data, **options), processor, batch_size, 0)[0]


def ids(samples: Any) -> list[str]:
    return [sample["id"] for sample in samples]


@pytest.mark.parametrize("pack_length", [0, 400])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("number", [1, 3])
def test_a_few_rows_of_every_kind_fill_micro_batches(tmp_path, tiny_processor, name, number, pack_length):
    pack_length = 0 if name == "chats" else pack_length
    dataset = make([data_of(tmp_path, name, number)], tiny_processor, 8, pack_length=pack_length)
    samples = list(itertools.islice(dataset, 32))
    batch = DeemDataCollator(tiny_processor)(samples[:8])
    assert (batch["labels"] != -100).any() and len(batch["input_ids"]) == 8
    (counts,) = dataset.report.to_dict().values()
    assert counts["read"] and not counts["skipped"]


@pytest.mark.parametrize("options", [{"pack_length": 0}, {"pack_length": 200}])
@pytest.mark.parametrize("number, batch_size", [(1, 1), (1, 4), (3, 2), (3, 8), (5, 4)])
def test_a_small_source_goes_on_where_it_was(tmp_path, tiny_processor, number, batch_size, options):
    data = [data_of(tmp_path, "captions", number)]
    whole = make(data, tiny_processor, batch_size, **options)
    expected = ids(itertools.islice(whole, 6 * batch_size))
    for at in range(1, 6):
        cut = make(data, tiny_processor, batch_size, **options)
        assert ids(itertools.islice(cut, at * batch_size)) == expected[: at * batch_size]
        resumed = make(data, tiny_processor, batch_size, **options)
        resumed.load_state_dict(cut.state_dict(0))
        rest = (6 - at) * batch_size
        assert ids(itertools.islice(resumed, rest)) == expected[at * batch_size :]
        assert resumed.report.to_dict() == whole.report.to_dict()


@pytest.mark.parametrize("stopping", ["sum", "longest", "shortest"])
def test_small_and_large_sources_mix_and_go_on(tmp_path, tiny_processor, stopping):
    data = [data_of(tmp_path / "a", "captions", 2), data_of(tmp_path / "b", "captions", 40)]
    options = {"pack_length": 0, "data_stopping": stopping, "shuffle_buffer": 5}
    expected = ids(itertools.islice(make(data, tiny_processor, 4, **options), 120))
    assert len(set(expected)) == 40 or stopping == "shortest"
    for at in range(1, 25, 6):
        cut = make(data, tiny_processor, 4, **options)
        list(itertools.islice(cut, at * 4))
        resumed = make(data, tiny_processor, 4, **options)
        resumed.load_state_dict(cut.state_dict(0))
        assert ids(itertools.islice(resumed, 120 - at * 4)) == expected[at * 4 :]


@pytest.mark.parametrize("pack_length", [0, 200])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_process_and_data_worker_gets_samples_of_one_row(tmp_path, tiny_processor, workers, pack_length):
    data = [data_of(tmp_path, "captions", 1)]
    for rank in range(3):
        dataset = make(data, tiny_processor, 2, pack_length=pack_length)
        dataset.set_process(rank, 3)
        collator = PositionCollator(lambda samples: {"ids": ids(samples)})
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collator)
        batches = list(itertools.islice(loader, 4))
        assert [batch["ids"] for batch in batches] == [["00000.tar/000000000"] * 2] * 4


def test_a_process_that_reads_everything_goes_on_so(tmp_path, tiny_processor):
    data = [data_of(tmp_path, "captions", 2)]

    def dataset() -> MixedDataset:
        made = make(data, tiny_processor, 3, pack_length=0)
        made.set_process(2, 4)
        return made

    expected = ids(itertools.islice(dataset(), 30))
    assert len(set(expected)) == 2
    for at in range(10):
        cut = dataset()
        list(itertools.islice(cut, 3 * at))
        resumed = dataset()
        torch.save(cut.state_dict(0), tmp_path / "position.pt")
        resumed.load_state_dict(torch.load(tmp_path / "position.pt", weights_only=True))
        assert ids(itertools.islice(resumed, 30 - 3 * at)) == expected[3 * at :]


def test_large_data_lose_their_last_incomplete_micro_batch_alone(tmp_path, tiny_processor):
    data = data_of(tmp_path, "captions", 10)
    dataset = make([data], tiny_processor, 4, pack_length=0, data_stopping="longest")
    first = ids(itertools.islice(dataset, 8))
    assert len(set(first)) == 8 and len(read_source(Path(data), tiny_processor)[0]) == 10


@pytest.mark.parametrize("pack_length", [0, 200])
def test_no_row_at_all_is_an_error_that_says_so(tmp_path, tiny_processor, pack_length):
    (tmp_path / "a.csv").write_text("image,caption\ngone.jpg,a car\n")
    with pytest.raises(DataError, match="has no usable sample.*1 x missing image"):
        next(iter(make([str(tmp_path / "a.csv")], tiny_processor, 1, pack_length=pack_length)))


def test_a_position_of_an_older_version_is_refused(tmp_path, tiny_processor):
    dataset = make([data_of(tmp_path, "captions", 2)], tiny_processor, 1)
    state = {**dataset.state_dict(0), "version": 1}
    with pytest.raises(ValueError, match="older version"):
        dataset.load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack_length", [0, 200])
def test_a_table_of_one_row_trains(tmp_path, tiny_processor, pack_length, workers):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,caption\na.png,a red thing\n")
    dataset, report = build_dataset(
        DataArguments(data=[str(tmp_path / "a.csv")], pack_length=pack_length), tiny_processor, 4, 0
    )
    args = DeemTrainingArguments(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=4,
        dataloader_num_workers=workers,
        save_strategy="no",
        freeze=["*vision_tower*", "model.language_model", "image_decoder"],
    )
    trainer = RecipeTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=dataset,
        data_collator=DeemDataCollator(tiny_processor, return_targets=False),
        processing_class=tiny_processor,
        data_report=report,
    )
    trainer.train()
    assert trainer.state.global_step == 2 and report.to_dict()[str(tmp_path / "a.csv")]["read"] >= 8
