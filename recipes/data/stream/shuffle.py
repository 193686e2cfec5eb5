# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""One pass over a reader's files in shuffled order, with a position that can be saved and taken up again.

`datasets.IterableDataset.shuffle` starts a resumed stream with an empty buffer, so that other samples follow than in an
uninterrupted run; hence this class. Its state holds places, not data: a resumed stream reads again what lay in the buffer,
and nothing else.
"""

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from recipes.data.faults import BadSample, DataError, DataReport, LeftOut, Skip, printable
from recipes.data.readers.reader import Entry, Reader
from recipes.data.samples import example_of

Finish = Callable[[dict[str, Any], random.Random], dict[str, Any]]
Place = tuple[int, int, int]  # number of the shard in this stream's order, number of the entry in it, its offset
logger = logging.getLogger(__name__)


class ReaderPass:
    """One pass over (a share of) a reader's files; iterating yields `(place, sample)`.

    The order depends on `seed`, `epoch` and the reader's name, which is the source as it was typed: another way to
    write the same path gives another order, and two sources with files of the same names have orders of their own.
    Each sample has a generator of its own, seeded by `seed`, `epoch` and its key, so that its random choices do not
    depend on the order. Entries are shuffled through a buffer, which yields from a fifth of its size on while it
    still grows (WebDataset's rule).

    Args:
        reader: what to read.
        report: receives what was read and skipped.
        seed, epoch: of order and choices.
        shuffle_buffer: entries held for shuffling; 0 or 1 keeps the order within the files.
        share: `(index, count)`: which of `count` streams this is. They share the files out, or, where there are fewer
            files than streams, the entries of every file.
        max_skipped: greatest share of unusable entries (see `DataReport.check`).
        finish: what is done to each sample of the reader, with a generator of its own; may raise `BadSample`.

    Any other exception of the reader or of `finish`, on data that no reader foresaw, makes the entry (or the rest of the
    file) unusable as well: no single sample ends a run, and `max_skipped` stops a source full of them.

    Raises:
        DataError: while iterating, if too much of the data is unusable.
    """

    def __init__(
        self,
        reader: Reader,
        report: DataReport,
        seed: int,
        epoch: int = 0,
        shuffle_buffer: int = 0,
        share: tuple[int, int] = (0, 1),
        max_skipped: float = 1.0,
        finish: Finish | None = None,
    ) -> None:
        self.reader, self.report, self.max_skipped, self.finish = reader, report, max_skipped, finish
        self.choices = f"{seed}/{epoch}"
        self.rng = random.Random(f"{seed}/{epoch}/{reader.name}")
        self.shards = sorted(reader.shards)
        self.rng.shuffle(self.shards)  # the same for every share
        index, count = share
        self.stride, self.phase = 1, 0
        if len(self.shards) >= count:
            self.shards = self.shards[index::count]
        else:
            self.stride, self.phase = count, index
        self.size = shuffle_buffer
        self.shard = 0  # the shard being read
        self.example: dict[str, str] = {}  # of what the samples say
        self.told: set[str] = set()  # unforeseen faults that were logged
        self.last: tuple[int, int] | None = None  # (number, offset) of the last entry read from it
        self.taken = self.given = 0  # entries of which a sample was to be made, and was
        self.buffer: list[tuple[Place, Entry]] = []
        self.places = np.zeros((shuffle_buffer + 1, 3), np.int64)  # of what is in the buffer, ready to be saved

    def __iter__(self) -> Iterator[tuple[Place, dict[str, Any]]]:
        source = self.reader.name
        for place, entry in self._shuffled():
            shard = self.shards[place[0]]
            at = f"{shard}:{entry.number}"  # files of several folders may have one name
            self.report.take(source, shard.name)
            self.taken += 1
            try:
                sample = self.make_sample(entry, lambda reason, name, at=at: self._skip(reason, name, at))
            except LeftOut as left_out:
                self.report.drop(source, left_out.reason, entry.key, at)
            except BadSample as bad:
                self.report.reject(source, shard.name, bad.reason, bad.name, at)
                self.report.check(source, self.max_skipped)
            except BaseException:
                self.report.put_back(source, shard.name)
                raise
            else:
                self.report.read(source, str(shard), entry.number)
                if self.example:
                    self.report.show(source, self.example)
                self.given += 1
                yield place, sample

    def _skip(self, reason: str, name: str, at: str) -> None:
        self.report.skip(self.reader.name, reason, name, f"{at}/{name}")

    def make_sample(self, entry: Entry, skip: Skip = lambda reason, name: None) -> dict[str, Any]:
        """Make the sample of an entry, always the same one in this pass; `skip` notes what is left out of it.

        Raises:
            BadSample: if the entry cannot be used, for whatever reason.
            LeftOut: if the format's rules leave it out.
        """
        name = f"{self.choices}/{entry.key}"
        try:
            sample = self.reader.make_sample(entry.key, entry.payload, random.Random(name), skip)
            self.example = self.example or example_of(sample)
            if self.finish is not None:
                sample = self.finish(sample, random.Random(f"{name}/finish"))
        except (BadSample, LeftOut, DataError):
            raise
        except Exception as error:
            raise self._unforeseen(error, "entry", entry.key) from error
        return sample

    def _unforeseen(self, error: Exception, what: str, name: str) -> BadSample:
        """Return the fault for an exception that no reader foresaw. Its message goes to the log, once per kind and pass:
        messages may differ each time, and reasons are counted."""
        reason = f"unusable {what} ({type(error).__name__})"
        if reason not in self.told:
            self.told.add(reason)
            logger.warning("%s of %s: %s: %s", reason, self.reader.name, name, error)
        return BadSample(reason, name)

    def _shuffled(self) -> Iterator[tuple[Place, Entry]]:
        entries = self._entries()
        if self.size <= 1:
            yield from entries
            return
        for placed in entries:
            self._hold(placed)
            if len(self.buffer) < self.size:
                for more in entries:
                    self._hold(more)
                    break
            if len(self.buffer) >= max(1, self.size // 5):
                yield self._pick()
        while self.buffer:
            yield self._pick()

    def _hold(self, placed: tuple[Place, Entry]) -> None:
        self.places[len(self.buffer)] = placed[0]
        self.buffer.append(placed)

    def _pick(self) -> tuple[Place, Entry]:
        index, end = self.rng.randrange(len(self.buffer)), len(self.buffer) - 1
        self.buffer[index], self.buffer[end] = self.buffer[end], self.buffer[index]
        self.places[index] = self.places[end]
        return self.buffer.pop()

    def _entries(self) -> Iterator[tuple[Place, Entry]]:
        while self.shard < len(self.shards):
            shard, last = self.shards[self.shard], self.last
            try:
                for entry in self.reader.entries(shard, *(last or (0, 0))):
                    if last is not None and entry.number <= last[0]:
                        continue  # a resumed stream starts with the entry that was read last
                    entry = entry._replace(key=printable(entry.key))
                    self.last = (entry.number, entry.offset)
                    if (entry.number + self.shard) % self.stride == self.phase:
                        yield (self.shard, entry.number, entry.offset), entry
            except DataError:
                raise
            except Exception as error:
                bad = error if isinstance(error, BadSample) else self._unforeseen(error, "file", shard.name)
                self.report.take(self.reader.name, shard.name)
                self.report.reject(self.reader.name, shard.name, bad.reason, bad.name, str(shard))
                self.report.check(self.reader.name, self.max_skipped)
            for reason, number in self.reader.left_out.get(shard, {}).items():
                self.report.leave_out(self.reader.name, str(shard), reason, number)
            self.shard, self.last = self.shard + 1, None

    # ---- position ----

    def state_dict(self) -> dict[str, Any]:
        """Return the position: shard, entry, places of what is in the buffer, state of the generator."""
        return {
            "shards": self._fingerprint(),
            "shard": self.shard,
            "last": self.last,
            "taken": self.taken,
            "given": self.given,
            "buffer": torch.from_numpy(self.places[: len(self.buffer)].copy()),
            "rng": self.rng.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position.

        Raises:
            DataError: if the files are not those of the checkpoint.
        """
        if state["shards"] != self._fingerprint():
            raise DataError(
                f"The files of {self.reader.name} are not those that the checkpoint was reading ({len(self.shards)} are "
                "there for this process). Restore them, or start anew in another output_dir."
            )
        self.shard, self.last = state["shard"], state["last"]
        self.taken, self.given = state["taken"], state["given"]
        self.rng.setstate(state["rng"])
        places = [tuple(place) for place in state["buffer"].tolist()]
        found = self.fetch(places)
        for place in places:
            self._hold((place, found[place]))

    def fetch(self, places: Iterable[Place]) -> dict[Place, Entry]:
        """Read entries again. Raises DataError if one is not there any more."""
        wanted: dict[int, list[tuple[int, int]]] = {}
        for shard, *at in dict.fromkeys(places):
            wanted.setdefault(shard, []).append(tuple(at))
        found = {}
        for shard, at in wanted.items():
            try:
                for entry in self.reader.fetch(self.shards[shard], at):
                    entry = entry._replace(key=printable(entry.key))
                    found[shard, entry.number, entry.offset] = entry
            except DataError:
                raise
            except Exception as error:
                raise DataError(f"{self.shards[shard]} cannot be read any more: {error}.") from error
            if lost := [number for number, offset in at if (shard, number, offset) not in found]:
                raise DataError(
                    f"{self.shards[shard]} has changed since the checkpoint: entry {lost[0]} is not where it was. "
                    "Restore the file, or start anew in another output_dir."
                )
        return found

    def again(self, places: Iterable[Place]) -> dict[Place, dict[str, Any]]:
        """Make samples again that this pass has given before, without counting them. Raises DataError if one cannot be."""
        made = {}
        for place, entry in self.fetch(places).items():
            try:
                made[place] = self.make_sample(entry)
            except (BadSample, LeftOut) as error:
                fault = error if isinstance(error, BadSample) else f"{entry.key} is left out now ({error})"
                raise DataError(
                    f"{self.reader.name} has changed since the checkpoint: {fault}. Restore it, or start anew in "
                    "another output_dir."
                ) from error
        return made

    def _fingerprint(self) -> str:
        names = "\n".join(str(shard.name) for shard in self.shards)
        return hashlib.sha1(f"{self.stride} {self.phase}\n{names}".encode()).hexdigest()
