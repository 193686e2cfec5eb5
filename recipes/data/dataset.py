# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Readers -> one endless stream of samples per process, whose position is part of a checkpoint."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, get_worker_info
from transformers import ProcessorMixin

from recipes.data.dialogues import released_dialogue
from recipes.data.mixing import Mixture
from recipes.data.packing import Packer, Packing, group_captions, limit_caption
from recipes.data.reading import BadSample, DataError, DataReport, Entry, Reader
from recipes.data.streaming import RecordStream

POSITION = "position"  # key of a sample, and of a batch, under which its position travels


@dataclass(frozen=True)
class Source:
    """One reader and what becomes of its records; see `DataArguments`.

    With `packing`, records are tokenised and packed; without, they are given as they are.
    """

    reader: Reader
    processor: ProcessorMixin
    seed: int
    shuffle_buffer: int
    packing: Packing | None = None
    max_skipped: float = 1.0
    flip: bool = False
    max_length: int = 0
    released_template: bool = False
    group_prob: float = 0.0

    def finish(self, record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """What is done to each record, whatever its format."""
        if self.flip:
            record = flip_images(record, rng)
        if self.max_length:
            record = limit_rounds(record, self.processor, self.max_length)
        if self.released_template and "messages" in record:
            record = released_dialogue(record, self.processor.image_token, self.processor.tokenizer.eos_token)
        return record


class SourceStream:
    """The passes of one process over a source. Iterating goes on with an unfinished pass, or starts the next; each pass
    has an order of its own."""

    def __init__(self, source: Source, report: DataReport, part: tuple[int, int]) -> None:
        self.source, self.report, self.part = source, report, part
        self.epoch = 0
        self.records: RecordStream | None = None
        self.packer: Packer | None = None

    def __str__(self) -> str:
        return self.source.reader.name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.records is None:
            self._begin()
        if self.packer is None:
            for _, record in self.records:
                yield record
        else:
            yield from map(self._grouped, self.packer.sequences())  # a resumed pass may hold some
            for place, record in self.records:
                self.packer.add(self._document(record), place)
                yield from map(self._grouped, self.packer.sequences())
        self.restart()

    def restart(self) -> None:
        """Leave the present pass, if there is one; the next iteration starts another."""
        if self.records is not None:
            self.records, self.packer, self.epoch = None, None, self.epoch + 1

    def _begin(self) -> None:
        source = self.source
        self.records = RecordStream(
            source.reader,
            self.report,
            source.seed,
            self.epoch,
            source.shuffle_buffer,
            self.part,
            source.max_skipped,
            source.finish,
        )
        self.packer = Packer(source.packing) if source.packing is not None else None

    def _document(self, record: dict[str, Any]) -> dict[str, Any]:
        packing = self.source.packing
        document = tokenise(record, self.source.processor)
        if packing.level == "sample":
            document["input_ids"] = limit_caption(document["input_ids"], packing)
        return document

    def _grouped(self, sequence: dict[str, Any]) -> dict[str, Any]:
        source = self.source
        rng = random.Random(f"{source.seed}/{self.epoch}/{sequence['id']}/group")
        if rng.random() >= source.group_prob:
            return sequence
        return group_captions(sequence, rng.randint(2, 8), source.packing, source.processor.tokenizer.eos_token_id)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and the position in the present pass (None between two)."""
        return {
            "epoch": self.epoch,
            "records": None if self.records is None else self.records.state_dict(),
            "packer": None if self.packer is None else self.packer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position. Raises DataError if the data is not that of the checkpoint."""
        self.epoch = state["epoch"]
        if state["records"] is None:
            return
        self._begin()
        if (self.packer is None) != (state["packer"] is None):
            raise DataError(
                f"The checkpoint and this run differ in whether {self} is packed: keep pack_length as it was."
            )
        self.records.load_state_dict(state["records"])
        if self.packer is not None:
            places = [tuple(place) for place in state["packer"]["places"]]
            entries = self.records.fetch(places)
            documents = [self._document(self._record_again(entries[place])) for place in places]
            self.packer.load_state_dict({**state["packer"], "places": places}, documents)

    def _record_again(self, entry: Entry) -> dict[str, Any]:
        return self.records.make_record(entry, silent=True)


class SampleStream:
    """What one process or data worker reads: the sources mixed, endlessly.

    Args:
        dataset: sources and settings.
        report: receives what was read and skipped.
        part: `(index, count)`: which of `count` streams this is.
    """

    def __init__(self, dataset: "MixedDataset", report: DataReport, part: tuple[int, int]) -> None:
        self.dataset, self.part = dataset, part
        self.sources = [SourceStream(source, report, part) for source in dataset.sources]
        self.epoch = 0
        self.mixture = self._mixture()

    def _mixture(self) -> Mixture:
        index, count = self.part
        generator = torch.Generator().manual_seed(self.dataset.seed + index + self.epoch * count)
        batch_size = 1 if self.dataset.per_sample else self.dataset.batch_size
        return Mixture(self.sources, self.dataset.probabilities, batch_size, generator, self.dataset.stopping)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.mixture
            for source in self.sources:
                source.restart()
            self.epoch += 1
            self.mixture = self._mixture()

    def state_dict(self) -> dict[str, Any]:
        """The position between two micro-batches."""
        return {
            "epoch": self.epoch,
            "mixture": self.mixture.state_dict(),
            "sources": [(str(source), source.state_dict()) for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position. Raises DataError if the sources are not those of the checkpoint."""
        before, now = [name for name, _ in state["sources"]], [str(source) for source in self.sources]
        if before != now:
            raise DataError(
                f"The checkpoint was reading {before}, this run reads {now}: give the same --data in the same order, or "
                "start anew in another output_dir."
            )
        self.epoch = state["epoch"]
        self.mixture = self._mixture()
        self.mixture.load_state_dict(state["mixture"])
        for source, (_, position) in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(position)


@dataclass(frozen=True)
class Position:
    """Where a data worker stands behind a micro-batch; travels with it to the training process.

    `index` is that of its stream, `events` what it noted since its last micro-batch, `error` why it stopped.
    """

    index: int
    state: dict[str, Any] | None
    events: list[tuple[str, ...]]
    error: str | None = None


class MixedDataset(IterableDataset):
    """An endless stream of samples whose consecutive `batch_size` samples come from one source.

    Every process and every data worker reads a part of its own (see `RecordStream`). Iterating gives the same samples
    each time, from the beginning, or from where `load_state_dict` says. What has been consumed is known to
    `state_dict`: in the process itself that is what has been taken from the iterator; data workers read ahead, so their
    positions travel with the samples, `PositionCollator` hands them on, and the consumer gives them to `note`.

    Args:
        sources: what to read.
        probabilities: one weight per source.
        batch_size: samples per micro-batch (the DataLoader's batch size).
        seed: seed of the draws.
        stopping: what ends one pass over the mixture, after which the next begins (see `mixing.Mixture`).
        per_sample: draw a source for every sample instead of every micro-batch.

    Attributes:
        report: what was read and skipped, by this process and its workers.
    """

    def __init__(
        self,
        sources: list[Source],
        probabilities: list[float],
        batch_size: int,
        seed: int,
        stopping: str = "longest",
        per_sample: bool = False,
    ) -> None:
        self.sources, self.probabilities = sources, probabilities
        self.batch_size, self.seed, self.stopping, self.per_sample = batch_size, seed, stopping, per_sample
        self.report = DataReport()
        self.process = (0, 1)
        self.workers: int | None = None  # that a loaded or noted position belongs to
        self.turn = 0  # the stream whose micro-batch comes next
        self.states: dict[int, dict[str, Any]] = {}
        self._live: SampleStream | None = None
        SampleStream(self, self.report, (0, 1))  # bad settings show now, not at the first batch

    def set_process(self, index: int, count: int) -> None:
        """Say which of several training processes this is."""
        self.process = (index, count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is None:
            self._live = self._stream(0, 1, self.report)
            yield from self._live
            return
        index = (worker.id + self.turn) % worker.num_workers
        report = DataReport(record_events=True)
        try:
            stream = self._stream(index, worker.num_workers, report)
            for number, sample in enumerate(stream, start=1):
                if number % self.batch_size == 0:
                    sample = {**sample, POSITION: Position(index, stream.state_dict(), report.take_events())}
                yield sample
        except DataError as error:
            # An exception of a worker would arrive wrapped in its traceback.
            while True:
                yield {POSITION: Position(index, None, report.take_events(), str(error))}

    def _stream(self, index: int, workers: int, report: DataReport) -> SampleStream:
        if self.workers not in (None, workers):
            raise ValueError(
                f"The position to go on from was reached with {self.workers} data streams per process, now there are "
                f"{workers}: set dataloader_num_workers to what it was, or start anew in another output_dir."
            )
        rank, processes = self.process
        stream = SampleStream(self, report, (rank * workers + index, processes * workers))
        if index in self.states:
            stream.load_state_dict(self.states[index])
        return stream

    def note(self, position: Position) -> None:
        """Take in the position behind a micro-batch that a data worker made, when that is consumed.

        Raises:
            DataError: if the worker had to stop.
        """
        self.report.repeat(position.events)
        if position.error is not None:
            raise DataError(position.error)
        self.states[position.index] = position.state
        self.turn = position.index + 1

    def state_dict(self, workers: int) -> dict[str, Any]:
        """Position of this process after what has been consumed, plain data and tensors.

        Args:
            workers: number of data workers; 0 if the process reads itself.
        """
        states = {0: self._live.state_dict()} if workers == 0 and self._live is not None else dict(self.states)
        return {
            "workers": max(workers, 1),
            "processes": self.process[1],
            "batch_size": self.batch_size,
            "turn": self.turn % max(workers, 1),
            "states": states,
            "report": self.report.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position: the next iteration starts there.

        Raises:
            ValueError: if the number of processes or the size of a micro-batch is another.
        """
        for name, now in (("processes", self.process[1]), ("batch_size", self.batch_size)):
            if state[name] != now:
                raise ValueError(
                    f"The checkpoint's data position was reached with {name} {state[name]}, this run has {now}: keep "
                    "it as it was, or start anew in another output_dir."
                )
        self.workers, self.turn, self.states = state["workers"], state["turn"], dict(state["states"])
        self.report.add_state(state["report"])


class PositionCollator:
    """A collator that hands the position of a micro-batch on, under `POSITION` of the batch.

    Args:
        collator: makes the batch itself.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        position = samples[-1].get(POSITION)
        if position is not None and position.error is not None:
            return {POSITION: position}
        batch = self.collator([{k: v for k, v in sample.items() if k != POSITION} for sample in samples])
        return batch if position is None else {**batch, POSITION: position}


def tokenise(record: dict[str, Any], processor: ProcessorMixin) -> dict[str, Any]:
    """A text record -> a document for packing: bos, tokens with every picture expanded, eos."""
    tokenizer = processor.tokenizer
    input_ids = tokenizer(processor.expand_image_tokens(record["text"]), add_special_tokens=False)["input_ids"]
    return {
        "input_ids": [tokenizer.bos_token_id, *input_ids, tokenizer.eos_token_id],
        "images": record["images"],
        "id": record["id"],
    }


def flip_images(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Mirror each picture with probability 0.5, before both of its sizes are made, so that they agree."""

    def flipped(image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if rng.random() < 0.5 else image

    return {**record, "images": [flipped(image) for image in record["images"]]}


def limit_rounds(record: dict[str, Any], processor: ProcessorMixin, max_length: int) -> dict[str, Any]:
    """Leave out the last rounds of a dialogue, pictures included, until it fits into `max_length` tokens.

    Raises:
        BadSample: if not even the first round fits, or the record is no dialogue and does not fit.
    """
    messages = record.get("messages")
    if messages is None:
        if len(tokenise(record, processor)["input_ids"]) > max_length:
            raise BadSample("longer than max_length", record["id"])
        return record
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(ends):
        kept = messages[:end]
        text = processor.apply_chat_template(kept, tokenize=False)
        ids = processor.tokenizer(processor.expand_image_tokens(text), add_special_tokens=False)["input_ids"]
        if len(ids) <= max_length:
            break
    else:
        raise BadSample("longer than max_length", record["id"])
    if end == ends[-1]:
        return record
    parts = [part for message in kept if not isinstance(message["content"], str) for part in message["content"]]
    number = sum(part["type"] == "image" for part in parts)
    cut = {name: record[name][:number] for name in ("images", "region_masks") if record.get(name) is not None}
    return {**record, "messages": kept, **cut}
