# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CHAIR: objects that captions name and images do not show.

Rohrbach et al., "Object Hallucination in Image Captioning" (2018).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.evaluation.scoring.ptb import ptb_tokenize

_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose",
    "knives": "knife", "wolves": "wolf", "loaves": "loaf", "scarves": "scarf", "shelves": "shelf", "policemen": "policeman",
    "feet": "foot", "teeth": "tooth", "oxen": "ox",
}  # fmt: skip


def read_synonyms(text: str) -> dict[str, str]:
    """Return word or phrase -> object, of lines "object, another word for it, ..." (the form of CHAIR's synonyms file)."""
    lines = [[word.strip().lower() for word in line.split(",") if word.strip()] for line in text.splitlines()]
    return {word: line[0] for line in lines if line for word in line}


def named_objects(caption: str, synonyms: Mapping[str, str]) -> list[str]:
    """Return the objects that a caption names, in order and as often; of overlapping phrases the longest counts.

    Args:
        synonyms: see `read_synonyms`; a plural is found by its singular.
    """
    words = ptb_tokenize(caption)
    longest = max((len(phrase.split()) for phrase in synonyms), default=0)
    found, at = [], 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):
            name = _looked_up(words[at : at + length], synonyms)
            if name is not None:
                found.append(name)
                at += length
                break
        else:
            at += 1
    return found


def chair_counts(captions: Sequence[str], truths: Sequence[Sequence[str]], synonyms: Mapping[str, str]) -> np.ndarray:
    """Return (N, 6) counts whose sums give CHAIR: invented mentions, mentions, has an invented one, 1, objects found, true
    objects. See `chair`."""
    rows = []
    for caption, objects in zip(captions, truths, strict=True):
        true, named = set(objects), named_objects(caption, synonyms)
        invented = sum(name not in true for name in named)
        rows.append([invented, len(named), invented > 0, 1, len(true & set(named)), len(true)])
    return np.array(rows, dtype=np.float64)


def chair(captions: Sequence[str], truths: Sequence[Sequence[str]], synonyms: Mapping[str, str]) -> dict[str, float]:
    """Return `chair_i` (share of mentions that are invented), `chair_s` (share of captions with one) and `recall` (share of
    true objects that are named), all in 0..1, and `count`.

    Args:
        captions: (N,) one per image.
        truths: the objects in each image: of its annotation and, in the official figures, named by its reference captions
            (`named_objects`).
        synonyms: see `read_synonyms`.

    Raises:
        ValueError: for no captions, unequal lengths, or an object that is none of `synonyms`.
    """
    if not len(captions):
        raise ValueError("There are no captions to score.")
    if unknown := {name for objects in truths for name in objects} - set(synonyms.values()):
        raise ValueError(f"The synonyms do not know the object {min(unknown)!r}: give a line for each object.")
    invented, mentions, with_one, count, found, true = chair_counts(captions, truths, synonyms).sum(0)
    return {
        "chair_i": float(invented / mentions) if mentions else 0.0,
        "chair_s": float(with_one / count),
        "recall": float(found / true) if true else 0.0,
        "count": int(count),
    }


def _looked_up(words: list[str], synonyms: Mapping[str, str]) -> str | None:
    *before, last = words
    singular = [_IRREGULAR[last]] if last in _IRREGULAR else []
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if last.endswith(ending) and len(last) > len(ending) + 1:
            singular.append(last.removesuffix(ending) + instead)
    for form in (last, *singular):
        if name := synonyms.get(" ".join([*before, form])):
            return name
    return None
