# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The data of evaluations: held-out samples, each once, in micro-batches of one form."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from processing import DeemProcessor
from recipes.data.sources import DataArguments, build_dataset
from recipes.data.stream.dataset import SampleStream

Sample = dict[str, Any]


def held_out_samples(
    arguments: DataArguments, processor: DeemProcessor, number: int, seed: int, caption_forms: tuple[str, ...]
) -> list[Sample]:
    """Return `number` samples of one pass over the data, fewer where a pass has fewer, and say so.

    Args:
        arguments: `data` is what is held out; the other options are those of training.
        caption_forms: see `build_dataset`.

    Raises:
        ValueError: `number` is below 1, or the data cannot be read (see `build_dataset`).
    """
    if number < 1:
        raise ValueError(f"--eval_samples {number}: give at least 1, or leave out --eval_data.")
    once = replace(arguments, data_probs=None, random_flip=False, data_stopping="sum", data_weights="equal")
    dataset, report = build_dataset(once, processor, 1, seed, caption_forms)
    stream, taken = SampleStream(dataset, report, (0, 1)), []
    for sample in stream:
        if stream.epoch:  # a second pass over the data has begun
            print(f"--eval_data has {len(taken)} samples, fewer than the {number} of --eval_samples: all are used.")
            break
        taken.append(sample)
        if len(taken) == number:
            break
    return taken


def micro_batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Return the samples in lists of at most `size` that the collator can put together: of one mode, packed or not."""
    kinds: dict[tuple[str, bool], list[Sample]] = defaultdict(list)
    for sample in samples:
        packed = bool({"input_ids", "samples"} & sample.keys())
        kinds[sample.get("mode") or "interleaved", packed].append(sample)
    return [kind[start : start + size] for kind in kinds.values() for start in range(0, len(kind), size)]
