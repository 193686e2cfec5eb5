# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Several sources -> one stream in which every micro-batch comes from one source.

Rules: data_and_evaluation.md section 2.4 (`random_mix` of the released DEEM data pipeline). `datasets.interleave_datasets`
draws per sample and cannot keep a micro-batch within one source, hence this function.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

STOPPING = ("longest", "sum", "shortest")


def mix(
    sources: list[Iterable[Any]],
    probabilities: list[float],
    batch_size: int,
    generator: torch.Generator,
    stopping: str = "longest",
) -> Iterator[Any]:
    """Draw a source for each micro-batch and yield its next `batch_size` samples one after the other.

    Args:
        sources: iterables that can be iterated again from their beginning.
        probabilities: one positive weight per source; need not sum to 1.
        batch_size: samples per micro-batch. A last, incomplete micro-batch of a source is left out: it would shift
            every later micro-batch across two sources.
        generator: the only source of chance.
        stopping: `"longest"` restarts an exhausted source and ends when every source was exhausted once, `"sum"` takes
            an exhausted source out and ends with the last one, `"shortest"` ends at the first exhaustion.

    Raises:
        ValueError: for unequal numbers of sources and weights, weights that cannot be drawn from, an unknown stopping
            rule, or a source that has no whole micro-batch (it could be restarted for ever).
    """
    if stopping not in STOPPING:
        raise ValueError(f"Unknown stopping rule {stopping!r}: choose one of {', '.join(STOPPING)}.")
    if len(sources) != len(probabilities):
        raise ValueError(
            f"{len(sources)} data sources but {len(probabilities)} probabilities: give one probability per source."
        )
    weights = torch.tensor(probabilities, dtype=torch.float32)
    if not len(weights) or (weights <= 0).any() or not weights.isfinite().all():
        raise ValueError(f"Probabilities must be positive finite numbers, got {list(probabilities)}.")

    running = [_batches(source, batch_size) for source in sources]
    batches_of_round = [0] * len(sources)
    exhausted = [False] * len(sources)
    while True:
        cumulative = (weights / weights.sum()).cumsum(0)
        index = int(torch.searchsorted(cumulative, torch.rand(1, generator=generator)))
        index = min(index, len(sources) - 1)  # rounding can leave the last cumulative value just below 1
        batch = next(running[index], None)
        if batch is not None:
            batches_of_round[index] += 1
            yield from batch
            continue
        if not batches_of_round[index]:
            raise ValueError(
                f"Data source {index} ({sources[index]}) has no {batch_size} usable samples for one micro-batch: give "
                "more data, or a smaller per_device_train_batch_size or packed length."
            )
        # The draw that finds a source exhausted yields nothing.
        exhausted[index] = True
        if stopping == "shortest" or all(exhausted):
            return
        if stopping == "longest":
            running[index], batches_of_round[index] = _batches(sources[index], batch_size), 0
        else:
            weights[index] = 0.0


def _batches(source: Iterable[Any], batch_size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for sample in source:
        batch.append(sample)
        if len(batch) == batch_size:
            yield batch
            batch = []
