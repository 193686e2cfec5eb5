# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Of which types the values of a sample are: what the collator relies on, refused in words before anything else."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch

_LIST = (list, tuple, np.ndarray, torch.Tensor)
# key -> its types, those of its entries, in words
_KINDS: dict[str, tuple[tuple[type, ...], tuple[type, ...], str]] = {
    "text": ((str,), (), "text"),
    "prompt": ((str,), (), "text"),
    "mode": ((str,), (), "text"),
    "messages": ((list, tuple), (), "a list of messages"),
    "images": ((list, tuple), (), "a list of images"),
    "samples": ((list, tuple), (Mapping,), "a list of samples"),
    "input_ids": (_LIST, (Integral,), "a list of whole numbers"),
    "document_starts": (_LIST, (Integral,), "a list of whole numbers"),
    "image_loss_mask": (_LIST, (bool, np.bool_, Integral), "a list of bools"),
    "region_masks": (_LIST, (), "a list of masks"),
    "boxes": (_LIST, (), "a list of [x1, y1, x2, y2]"),
    "points": (_LIST, (), "a list of [x, y]"),
    "trained_spans": ((list, tuple), (list, tuple), "a list of (start, end)"),
}


def check_kinds(sample: Any, name: str) -> dict[str, Any]:
    """
    Return a sample of `DeemDataCollator` with an id, which is `name` where it has none, and its values of their types.

    Raises:
        ValueError: naming the sample, for one that is no dict, for values or entries of other types, and for spans that
            do not lie in the text.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(
            f"A sample is {type(sample).__name__}; expected a dict with text, messages, input_ids or samples (sample {name})."
        )
    sample = {"id": name, **sample}
    for key, (types, of_entries, words) in _KINDS.items():
        value = sample.get(key)
        if value is None:
            continue
        sound = isinstance(value, types) and getattr(value, "ndim", 1)
        if sound and of_entries:
            sound = all(isinstance(one, of_entries) for one in (value.tolist() if hasattr(value, "tolist") else value))
        if key == "images":  # one behind the other, as their places in the text
            sound = sound and not any(isinstance(one, (list, tuple)) or one is None for one in value)
        if not sound:
            raise ValueError(
                f"Sample {sample['id']} has {type(value).__name__} {value!r}"[:200]
                + f" for {key}; expected {words}. Leave "
                "the key out where the value is missing."
            )
    for one in sample.get("samples") or ():
        check_kinds({"id": sample["id"], **one}, name)
    length = len(sample.get("text") or "")
    for span in sample.get("trained_spans") or ():
        if len(span) != 2 or not all(isinstance(place, Integral) and 0 <= place <= length for place in span):
            raise ValueError(
                f"Sample {sample['id']} has {span!r} in trained_spans; expected (start, end) in characters of its text of "
                f"{length}."
            )
    return sample


__all__ = ["check_kinds"]
