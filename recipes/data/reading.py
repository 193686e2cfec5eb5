# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What all readers share: the order of a pass over the files, opening pictures, and the account of what was unusable.

A reader has `name`, `shards` (file paths), `entries(shard)`, which yields cheap raw `(key, payload)` pairs, and
`record(key, payload, rng, skip)`, which builds one sample record or returns None if the format's own rules drop it.
Shuffling happens between the two, so that the buffer holds raw bytes and lines rather than decoded pictures.
"""

import json
import random
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

Skip = Callable[[str, str], None]  # (reason, name of the unusable thing)


class BadSample(Exception):
    """Raised by a reader for a sample or file that cannot be used; it is skipped and counted, never replaced.

    Args:
        reason: class of the fault, e.g. "unreadable image".
        name: what is at fault, e.g. "00003.tar/000123.jpg".
    """

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(f"{reason}: {name}")
        self.reason = reason
        self.name = name


class Reader(Protocol):
    """One source of one format."""

    name: str
    shards: list[Path]

    def entries(self, shard: Path) -> Iterator[tuple[str, Any]]:
        """Raw entries of a file. May raise `BadSample` where the rest of the file cannot be read."""

    def record(self, key: str, payload: Any, rng: random.Random, skip: Skip) -> dict[str, Any] | None:
        """One sample record; None if dropped by rule. Raises `BadSample` if the entry cannot be used."""


class DataReport:
    """Counts what each source gave and what had to be skipped, by reason.

    A fault is counted once, however often the stream passes over it.
    """

    def __init__(self) -> None:
        self._read: Counter[str] = Counter()
        self._dropped: dict[str, set[str]] = defaultdict(set)
        self._skipped: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))

    def read(self, source: str) -> None:
        """Count one usable sample (again in each pass)."""
        self._read[source] += 1

    def drop(self, source: str, key: str) -> None:
        """Note a sound sample that the format's own rules leave out in some pass."""
        self._dropped[source].add(key)

    def skip(self, source: str, reason: str, name: str) -> None:
        """Note an unusable thing."""
        self._skipped[source][reason].add(name)

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


def stream_records(
    reader: Reader, report: DataReport, seed: int, epoch: int, shuffle_buffer: int
) -> Iterator[dict[str, Any]]:
    """One pass over a reader's files in an order that depends on `seed` and `epoch` alone.

    Each record has a generator of its own, seeded by its key, so that its random choices do not depend on the order.
    """
    order = random.Random(f"{seed}/{epoch}/{reader.name}")
    shards = sorted(reader.shards)
    order.shuffle(shards)
    for key, payload in shuffled(_all_entries(reader, shards, report), order, shuffle_buffer):
        try:
            record = reader.record(
                key,
                payload,
                random.Random(f"{seed}/{epoch}/{key}"),
                lambda reason, name: report.skip(reader.name, reason, name),
            )
        except BadSample as bad:
            report.skip(reader.name, bad.reason, bad.name)
            continue
        if record is None:
            report.drop(reader.name, key)
            continue
        report.read(reader.name)
        yield record


def _all_entries(reader: Reader, shards: list[Path], report: DataReport) -> Iterator[tuple[str, Any]]:
    for shard in shards:
        try:
            yield from reader.entries(shard)
        except BadSample as bad:
            report.skip(reader.name, bad.reason, bad.name)


def shuffled(items: Iterable[Any], rng: random.Random, size: int) -> Iterator[Any]:
    """Shuffle through a buffer of `size` items that starts to give at a fifth of it and then grows (WebDataset's rule).

    A size of 0 or 1 keeps the order.
    """
    if size <= 1:
        yield from items
        return
    buffer: list[Any] = []

    def pick() -> Any:
        index = rng.randrange(len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    items = iter(items)
    for item in items:
        buffer.append(item)
        if len(buffer) < size:
            buffer.extend(more for more in [next(items, None)] if more is not None)
        if len(buffer) >= max(1, size // 5):
            yield pick()
    while buffer:
        yield pick()


def open_image(source: Path | bytes, name: str) -> Image.Image:
    """A fully decoded RGB picture from a file or from bytes.

    Raises:
        BadSample: "missing image" or "unreadable image" (broken, truncated, no picture, or of absurd size).
    """
    if isinstance(source, Path) and not source.is_file():
        raise BadSample("missing image", name)
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadSample("unreadable image", name) from error


def parse_json(text: str | bytes, name: str) -> Any:
    """`json.loads` that turns broken JSON and broken UTF-8 into `BadSample`."""
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise BadSample("broken json", name) from error


def remove_reserved(text: str, reserved: tuple[str, ...]) -> str:
    """Take the tokenizer's special tokens out of running text, where they would count as pictures or document ends."""
    for token in reserved:
        text = text.replace(token, "")
    return text
