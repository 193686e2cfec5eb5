# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""One source as a stream: pass after pass over its reader, each sample finished and, where asked for, packed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import ProcessorMixin

from recipes.data.faults import BadSample, DataReport
from recipes.data.readers.reader import Reader
from recipes.data.samples import released_dialogue
from recipes.data.stream.concatenation import Concatenation, Concatenator
from recipes.data.stream.packing import Packer, Packing, group_captions, limit_caption
from recipes.data.stream.shuffle import Place, ReaderPass
from recipes.data.stream.steps import count_tokens, flip_images, limit_rounds, tokenize

WHOLE = (0, 1)  # the share of a process that reads everything
FEW, MAX_EMPTY_PASSES = 100, 30  # entries; passes over so few of them that give nothing


@dataclass(frozen=True)
class Source:
    """One reader and what becomes of its samples; see `DataArguments`.

    With `packing`, documents and captions are tokenized and packed, dialogues put one behind the other; without, samples
    are given as they are, unless they have more than `longest` tokens. No sample has more than `most_images` (0 = no limit).
    """

    reader: Reader
    processor: ProcessorMixin
    seed: int
    shuffle_buffer: int
    packing: Packing | Concatenation | None = None
    max_skipped: float = 1.0
    flip: bool = False
    max_length: int = 0
    longest: int = 0
    most_images: int = 0
    released_template: bool = False
    group_prob: float = 0.0

    def finish(self, sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Do what is done to each sample, whatever its format; with `packing` it becomes a document to pack.

        Raises:
            BadSample: if nothing can be made of it.
        """
        try:
            return self._finished(sample, rng)
        except (TemplateError, ValueError) as error:
            if _is_of_template(error):
                raise BadSample("chat that the chat template refuses", sample["id"]) from error
            raise

    def _finished(self, sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        if self.flip:
            sample = flip_images(sample, rng)
        if self.most_images and len(sample.get("images") or ()) > self.most_images:
            raise BadSample(f"more than {self.most_images} images, which the model has room for", sample["id"])
        if self.max_length:
            sample = limit_rounds(sample, self.processor, self.max_length)
        if self.released_template and "messages" in sample:
            sample = released_dialogue(sample, self.processor.image_token, self.processor.tokenizer.eos_token)
        return self._checked(sample) if self.packing is None else self._document(sample)

    def _checked(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Refuse here, where a sample can be skipped, what the collator would refuse and what no memory holds."""
        tokens = count_tokens(sample, self.processor)
        if self.longest and tokens > self.longest:
            raise BadSample(f"longer than {self.longest} tokens", sample["id"])
        return sample

    def _document(self, sample: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.packing, Concatenation):
            return {"sample": sample, "tokens": count_tokens(sample, self.processor)}
        document = tokenize(sample, self.processor)
        if document["input_ids"].count(self.packing.start_of_image_token_id) != len(document["images"]):
            raise BadSample("images and their places differ in number", sample["id"])
        if self.packing.level == "sample":
            document["input_ids"] = limit_caption(document["input_ids"], self.packing)
        return document


def _is_of_template(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is one of the chat template."""
    return error is not None and (isinstance(error, TemplateError) or _is_of_template(error.__cause__))


class PlacedSample(NamedTuple):
    """A sample, and where it can be found again: the pass over its source and the place in it (None if packed)."""

    source: "SourceStream"
    epoch: int
    place: Place | None
    sample: dict[str, Any]


class SourceStream:
    """The passes of one process over a source. Iterating goes on with an unfinished pass, or starts the next; each pass
    has an order of its own.

    Small data train too: a pass that fills no sequence gives what there is of one; a process whose share holds no entry
    reads all of them, as others do; and where chance leaves out all of a few entries, the next pass follows.
    """

    def __init__(self, source: Source, report: DataReport, share: tuple[int, int]) -> None:
        self.source, self.report, self.share = source, report, share
        self.epoch = 0
        self.reader_pass: ReaderPass | None = None
        self.packer: Packer | Concatenator | None = None
        self.filled = False  # a sequence, in this pass

    def __str__(self) -> str:
        return self.source.reader.name

    def __iter__(self) -> Iterator[PlacedSample]:
        if self.reader_pass is None:
            self._begin()
        yield from self._samples()
        if not self.reader_pass.taken and self.share != WHOLE:
            self.share = WHOLE
            self._begin()
            yield from self._samples()
        for _ in range(MAX_EMPTY_PASSES):
            if self.reader_pass.given or not 0 < self.reader_pass.taken < FEW:
                break
            self.restart()
            self._begin()
            yield from self._samples()
        self.restart()

    def _samples(self) -> Iterator[PlacedSample]:
        if self.packer is None:
            for place, sample in self.reader_pass:
                yield PlacedSample(self, self.epoch, place, sample)
            return
        yield from self._sequences()  # a resumed pass may hold some
        for place, document in self.reader_pass:
            self.packer.add(document, place)
            yield from self._sequences()
        if not self.filled:
            yield from map(self._grouped, self.packer.sequences(rest=True))

    def _sequences(self) -> Iterator[PlacedSample]:
        for sequence in self.packer.sequences():
            self.filled = True
            yield self._grouped(sequence)

    def restart(self) -> None:
        """Leave the present pass, if there is one; the next iteration starts another."""
        if self.reader_pass is not None:
            self.reader_pass, self.packer, self.epoch = None, None, self.epoch + 1

    def _begin(self) -> None:
        self.reader_pass, self.filled = self._pass(self.epoch), False
        packing = self.source.packing
        kind = Concatenator if isinstance(packing, Concatenation) else Packer
        self.packer = None if packing is None else kind(packing)

    def _pass(self, epoch: int) -> ReaderPass:
        source = self.source
        return ReaderPass(
            source.reader,
            self.report,
            source.seed,
            epoch,
            source.shuffle_buffer,
            self.share,
            source.max_skipped,
            source.finish,
        )

    def again(self, epoch: int, places: list[Place]) -> list[PlacedSample]:
        """Make unpacked samples again that a pass has given before. Raises DataError if the data has changed."""
        samples = self._pass(epoch).again(places)
        return [PlacedSample(self, epoch, place, samples[place]) for place in places]

    def _grouped(self, sequence: dict[str, Any]) -> PlacedSample:
        source = self.source
        rng = random.Random(f"{source.seed}/{self.epoch}/{sequence['id']}/group")
        if rng.random() < source.group_prob:
            eos = source.processor.tokenizer.eos_token_id
            sequence = group_captions(sequence, rng.randint(2, 8), source.packing, eos)
        return PlacedSample(self, self.epoch, None, sequence)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, and the position in the present pass (None between two)."""
        return {
            "epoch": self.epoch,
            "records": None if self.reader_pass is None else self.reader_pass.state_dict(),
            "packer": None if self.packer is None else self.packer.state_dict(),
            "filled": self.filled,
            "whole": self.share == WHOLE,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position. Raises DataError if the data is not that of the checkpoint."""
        self.epoch = state["epoch"]
        self.share = WHOLE if state["whole"] else self.share
        if state["records"] is None:
            return
        self._begin()
        self.filled = state["filled"]
        self.reader_pass.load_state_dict(state["records"])
        if self.packer is not None:
            places = [tuple(place) for place in state["packer"]["places"]]
            documents = self.reader_pass.again(places)
            self.packer.load_state_dict({**state["packer"], "places": places}, [documents[place] for place in places])
