# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What all readers share: entries that can be found again, opening pictures, and the account of what was unusable."""

import json
import os
import random
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

Skip = Callable[[str, str], None]  # (reason, name of the unusable thing)
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
MAX_PROPORTION = 30  # a longer strip, cropped to its short side, would first be enlarged to gigabytes
MIN_ENTRIES = 100  # before this many entries a share says nothing
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM")


class BadSample(Exception):
    """Raised by a reader for a sample or file that cannot be used; it is skipped and counted, never replaced.

    Args:
        reason: class of the fault, e.g. "missing image".
        name: what is at fault, e.g. "00003.tar/000123.jpg".
    """

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(f"{reason}: {name}")
        self.reason = reason
        self.name = name


class DataError(ValueError):
    """The data as a whole cannot be trained on: too much of it is unusable, or too little is there."""


class Entry(NamedTuple):
    """A raw entry of a file, before it costs anything: bytes, a line, a row.

    Attributes:
        number: its number within the file, from 0.
        offset: where the reader finds it again (a byte position; 0 where the number is enough).
        key: its name, unique within the source; seeds its random choices.
        payload: what `Reader.record` makes a sample of.
    """

    number: int
    offset: int
    key: str
    payload: Any


class Reader(ABC):
    """One source of one format.

    Shuffling happens between `entries` and `record`, so that its buffer holds raw bytes, lines and rows rather than
    decoded pictures. A record is a sample of `processing.DeemDataCollator`: text or chat messages, its pictures in
    order, and where the format has them region masks, trained spans and a mode.

    Attributes:
        name: for reports.
        shards: the files; any objects with an order and a `name`.
        kind: "document", "caption" or "dialogue"; what can be packed is a document or a caption.
        captioned: whether it is a set of captions, of which a reader of each of `captions.FORMS` can be made.
    """

    kind: str = "dialogue"
    captioned: bool = False
    name: str
    shards: list[Path]

    @abstractmethod
    def entries(self, shard: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
        """Raw entries of a file, from the one with this number and offset on.

        Raises:
            BadSample: where the rest of the file cannot be read.
        """

    @abstractmethod
    def record(self, key: str, payload: Any, rng: random.Random, skip: Skip) -> dict[str, Any] | None:
        """One sample; None if the format's own rules drop it. All chance comes from `rng`; `skip` notes what is left out
        of a sample that is otherwise used.

        Raises:
            BadSample: if the entry cannot be used.
        """

    def fetch(self, shard: Path, places: Iterable[tuple[int, int]]) -> Iterator[Entry]:
        """The entries at these places (number, offset), in ascending order, in one pass between the first and the last."""
        wanted = sorted(places)
        if not wanted:
            return
        numbers, last = {number for number, _ in wanted}, wanted[-1][0]
        for entry in self.entries(shard, *wanted[0]):
            if entry.number in numbers:
                yield entry
            if entry.number >= last:
                return


class DataReport:
    """Counts what each source gave and what had to be skipped, by reason.

    A fault is listed once, however often the stream passes over it; shares count every pass.

    Args:
        record_events: keep what is noted for `take_events`, to be repeated on another report.
    """

    def __init__(self, record_events: bool = False) -> None:
        self._read: Counter[str] = Counter()
        self._dropped: dict[str, set[str]] = defaultdict(set)
        self._skipped: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._entries: dict[str, Counter[str]] = defaultdict(Counter)  # source -> shard -> entries read
        self._unusable: dict[str, Counter[str]] = defaultdict(Counter)  # source -> shard -> of them unusable
        self._events: list[tuple[str, ...]] | None = [] if record_events else None

    def _note(self, *event: str) -> None:
        if self._events is not None:
            self._events.append(event)

    def read(self, source: str, shard: str) -> None:
        """Count one usable sample (again in each pass)."""
        self._note("read", source, shard)
        self._read[source] += 1
        self._entries[source][shard] += 1

    def drop(self, source: str, shard: str, key: str) -> None:
        """Note a sound sample that the format's own rules leave out in some pass."""
        self._note("drop", source, shard, key)
        self._dropped[source].add(key)
        self._entries[source][shard] += 1

    def skip(self, source: str, reason: str, name: str) -> None:
        """Note an unusable part of a sample that is otherwise used, e.g. one picture of a document."""
        self._note("skip", source, reason, name)
        self._skipped[source][reason].add(name)

    def reject(self, source: str, shard: str, reason: str, name: str) -> None:
        """Note an unusable sample, or the unusable rest of a file."""
        self._note("reject", source, shard, reason, name)
        self._skipped[source][reason].add(name)
        self._entries[source][shard] += 1
        self._unusable[source][shard] += 1

    def take_events(self) -> list[tuple[str, ...]]:
        """What was noted since the last call, for `repeat`."""
        events, self._events = self._events or [], []
        return events

    def repeat(self, events: Iterable[tuple[str, ...]]) -> None:
        """Note what another report has noted."""
        for name, *arguments in events:
            getattr(self, name)(*arguments)

    def check(self, source: str, max_share: float) -> None:
        """Refuse a source of which too much is unusable.

        Raises:
            DataError: if, of at least `MIN_ENTRIES` entries, more than `max_share` (0 ... 1) were unusable.
        """
        entries, unusable = self._entries[source].total(), self._unusable[source].total()
        if entries < MIN_ENTRIES or unusable <= max_share * entries:
            return
        # a shard of which little was read yet counts for less
        shares = {shard: n / (self._entries[source][shard] + 10) for shard, n in self._unusable[source].items()}
        worst = max(shares, key=shares.__getitem__)
        reasons = {reason: len(names) for reason, names in self._skipped[source].items()}
        found = ", ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1]))
        raise DataError(
            f"{unusable} of the first {entries} entries of {source} are unusable ({unusable / entries:.0%}), more than "
            f"the {max_share:.0%} allowed by max_skipped. Worst: {worst} with "
            f"{self._unusable[source][worst]} of {self._entries[source][worst]}. Found: {found}. Repair or leave out "
            "these files, or raise --max_skipped."
        )

    def to_dict(self) -> dict[str, Any]:
        """`{source: {"read": int, "dropped_by_rule": int, "skipped": {reason: {"count": int, "examples": [str]}}}}`."""
        return {
            source: {
                "read": self._read[source],
                "dropped_by_rule": len(self._dropped[source]),
                "skipped": {
                    reason: {"count": len(names), "examples": sorted(names)[:5]}
                    for reason, names in sorted(self._skipped[source].items())
                },
            }
            for source in sorted({*self._read, *self._dropped, *self._skipped})
        }

    def state_dict(self) -> dict[str, Any]:
        """All counts as plain data."""
        return {
            "read": dict(self._read),
            "dropped": {source: sorted(keys) for source, keys in self._dropped.items()},
            "skipped": {
                source: {reason: sorted(names) for reason, names in reasons.items()}
                for source, reasons in self._skipped.items()
            },
            "entries": {source: dict(shards) for source, shards in self._entries.items()},
            "unusable": {source: dict(shards) for source, shards in self._unusable.items()},
        }

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the counts of another report's `state_dict`."""
        self._read.update(state["read"])
        for source, keys in state["dropped"].items():
            self._dropped[source].update(keys)
        for source, reasons in state["skipped"].items():
            for reason, names in reasons.items():
                self._skipped[source][reason].update(names)
        for mine, key in ((self._entries, "entries"), (self._unusable, "unusable")):
            for source, shards in state[key].items():
                mine[source].update(shards)

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, making the folder where it is missing."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = []
        for source, counts in self.to_dict().items():
            lines.append(f"data {source}: {counts['read']} samples, {counts['dropped_by_rule']} dropped by rule")
            for reason, fault in counts["skipped"].items():
                lines.append(f"  skipped {fault['count']} x {reason}, e.g. {', '.join(fault['examples'][:2])}")
        return "\n".join(lines)


def open_image(source: Path | bytes | Image.Image, name: str) -> Image.Image:
    """A fully decoded RGB picture from a file, from bytes, or from what `datasets` has opened.

    Raises:
        BadSample: "missing image", "empty image", "not an image", "image of floating point numbers",
            "image too large" (more pixels than `MAX_PIXELS`, or a strip longer than `MAX_PROPORTION`; judged before decoding) or "truncated or broken image".
    """
    image = source if isinstance(source, Image.Image) else _opened(source, name)
    if image.mode == "F":  # nothing says which values are black and white
        raise BadSample("image of floating point numbers", name)
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_PROPORTION * min(image.size):
        raise BadSample("image too large", name)
    converted = None
    try:
        image.load()
        if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits: `convert` would cut them at 255
            return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
        # a picture that is RGB already is not copied
        converted = image if image.mode == "RGB" and not getattr(image, "is_animated", False) else image.convert("RGB")
        return converted
    except Exception as error:  # Pillow's decoders raise whatever the bytes make them trip over
        raise BadSample("truncated or broken image", name) from error
    finally:
        if image is not source and image is not converted:
            image.close()


def _opened(source: Path | bytes, name: str) -> Image.Image:
    """Header read, pixels not yet."""
    if isinstance(source, Path) and not os.path.isfile(source):  # False, too, for names that no file can have
        raise BadSample("missing image", name[:200])
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise BadSample("empty image", name)
    try:
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise BadSample("image too large", name) from error
    except UnidentifiedImageError as error:
        if isinstance(source, Path):
            with open(source, "rb") as file:
                source = file.read(4)
        known = source.startswith(_MAGIC)
        raise BadSample("truncated or broken image" if known else "not an image", name) from error
    except Exception as error:  # as above
        raise BadSample("truncated or broken image", name) from error


def parse_json(text: str | bytes, name: str) -> Any:
    """`json.loads` that turns broken JSON and broken UTF-8 into `BadSample`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BadSample("broken json", name) from error


def remove_reserved(text: str, reserved: tuple[str, ...]) -> str:
    """Take the tokenizer's special tokens out of running text, where they would count as pictures or document ends."""
    for token in reserved:
        text = text.replace(token, "")
    # half of a surrogate pair, as cut JSON has it, is no text: tokenizers refuse it
    return text.encode("utf-8", "ignore").decode("utf-8")
