# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What can be wrong with data: the two errors, and the account of what was read and what was skipped."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Skip = Callable[[str, str], None]  # (reason, name of the unusable thing)
MIN_ENTRIES = 100  # before this many entries a share says nothing


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


class DataReport:
    """Counts what each source gave and what had to be skipped, by reason.

    A fault is listed once, however often the stream passes over it; shares count every pass.

    Args:
        keep_events: keep what is noted for `take_events`, to be repeated on another report.
    """

    def __init__(self, keep_events: bool = False) -> None:
        self._read: Counter[str] = Counter()
        self._dropped: dict[str, set[str]] = defaultdict(set)
        self._skipped: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self._entries: dict[str, Counter[str]] = defaultdict(Counter)  # source -> shard -> entries read
        self._unusable: dict[str, Counter[str]] = defaultdict(Counter)  # source -> shard -> of them unusable
        self._events: list[tuple[str, ...]] | None = [] if keep_events else None

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
        """Note what is unusable in a sample that is otherwise used, e.g. one image of a document."""
        self._note("skip", source, reason, name)
        self._skipped[source][reason].add(name)

    def reject(self, source: str, shard: str, reason: str, name: str) -> None:
        """Note an unusable sample, or the unusable rest of a file."""
        self._note("reject", source, shard, reason, name)
        self._skipped[source][reason].add(name)
        self._entries[source][shard] += 1
        self._unusable[source][shard] += 1

    def take_events(self) -> list[tuple[str, ...]]:
        """Return what was noted since the last call, for `repeat`."""
        events, self._events = self._events or [], []
        return events

    def repeat(self, events: Iterable[tuple[str, ...]]) -> None:
        """Note what another report has noted."""
        for name, *arguments in events:
            getattr(self, name)(*arguments)

    def check(self, source: str, max_share: float) -> None:
        """Refuse a source if too much of it is unusable.

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
        """Return `{source: {"read": int, "dropped_by_rule": int, "skipped": {reason: {"count": int, "examples": [str]}}}}`."""
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
        """Return all counts as plain data."""
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
