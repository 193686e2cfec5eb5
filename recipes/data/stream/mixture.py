# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Several sources -> one stream in which every micro-batch comes from one source.

Rules: data_and_evaluation.md section 2.4 (`random_mix` of the released DEEM data pipeline). `datasets.interleave_datasets`
draws per sample and cannot keep a micro-batch within one source, hence this class.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from recipes.data.faults import DataError

STOPPING = ("longest", "sum", "shortest")


class Mixture:
    """Draws a source for each micro-batch and yields its next `batch_size` samples one after the other.

    Args:
        sources: iterables; iterating one again goes on with an unfinished pass, or starts the next.
        probabilities: one positive weight per source; need not sum to 1.
        batch_size: samples per draw: those of a micro-batch, or 1 to draw for every sample. A last, incomplete
            micro-batch of a source is left out: it would shift every later micro-batch across two sources. Where a whole
            pass has fewer samples than a micro-batch, those of the next passes fill it.
        generator: the only source of chance.
        stopping: `"longest"` restarts an exhausted source and ends when every source was exhausted once, `"sum"` takes
            an exhausted source out and ends with the last one, `"shortest"` ends at the first exhaustion.
        account: returns, for the index of a source that gave nothing, what the error says about it.

    Raises:
        ValueError: for unequal numbers of sources and weights, weights that cannot be drawn from, or an unknown stopping
            rule.
        DataError: while iterating, for a source that has no sample (it could be restarted for ever).
    """

    def __init__(
        self,
        sources: list[Iterable[Any]],
        probabilities: list[float],
        batch_size: int,
        generator: torch.Generator,
        stopping: str = "longest",
        account: Callable[[int], str] = lambda index: "",
    ) -> None:
        if stopping not in STOPPING:
            raise ValueError(f"Unknown stopping rule {stopping!r}: choose one of {', '.join(STOPPING)}.")
        if len(sources) != len(probabilities):
            raise ValueError(
                f"{len(sources)} data sources but {len(probabilities)} probabilities: give one probability per source."
            )
        self.weights = torch.tensor(probabilities, dtype=torch.float32)
        if not len(self.weights) or (self.weights <= 0).any() or not self.weights.isfinite().all():
            raise ValueError(f"Probabilities must be positive finite numbers, got {list(probabilities)}.")
        self.sources, self.batch_size, self.generator, self.stopping = sources, batch_size, generator, stopping
        self.account = account
        self.batches_of_round = [0] * len(sources)
        self.exhausted = [False] * len(sources)
        self.used_up = [False] * len(sources)  # its last micro-batch ended its pass

    def __iter__(self) -> Iterator[Any]:
        running = [self._batches(index) for index in range(len(self.sources))]
        while True:
            index = self._draw()
            batch = None if self.used_up[index] else next(running[index], None)
            if batch is not None:
                self.batches_of_round[index] += 1
                yield from batch
                continue
            self.used_up[index] = False
            if not self.batches_of_round[index]:
                raise DataError(
                    f"Data source {index} ({self.sources[index]}) has no usable sample: give data that can be "
                    f"read.{self.account(index)}"
                )
            # The draw that finds a source exhausted yields nothing.
            self.exhausted[index] = True
            if self.stopping == "shortest" or all(self.exhausted):
                return
            if self.stopping == "longest":
                running[index], self.batches_of_round[index] = self._batches(index), 0
            else:
                self.weights[index] = 0.0

    def _draw(self) -> int:
        cumulative = (self.weights / self.weights.sum()).cumsum(0)
        index = int(torch.searchsorted(cumulative, torch.rand(1, generator=self.generator)))
        return min(index, len(self.sources) - 1)  # rounding can leave the last cumulative value just below 1

    def _batches(self, index: int) -> Iterator[list[Any]]:
        """Yield the micro-batches of one pass, and one of several passes where it has none."""
        batch: list[Any] = []
        for number in itertools.count():
            before = len(batch)
            for sample in self.sources[index]:
                batch.append(sample)
                if len(batch) == self.batch_size:
                    self.used_up[index] = number > 0
                    yield batch
                    if number:
                        return
                    batch = []
            # the first may have been the end of an unfinished pass
            if self.batches_of_round[index] or (number and len(batch) == before):
                return

    def state_dict(self) -> dict[str, Any]:
        """Return the position between two micro-batches, without that of the sources."""
        return {
            "weights": self.weights.clone(),
            "batches_of_round": list(self.batches_of_round),
            "exhausted": list(self.exhausted),
            "used_up": list(self.used_up),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved position; the sources take up theirs themselves."""
        self.weights = state["weights"].clone()
        self.batches_of_round, self.exhausted = list(state["batches_of_round"]), list(state["exhausted"])
        self.used_up = list(state["used_up"])
        self.generator.set_state(state["generator"])
