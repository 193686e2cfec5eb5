# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What all readers share: entries that can be found again, parsing JSON, cleaning text."""

import json
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from recipes.data.faults import BadSample, Skip


class Entry(NamedTuple):
    """A raw unit of a file, before it is parsed: bytes, a line, a row.

    Attributes:
        number: its number within the file, from 0.
        offset: where the reader finds it again (a byte position; 0 where the number is enough).
        key: its name, unique within the source; seeds its random choices.
        payload: what `Reader.make_sample` makes a sample of.
    """

    number: int
    offset: int
    key: str
    payload: Any


class Reader(ABC):
    """One source of one format.

    Shuffling happens between `entries` and `make_sample`, so that its buffer holds raw bytes, lines and rows rather than
    decoded images. A sample is one of `processing.DeemDataCollator`: text or chat messages, its images in
    order, and where the format has them region masks, trained spans and a mode.

    Attributes:
        name: for reports.
        shards: the files; any objects with an order and a `name`.
        kind: "document", "caption" or "dialogue"; what can be packed is a document or a caption.
        captioned: whether it is a set of captions, of which a reader of each of `captions.FORMS` can be made.
        left_out: for each file, how many of its rows never become entries, by the rule that leaves them out; known when
            all its entries have been read.
    """

    kind: str = "dialogue"
    captioned: bool = False
    name: str
    shards: list[Path]
    left_out: Mapping[Any, Mapping[str, int]] = MappingProxyType({})

    @abstractmethod
    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Read raw entries of a file, from the one with this number and offset on.

        Raises:
            BadSample: where the rest of the file cannot be read.
        """

    @abstractmethod
    def make_sample(self, key: str, payload: Any, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one sample. All chance comes from `rng`; `skip` notes what is left out of a sample that is otherwise used.

        Raises:
            BadSample: if the entry cannot be used.
            LeftOut: if the format's own rules leave it out.
        """

    def fetch(self, shard: Path, places: Iterable[tuple[int, int]]) -> Iterator[Entry]:
        """Read the entries at these places (number, offset) again, in ascending order, in one pass from first to last."""
        wanted = sorted(places)
        if not wanted:
            return
        numbers, last = {number for number, _ in wanted}, wanted[-1][0]
        for entry in self.entries(shard, *wanted[0]):
            if entry.number in numbers:
                yield entry
            if entry.number >= last:
                return


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON; broken JSON and broken UTF-8 raise BadSample. NaN and Infinity, which are no JSON, are missing values."""
    try:
        return json.loads(text, parse_constant=lambda constant: None)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadSample("broken json", name) from error


def is_missing(value: Any) -> bool:
    """Return whether a value stands for none: None, NaN (as tables have it) or an infinite number."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def clean_text(text: str, reserved: tuple[str, ...], lower: bool = False) -> str:
    """Return running text without the tokenizer's special tokens, which would count as images or document ends.

    Args:
        text: what a file says.
        reserved: the special tokens. None is left, also where taking one out puts another together.
        lower: return it in lower case, without what becomes a special token in it.
    """
    # half of a surrogate pair, as cut JSON has it, is no text: tokenizers refuse it
    text = _without(text.encode("utf-8", "ignore").decode("utf-8"), reserved)
    return _without(text.lower(), reserved) if lower else text


def _without(text: str, tokens: tuple[str, ...]) -> str:
    """Return text without tokens, in one pass: a token is taken out as soon as the text so far ends in it."""
    tokens = tuple(token for token in tokens if token)
    if not any(token in text for token in tokens):
        return text
    kept: list[str] = []
    ends = {token[-1] for token in tokens}
    longest = max(map(len, tokens))
    for letter in text:
        kept.append(letter)
        if letter in ends:
            tail = "".join(kept[-longest:])
            if (token := max((t for t in tokens if tail.endswith(t)), key=len, default=None)) is not None:
                del kept[-len(token) :]
    return "".join(kept)
