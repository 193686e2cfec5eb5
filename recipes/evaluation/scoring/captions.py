# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Captions against references: BLEU, ROUGE-L, CIDEr-D and METEOR as pycocoevalcap defines them.

Definitions: data_and_evaluation.md section 3.9. Scores are in 0..1, CIDEr-D in 0..10; papers print them times 100.
Everything but METEOR is computed here; METEOR is a Java program that comes with pycocoevalcap.
"""

import importlib.util
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from recipes.evaluation.scoring.ptb import ptb_tokenize

ORDERS = 4  # n-grams of one word to this many
_TINY, _SMALL = 1e-15, 1e-9  # added to matches and to guesses, as BLEU is defined there
_BETA = 1.2  # weight of recall in ROUGE-L
_SIGMA = 6.0  # of CIDEr-D's punishment of another length
_OF_TEN = 10.0  # CIDEr's scale
Tokenize = Callable[[str], list[str]]


class Scores(NamedTuple):
    """A score of the whole set and of every image, in the order of the images.

    Of BLEU, `corpus` is (4,) and `per_image` (N, 4) for BLEU-1 to BLEU-4; else a number and (N,).
    """

    corpus: Any
    per_image: np.ndarray


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize = ptb_tokenize) -> Scores:
    """Return BLEU-1 to BLEU-4, with the brevity penalty of the closest reference.

    Args:
        predictions: (N,) one caption per image.
        references: of each image, one or more.
        tokenize: gives the words of a caption; `str.split` for texts that are tokenized already.

    Raises:
        ValueError: for no captions, unequal lengths or an image without references.
    """
    counts = bleu_counts(predictions, references, tokenize)
    return Scores(_bleu_of(counts.sum(0, keepdims=True))[0], _bleu_of(counts))


def bleu_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize = ptb_tokenize
) -> np.ndarray:
    """Return (N, 10) counts whose sums give BLEU: matches and guesses of four orders, length, reference length."""
    words, reference_words = _tokenized(predictions, references, tokenize)
    rows = []
    for said, expected in zip(words, reference_words, strict=True):
        grams = _ngrams(said)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in expected:
            most |= _ngrams(reference)
        matches, guesses = [0] * ORDERS, [max(0, len(said) - order) for order in range(ORDERS)]
        for gram, count in grams.items():
            matches[len(gram) - 1] += min(count, most[gram])
        closest = min((abs(len(reference) - len(said)), len(reference)) for reference in expected)[1]
        rows.append([*matches, *guesses, len(said), closest])
    return np.array(rows, dtype=np.float64)


def bleu_figure(order: int = ORDERS) -> Callable[[np.ndarray], np.ndarray]:
    """Return the figure of `bootstrap_interval` that makes BLEU of an order of summed `bleu_counts`."""
    return lambda sums: _bleu_of(sums)[:, order - 1]


def rouge_l(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize = ptb_tokenize
) -> Scores:
    """Return ROUGE-L: of the best precision and the best recall among an image's references; see `bleu`."""
    scores = []
    for said, expected in zip(*_tokenized(predictions, references, tokenize), strict=True):
        common = [_longest_common(said, reference) for reference in expected]
        precision = max(common) / max(len(said), 1)
        recall = max(one / max(len(reference), 1) for one, reference in zip(common, expected, strict=True))
        both = precision * recall
        scores.append((1 + _BETA**2) * both / (recall + _BETA**2 * precision) if both else 0.0)
    return Scores(float(np.mean(scores)), np.array(scores))


def cider_d(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize = ptb_tokenize
) -> Scores:
    """Return CIDEr-D, with how rare n-grams are among the images given; see `bleu`.

    Of a single image it is 0, since no n-gram is rarer than another; a warning says so.
    """
    words, reference_words = _tokenized(predictions, references, tokenize)
    if len(words) == 1:
        warnings.warn("CIDEr-D of a single image is 0: its n-grams are as frequent as all.", stacklevel=2)
    reference_grams = [[_ngrams(reference) for reference in expected] for expected in reference_words]
    images: Counter[tuple[str, ...]] = Counter()
    for expected in reference_grams:
        images.update(set().union(*expected))
    rarity = _Rarity({gram: math.log(count) for gram, count in images.items()}, math.log(len(words)))
    scores = []
    for said, expected in zip(words, reference_grams, strict=True):
        weighted = rarity.weigh(_ngrams(said))
        similar = [_similarity(weighted, rarity.weigh(reference)) for reference in expected]
        scores.append(_OF_TEN * sum(similar) / len(similar))
    return Scores(float(np.mean(scores)), np.array(scores))


