# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Dialogues put whole, one behind the other, into rows of a given length (data_and_evaluation.md section 2.7)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Concatenation:
    """How samples share rows.

    Args:
        length: most tokens of a row.
        max_images: most images of a row, -1 = no cap.
    """

    length: int
    max_images: int = -1


class Concatenator:
    """Fills a row with samples in their order as long as they fit; the first that does not fit begins the next row.

    Nothing is cut: a sample that fits into no row has one of its own. A row has one mode. The row that is not full at the
    end of the stream is given where asked for. The methods are those of `Packer`.
    """

    def __init__(self, settings: Concatenation) -> None:
        self.settings = settings
        self.held: list[tuple[Any, dict[str, Any]]] = []  # (place, document) of the row that is being filled
        self.full: list[list[tuple[Any, dict[str, Any]]]] = []

    def add(self, document: dict[str, Any], place: Any = None) -> None:
        """Append a sample.

        Args:
            document: `{"sample": sample, "tokens": int}`.
            place: where it can be found again.
        """
        if self.held and not self._fits(document):
            self.full.append(self.held)
            self.held = []
        self.held.append((place, document))

    def _fits(self, document: dict[str, Any]) -> bool:
        both = [held for _, held in self.held] + [document]
        images = sum(len(one["sample"].get("images") or ()) for one in both)
        return (
            sum(one["tokens"] for one in both) <= self.settings.length
            and (self.settings.max_images < 0 or images <= self.settings.max_images)
            and document["sample"].get("mode") == both[0]["sample"].get("mode")
        )

    def sequences(self, rest: bool = False) -> Iterator[dict[str, Any]]:
        """Yield all rows that are full, and with `rest` the one that is being filled, as samples of
        `processing.DeemDataCollator`: `{"samples", "id", "mode"}`."""
        if rest and self.held:
            self.full.append(self.held)
            self.held = []
        while self.full:
            samples = [document["sample"] for _, document in self.full.pop(0)]
            row = {"samples": samples, "id": "+".join(sample["id"] for sample in samples)}
            yield row if samples[0].get("mode") is None else {**row, "mode": samples[0]["mode"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the places of the samples in the unfinished row."""
        return {"places": [place for place, _ in self.held]}

    def load_state_dict(self, state: dict[str, Any], documents: list[dict[str, Any]]) -> None:
        """Take up a saved position; `documents` are those of `state["places"]`."""
        self.held = list(zip(state["places"], documents, strict=True))
