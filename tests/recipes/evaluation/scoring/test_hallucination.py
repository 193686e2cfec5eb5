# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""CHAIR worked by hand."""

import pytest

from recipes.evaluation.scoring.hallucination import chair, chair_counts, named_objects, read_synonyms

SYNONYMS = read_synonyms("person, man, woman, child\ndog, puppy\nhot dog\nbus\n\nknife\n")


def test_objects_are_found_by_their_words() -> None:
    assert named_objects("Two men and a puppy, with knives.", SYNONYMS) == ["person", "dog", "knife"]
    assert named_objects("A child eats hot dogs; the dog waits for buses.", SYNONYMS) == [
        "person",
        "hot dog",
        "dog",
        "bus",
    ]
    assert named_objects("", SYNONYMS) == named_objects("a tree", SYNONYMS) == []


def test_figures_by_hand() -> None:
    captions = ["a man and a dog", "a bus", "a dog with a dog and a bus"]
    truths = [["person", "dog"], ["bus", "person"], ["dog"]]
    figures = chair(captions, truths, SYNONYMS)
    assert figures == {"chair_i": 1 / 6, "chair_s": 1 / 3, "recall": 4 / 5, "count": 3}
    assert chair_counts(captions, truths, SYNONYMS)[2].tolist() == [1, 3, 1, 1, 1, 1]


def test_captions_without_objects() -> None:
    assert chair(["a tree"], [[]], SYNONYMS) == {"chair_i": 0.0, "chair_s": 0.0, "recall": 0.0, "count": 1}


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="do not know the object 'zebra'"):
        chair(["a zebra"], [["zebra"]], SYNONYMS)
    with pytest.raises(ValueError, match="no captions"):
        chair([], [], SYNONYMS)