def meteor_missing() -> str | None:
    """Return why METEOR cannot be computed here, or None if it can; ask before captions are generated."""
    if shutil.which("java") is None:
        return "METEOR needs Java, and there is no `java` on the path: install a JRE (Debian: default-jre-headless)."
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "METEOR comes with pycocoevalcap, which is not installed: `pip install pycocoevalcap`."
    return None


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize = ptb_tokenize
) -> Scores:
    """Return METEOR 1.5 of the Java program in pycocoevalcap; see `bleu`.

    The program takes 2 GB, and seconds to start; it is started once.

    Raises:
        RuntimeError: without Java or pycocoevalcap, see `meteor_missing`; if the program fails.
    """
    if missing := meteor_missing():
        raise RuntimeError(missing)
    words, reference_words = _tokenized(predictions, references, tokenize)
    said = {index: [" ".join(one)] for index, one in enumerate(words)}
    expected = {index: [" ".join(one) for one in of_image] for index, of_image in enumerate(reference_words)}
    program = _meteor_program()
    try:
        corpus, scores = program.compute_score(expected, said)
    except (ValueError, OSError) as error:  # what comes of a program that has ended
        program.lock.release()  # which it waits for when it is deleted
        _meteor_program.cache_clear()
        raise RuntimeError("METEOR's Java program gave no scores; it needs 2 GB of memory.") from error
    return Scores(corpus, np.array(scores))


@lru_cache(maxsize=1)
def _meteor_program() -> Any:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


class _Rarity:
    """Weights of n-grams: how often in a caption, times how rare among images.

    Args:
        logs: of in how many images' references each n-gram is.
        log_images: log of how many images there are.
    """

    def __init__(self, logs: dict[tuple[str, ...], float], log_images: float) -> None:
        self.logs, self.log_images = logs, log_images

    def weigh(self, grams: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Return the weights of each order, their norms, and how many pairs of words there are."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (self.log_images - self.logs.get(gram, 0.0))
        norms = [math.sqrt(sum(weight * weight for weight in of_order.values())) for of_order in weights]
        return weights, norms, sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(said: Any, reference: Any) -> float:
    """Clipped cosine, mean over the orders, less for another length."""
    total = 0.0
    for weights, norm, other_weights, other_norm in zip(*said[:2], *reference[:2], strict=True):
        if norm and other_norm:
            shared = sum(
                min(weight, other_weights[gram]) * other_weights[gram]
                for gram, weight in weights.items()
                if gram in other_weights
            )
            total += shared / (norm * other_norm)
    return total / ORDERS * math.exp(-((said[2] - reference[2]) ** 2) / (2 * _SIGMA**2))


def _bleu_of(sums: np.ndarray) -> np.ndarray:
    """(R, 10) -> (R, 4)."""
    matches, guesses, length, closest = sums[:, :ORDERS], sums[:, ORDERS : 2 * ORDERS], sums[:, -2], sums[:, -1]
    precision = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    return precision * np.exp(np.minimum(1 - 1 / ratio, 0))[:, None]


def _ngrams(words: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, ORDERS + 1)
        for start in range(len(words) - order + 1)
    )


def _longest_common(first: list[str], second: list[str]) -> int:
    """The length of the longest list of words that both have in this order."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for index, other in enumerate(second):
            above = row[index + 1]
            row[index + 1] = before + 1 if word == other else max(above, row[index])
            before = above
    return row[-1]


def _tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize
) -> tuple[list[list[str]], list[list[list[str]]]]:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"Give one caption per image; got {len(predictions)} for {len(references)} images.")
    if empty := [index for index, expected in enumerate(references) if not expected or isinstance(expected, str)]:
        raise ValueError(f"Each image needs a list of references; image {empty[0]} has {references[empty[0]]!r}.")
    return [tokenize(one) for one in predictions], [[tokenize(one) for one in expected] for expected in references]
