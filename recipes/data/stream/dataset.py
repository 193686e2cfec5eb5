# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Several sources -> one endless stream of samples per process, whose position is part of a checkpoint."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from recipes.data.faults import DataError, DataReport
from recipes.data.stream.concatenation import Concatenation
from recipes.data.stream.mixture import Mixture
from recipes.data.stream.shuffle import Place
from recipes.data.stream.source_stream import PlacedSample, Source, SourceStream

VERSION = 2  # of a saved position
POSITION = "position"  # key of a sample, and of a batch, under which its position travels


class SampleStream:
    """The samples of one process or data worker: all sources mixed, endlessly, in micro-batches of one mode each.

    A sample whose mode is not that of its neighbors is held back until a micro-batch of its mode is together, with
    others of its source, or of any source if one is drawn per sample.

    Args:
        dataset: sources and settings.
        report: receives what was read and skipped.
        share: `(index, count)`: which of `count` streams this is.
    """

    def __init__(self, dataset: "MixedDataset", report: DataReport, share: tuple[int, int]) -> None:
        self.dataset, self.report, self.share = dataset, report, share
        self.sources = [SourceStream(source, report, share) for source in dataset.sources]
        self.epoch = 0
        self.mixture = self._mixture()
        self.held: list[PlacedSample] = []  # drawn, in this order, and not given yet

    def _mixture(self) -> Mixture:
        index, count = self.share
        generator = torch.Generator().manual_seed(self.dataset.seed + index + self.epoch * count)
        batch_size = 1 if self.dataset.per_sample else self.dataset.batch_size
        return Mixture(
            self.sources, self.dataset.probabilities, batch_size, generator, self.dataset.stopping, self._account
        )

    def _account(self, index: int) -> str:
        """Return what became of a source, for the message of an error."""
        counts = {"read": 0, "left_out": {}, "skipped": {}, **self.report.to_dict().get(str(self.sources[index]), {})}
        faults = sorted(counts["skipped"].items(), key=lambda fault: -fault[1]["count"])
        skipped = ", ".join(f"{fault['count']} x {reason} (e.g. {fault['examples'][0]})" for reason, fault in faults)
        left_out = ", ".join(f"{number} x {reason}" for reason, number in counts["left_out"].items())
        return (
            f" So far were read from it: {counts['read']} samples; left out by rule: {left_out or 'nothing'}; "
            f"skipped: {skipped or 'nothing'}."
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            drawn = iter(self.mixture)
            while True:
                yield from self._whole_batches()  # a resumed stream may hold some
                batch = list(islice(drawn, self.mixture.batch_size))
                if not batch:
                    break
                self.held += batch
            for source in self.sources:
                source.restart()
            self.epoch += 1
            self.mixture = self._mixture()

    def _whole_batches(self) -> Iterator[dict[str, Any]]:
        """Yield the micro-batches of one mode that are together, in the order in which they were completed."""
        while True:
            kinds: dict[tuple[Any, str], list[PlacedSample]] = defaultdict(list)
            for placed in self.held:
                mode = placed.sample.get("mode") or "interleaved"  # as the collator has it
                batch = kinds[None if self.dataset.per_sample else placed.source, mode]
                batch.append(placed)
                if len(batch) == self.dataset.batch_size:
                    break
            else:
                return
            given = set(map(id, batch))
            self.held = [placed for placed in self.held if id(placed) not in given]
            yield from (placed.sample for placed in batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position between two micro-batches."""
        return {
            "epoch": self.epoch,
            "mixture": self.mixture.state_dict(),
            "sources": [source.state_dict() for source in self.sources],
            "held": [(self.sources.index(placed.source), placed.epoch, placed.place) for placed in self.held],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position. Raises DataError if the data is not that of the checkpoint."""
        self.epoch = state["epoch"]
        self.mixture = self._mixture()
        self.mixture.load_state_dict(state["mixture"])
        for source, position in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(position)
        held = [(index, epoch, tuple(place)) for index, epoch, place in state["held"]]
        found: dict[tuple[int, int, Place], PlacedSample] = {}
        for index, epoch in dict.fromkeys(at[:2] for at in held):
            places = [place for *at, place in held if at == [index, epoch]]
            found |= {(index, epoch, placed.place): placed for placed in self.sources[index].again(epoch, places)}
        self.held = [found[at] for at in held]


@dataclass(frozen=True)
class Position:
    """The position of a data worker after a micro-batch; it travels with that to the training process.

    `index` is that of its stream, `events` what it noted since its last micro-batch, `error` why it stopped.
    """

    index: int
    state: dict[str, Any] | None
    events: list[tuple[str, ...]]
    error: str | None = None


class MixedDataset(IterableDataset):
    """An endless stream of samples whose consecutive `batch_size` samples come from one source and have one mode.

    Every process and every data worker reads a share of its own (see `ReaderPass`). Iterating gives the same samples
    each time, from the beginning, or from where `load_state_dict` says. `state_dict` counts what has
    been consumed: in the process itself that is what has been taken from the iterator; data workers read ahead, so their
    positions travel with the samples, `PositionCollator` hands them on, and the consumer gives them to `note`.

    Args:
        sources: what to read.
        probabilities: one weight per source.
        batch_size: samples per micro-batch (the DataLoader's batch size).
        seed: seed of the draws.
        stopping: what ends one pass over the mixture, after which the next begins (see `mixture.Mixture`).
        per_sample: draw a source for every sample instead of every micro-batch, which then mixes sources, not modes.

    Attributes:
        report: what was read and skipped, by this process and its workers.

    Raises:
        ValueError: for settings that `Mixture` refuses, or if one is drawn per sample of packed and unpacked sources, or
            of packed dialogues.
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
        dialogues = any(isinstance(source.packing, Concatenation) for source in sources)
        if per_sample and (dialogues or len({source.packing is None for source in sources}) > 1):
            # packed samples have no place of their own, so a saved position cannot hold one back
            raise ValueError(
                "Packed dialogues, or packed beside unpacked sources, cannot be mixed per sample: give --data_mixing "
                "micro_batch, or --pack_length 0."
            )
        self.report = DataReport()
        self.process = (0, 1)
        self.workers: int | None = None  # that a loaded or noted position belongs to
        self.turn = 0  # the stream whose micro-batch comes next
        self.states: dict[int, dict[str, Any]] = {}
        self._live: SampleStream | None = None
        SampleStream(self, self.report, (0, 1))  # raises for bad settings now, not at the first batch

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
        report = DataReport(keep_events=True)
        try:
            stream = self._stream(index, worker.num_workers, report)
            for number, sample in enumerate(stream, start=1):
                if number % self.batch_size == 0:
                    sample = {**sample, POSITION: Position(index, stream.state_dict(), report.take_events())}
                yield sample
        except DataError as error:
            # An exception raised in a worker would arrive wrapped in its traceback.
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
        """Return the position of this process after what has been consumed, as plain data and tensors.

        Args:
            workers: number of data workers; 0 if the process reads itself.
        """
        states = {0: self._live.state_dict()} if workers == 0 and self._live is not None else dict(self.states)
        return {
            "version": VERSION,
            "settings": self.settings(),
            "workers": max(workers, 1),
            "turn": self.turn % max(workers, 1),
            "states": states,
            "report": self.report.state_dict(),
        }

    def settings(self) -> dict[str, Any]:
        """Return the settings that a position depends on, by the option that sets each: one value if all sources have
        the same, else one per source. `max_skipped` is none of them: it may be raised to go on."""
        of_source: dict[str, Callable[[Source], Any]] = {
            "shuffle_buffer": lambda source: source.shuffle_buffer,
            "pack_length": lambda source: source.packing.length if source.packing else 0,
            "max_images": lambda source: source.packing.max_images if source.packing else None,
            "num_image_tokens": lambda source: getattr(source.packing, "num_image_tokens", None),
            "caption_group_prob": lambda source: source.group_prob,
            "random_flip": lambda source: source.flip,
            "max_length": lambda source: source.max_length,
            "region_template": lambda source: "released" if source.released_template else "chat",
        }
        values = {option: [value(source) for source in self.sources] for option, value in of_source.items()}
        return {
            "processes": self.process[1],
            "batch_size": self.batch_size,
            "data": [source.reader.name for source in self.sources],
            "seed": self.seed,
            "data_probs or data_weights": list(self.probabilities),
            "data_stopping": self.stopping,
            "data_mixing": "sample" if self.per_sample else "micro_batch",
            **{option: found[0] if found.count(found[0]) == len(found) else found for option, found in values.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position: the next iteration starts there.

        Raises:
            ValueError: if a setting is not that of the position (see `settings`), or an older version wrote it.
        """
        if state.get("version") != VERSION:
            raise ValueError(
                "The checkpoint's data position was written by an older version, which counted other things: start anew in "
                "another output_dir."
            )
        for option, now in self.settings().items():
            if (before := state["settings"].get(option)) != now:
                raise ValueError(
                    f"The checkpoint's data position was reached with {option} {before}, this run has {now}: give the "
                    "same, or start anew in another output_dir."
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
