# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What can be wrong with data, and the account of what was read, what was left out and what was skipped."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipes.whole_files import write_whole

Skip = Callable[[str, str], None]  # (reason, name of the unusable thing)
MIN_ENTRIES = 100  # before this many entries a share says nothing
MAX_NAME = 300  # letters of a name in the report
OUTCOMES = ("read", "dropped", "unusable")  # what becomes of an entry


def printable(text: str) -> str:
    """Return text that can be printed and encoded: halves of surrogate pairs, as cut JSON has them, are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


class BadSample(Exception):
    """Raised by a reader for a sample or file that cannot be used; it is skipped and counted, never replaced.

    Args:
        reason: class of the fault, e.g. "missing image".
        name: what is at fault, e.g. "00003.tar/000123.jpg".
    """

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(printable(f"{reason}: {name}"))
        self.reason = reason
        self.name = name


class LeftOut(Exception):
    """Raised by a reader for a sound entry that the format's own rules leave out, always or in this pass.

    Args:
        reason: the rule, e.g. "document without an image".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DataError(ValueError):
    """The data as a whole cannot be trained on: too much of it is unusable, or too little is there."""


class DataReport:
    """Counts what each source gave and what had to be skipped, by reason.

    Every entry that is taken has exactly one outcome: it is read, dropped by a rule, or unusable; `to_dict` checks that.
    A fault is listed once for its place, however often the stream passes over it; entries count in every pass. Rows are
    the entries that were read, each counted once.

    Args:
        keep_events: keep what is noted for `take_events`, to be repeated on another report.
    """

    def __init__(self, keep_events: bool = False) -> None:
        self._taken: dict[str, Counter[str]] = defaultdict(Counter)  # source -> shard -> entries taken
        self._unusable: dict[str, Counter[str]] = defaultdict(Counter)  # source -> shard -> of them unusable
        self._outcomes: dict[str, Counter[str]] = defaultdict(Counter)  # source -> outcome -> entries
        self._rows: dict[str, dict[str, bytearray]] = defaultdict(lambda: defaultdict(bytearray))  # a bit per row read
        # source -> reason -> place -> name of what is left out there
        self._dropped: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        self._skipped: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        # source -> reason -> shard -> number of rows that never become entries
        self._left_out: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        self._examples: dict[str, dict[str, str]] = {}  # source -> {"question" or "caption": text}
        self._events: list[tuple[Any, ...]] | None = [] if keep_events else None

    def _note(self, *event: Any) -> None:
        if self._events is not None:
            self._events.append(event)

    def take(self, source: str, shard: str) -> None:
        """Count one entry, or one file whose rest cannot be read; its outcome follows."""
        self._note("take", source, shard)
        self._taken[source][shard] += 1

    def put_back(self, source: str, shard: str) -> None:
        """Undo `take`: the run was interrupted before the entry had an outcome."""
        self._note("put_back", source, shard)
        self._taken[source][shard] -= 1

    def read(self, source: str, shard: str, number: int) -> None:
        """Note that a sample was made of the entry with this number in its file."""
        self._note("read", source, shard, number)
        self._outcomes[source]["read"] += 1
        seen, (at, bit) = self._rows[source][shard], divmod(number, 8)
        seen.extend(bytes(max(0, at + 1 - len(seen))))
        seen[at] |= 1 << bit

    def show(self, source: str, example: dict[str, str]) -> None:
        """Keep what a sample asks or shows; the first that a source gives."""
        if source not in self._examples:
            self._note("show", source, example)
            self._examples[source] = example

    def drop(self, source: str, reason: str, name: str, place: str) -> None:
        """Note that the format's own rules left the entry at this place out."""
        self._note("drop", source, reason, name, place)
        self._outcomes[source]["dropped"] += 1
        self._dropped[source][reason][place] = printable(name[:MAX_NAME])

    def reject(self, source: str, shard: str, reason: str, name: str, place: str) -> None:
        """Note that the entry at this place, or the rest of the file, is unusable."""
        self._note("reject", source, shard, reason, name, place)
        self._outcomes[source]["unusable"] += 1
        self._skipped[source][reason][place] = printable(name[:MAX_NAME])
        self._unusable[source][shard] += 1

    def skip(self, source: str, reason: str, name: str, place: str) -> None:
        """Note what is unusable in a sample that is otherwise used, e.g. one image of a document."""
        self._note("skip", source, reason, name, place)
        self._skipped[source][reason][place] = printable(name[:MAX_NAME])

    def leave_out(self, source: str, shard: str, reason: str, number: int) -> None:
        """Note how many rows of a file the format's own rules leave out before they become entries."""
        self._note("leave_out", source, shard, reason, number)
        self._left_out[source][reason][shard] = number

    def take_events(self) -> list[tuple[Any, ...]]:
        """Return what was noted since the last call, for `repeat`."""
        events, self._events = self._events or [], []
        return events

    def repeat(self, events: Iterable[tuple[Any, ...]]) -> None:
        """Note what another report has noted."""
        for name, *arguments in events:
            getattr(self, name)(*arguments)

    def check(self, source: str, max_share: float) -> None:
        """Refuse a source if too much of it is unusable.

        Raises:
            DataError: if, of at least `MIN_ENTRIES` entries, more than `max_share` (0 ... 1) were unusable.
        """
        taken, unusable = self._taken[source].total(), self._unusable[source].total()
        if taken < MIN_ENTRIES or unusable <= max_share * taken:
            return
        # a shard of which little was read yet counts for less
        shares = {shard: n / (self._taken[source][shard] + 10) for shard, n in self._unusable[source].items()}
        worst = max(shares, key=shares.__getitem__)
        reasons = {reason: len(places) for reason, places in self._skipped[source].items()}
        found = ", ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda x: -x[1]))
        raise DataError(
            f"{unusable} of the first {taken} entries of {source} are unusable ({unusable / taken:.0%}), more than "
            f"the {max_share:.0%} allowed by max_skipped. Worst: {worst} with "
            f"{self._unusable[source][worst]} of {self._taken[source][worst]}. Found: {found}. Repair or leave out "
            "these files, or raise --max_skipped."
        )

    def check_balance(self) -> None:
        """Check that every entry has an outcome.

        Raises:
            RuntimeError: if one was lost without a trace, or counted twice.
        """
        for source, shards in self._taken.items():
            if (taken := shards.total()) != (known := self._outcomes[source].total()):
                outcomes = ", ".join(f"{self._outcomes[source][outcome]} {outcome}" for outcome in OUTCOMES)
                raise RuntimeError(
                    f"{taken} entries of {source} were taken, but the outcome of {known} is known ({outcomes}). This is "
                    "an error of the reader or the stream, please report it."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return `{source: {"read", "rows", "dropped_by_rule", "skipped", "entries", "left_out"[, "example"]}}`.

        `entries` of all passes became samples (`read`) or are among the others. `rows` are different entries among those
        read that no source above has read; `example` is the first question or caption read. `skipped` and `left_out` are
        numbers of places by reason: `{reason: {"count": int, "examples": [str]}}` and `{reason: int}`, the latter with the
        rows that never become entries; `dropped_by_rule` is all of those together.

        Raises:
            RuntimeError: see `check_balance`.
        """
        self.check_balance()
        rows = self._new_rows()
        sources = sorted({*self._taken, *self._skipped, *self._left_out})
        return {source: self._of_source(source, rows.get(source, 0)) for source in sources}

    def _new_rows(self) -> dict[str, int]:
        """Return how many rows each source has read that none before it has: captions in several forms are several
        sources of the same rows."""
        known: dict[str, int] = defaultdict(int)  # shard -> a bit per row
        counts: dict[str, int] = defaultdict(int)
        for source in sorted(self._rows):
            for shard, seen in self._rows[source].items():
                bits = int.from_bytes(seen, "little")
                counts[source] += (bits & ~known[shard]).bit_count()
                known[shard] |= bits
        return counts

    def _of_source(self, source: str, rows: int) -> dict[str, Any]:
        left_out = Counter({reason: len(places) for reason, places in self._dropped[source].items()})
        never = {reason: sum(shards.values()) for reason, shards in self._left_out[source].items()}
        left_out.update(never)
        return {
            "read": self._outcomes[source]["read"],
            "rows": rows,
            "dropped_by_rule": len({at for places in self._dropped[source].values() for at in places})
            + sum(never.values()),
            "skipped": {
                reason: {"count": len(places), "examples": sorted(set(places.values()))[:5]}
                for reason, places in sorted(self._skipped[source].items())
            },
            "entries": self._taken[source].total(),
            "left_out": dict(sorted(left_out.items())),
            **({"example": self._examples[source]} if source in self._examples else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all counts as plain data."""
        flat = {"taken": self._taken, "unusable": self._unusable, "outcomes": self._outcomes}
        nested = {"dropped": self._dropped, "skipped": self._skipped, "left_out": self._left_out}
        rows = {source: {shard: bytes(seen) for shard, seen in seen.items()} for source, seen in self._rows.items()}
        return {
            "rows": rows,
            "examples": dict(self._examples),
            **{name: {source: dict(counts) for source, counts in kept.items()} for name, kept in flat.items()},
            **{
                name: {
                    source: {reason: dict(places) for reason, places in found.items()}
                    for source, found in kept.items()
                }
                for name, kept in nested.items()
            },
        }

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the counts of another report's `state_dict`."""
        for name in ("taken", "unusable", "outcomes"):
            for source, counts in state[name].items():
                getattr(self, f"_{name}")[source].update(counts)
        self._examples = {**state.get("examples", {}), **self._examples}  # neither is in older checkpoints
        for source, shards in state.get("rows", {}).items():
            for shard, seen in shards.items():
                own = self._rows[source][shard]
                both = int.from_bytes(own, "little") | int.from_bytes(seen, "little")
                own[:] = both.to_bytes(max(len(own), len(seen)), "little")
        for name in ("dropped", "skipped", "left_out"):
            for source, reasons in state[name].items():
                for reason, places in reasons.items():
                    getattr(self, f"_{name}")[source][reason].update(places)

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, making the folder where it is missing."""
        write_whole(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        lines = []
        for source, counts in self.to_dict().items():
            lines.append(f"data {source}: {counts['read']} samples, {counts['dropped_by_rule']} dropped by rule")
            for reason, number in counts["left_out"].items():
                lines.append(f"  left out {number} x {reason}")
            for reason, fault in counts["skipped"].items():
                lines.append(f"  skipped {fault['count']} x {reason}, e.g. {', '.join(fault['examples'][:2])}")
        return "\n".join(lines)
