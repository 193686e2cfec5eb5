# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Packing and mixing against the released pipeline's results (test vectors), and the edge cases they leave open."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recipes.data.stream.mixture import Mixture
from recipes.data.stream.packing import Packer, Packing, group_captions, limit_caption

VECTORS = Path(__file__).resolve().parents[3] / "../shared/vectors"
BOS, EOS, START, IMAGE = 1, 2, 7, 8


def vectors(name: str) -> dict:
    if not (VECTORS / name).is_file():
        pytest.skip(f"The test vectors {name} are not there.")
    return json.loads((VECTORS / name).read_text())


def packing(length: int, level: str = "image", max_images: int = -1, num_image_tokens: int = 3) -> Packing:
    return Packing(length, num_image_tokens, BOS, START, IMAGE, max_images, level)


def documents(specs: list[list], num_image_tokens: int = 3) -> list[dict]:
    """Documents from text ids with "I" for an image; images are numbered over the stream."""
    found, number = [], 0
    for index, spec in enumerate(specs):
        ids, images = [BOS], []
        for piece in spec:
            if piece == "I":
                ids += [START] + [IMAGE] * num_image_tokens
                images.append(number)
                number += 1
            else:
                ids.append(piece)
        found.append({"input_ids": [*ids, EOS], "images": images, "id": f"d{index}"})
    return found


def pack(documents: list[dict], rules: Packing) -> Iterator[dict]:
    """The sequences that documents fill."""
    packer = Packer(rules)
    for document in documents:
        packer.add(document)
        yield from packer.sequences()


@pytest.mark.parametrize(
    "name", ["image_level_no_cap", "image_level_cap2", "image_level_exact", "sample_level_no_cap"]
)
def test_packing_equals_the_released_results(name):
    case = next(case for case in vectors("packing.json")["cases"] if case["name"] == name)
    rules = packing(case["num_total_token"], case["truncation_level"], case["max_num_images"], case["num_img_token"])
    packed = list(pack(documents(case["documents"], case["num_img_token"]), rules))
    assert [
        {
            "text_ids": sequence["input_ids"],
            "image_index": sequence["images"],
            "nearest_bos_idxs": sequence["document_starts"],
            "is_truncated": int(sequence["is_truncated"]),
        }
        for sequence in packed
    ] == case["expected"]


@pytest.mark.parametrize("level", ["image", "sample"])
@pytest.mark.parametrize("max_images", [-1, 1, 2])
@pytest.mark.parametrize("length", [5, 9, 16, 31])
def test_packing_invariants(level, max_images, length):
    generator = torch.Generator().manual_seed(length)
    specs = [
        [
            "I" if torch.rand(1, generator=generator) < 0.3 else int(torch.randint(10, 30, (1,), generator=generator))
            for _ in range(int(torch.randint(1, 25, (1,), generator=generator)))
        ]
        for _ in range(60)
    ]
    rules = packing(length, level, max_images)
    last = -1
    for sequence in pack(documents(specs), rules):
        ids, images = sequence["input_ids"], sequence["images"]
        assert 0 < len(ids) <= length
        assert ids.count(START) == len(images) == len(sequence["document_starts"]) > 0
        assert ids.count(IMAGE) == 3 * len(images)
        for at in (i for i, token in enumerate(ids) if token == START):
            assert ids[at + 1 : at + 4] == [IMAGE] * 3
        assert max_images == -1 or len(images) <= max_images
        assert images == sorted(images) and images[0] > last
        last = images[-1]
        for start in sequence["document_starts"]:
            assert start == 0 or ids[start] == BOS
    assert last > 0


def test_sample_level_cap_cuts_at_the_last_bos_before_the_first_image_too_many():
    rules = packing(18, "sample", max_images=2)
    first, second = list(pack(documents([["I"], ["I"], [11, "I"], ["I", 12, 13, 14, 15], [16, 17, 18, 19]]), rules))
    assert first["input_ids"] == [BOS, START, 8, 8, 8, EOS] * 2 and first["images"] == [0, 1]
    assert second["input_ids"] == [BOS, 11, START, 8, 8, 8, EOS, BOS, START, 8, 8, 8, 12, 13, 14, 15, EOS, BOS]
    assert second["images"] == [2, 3] and second["document_starts"] == [0, 7]


def test_sample_level_cap_without_a_bos_between_cuts_at_the_image():
    rules = packing(15, "sample", max_images=2)
    first, *_ = pack(documents([["I", "I", 11, "I"], [12] * 20]), rules)
    assert first["input_ids"] == [BOS, START, 8, 8, 8, START, 8, 8, 8, 11] and first["images"] == [0, 1]


def test_a_document_longer_than_a_sequence_does_not_stop_the_stream():
    rules = packing(10, "sample")
    packed = list(pack(documents([[11, "I", 12, "I", 13, "I", 14, "I"], [15, "I"], [16] * 10]), rules))
    assert [image for sequence in packed for image in sequence["images"]] == [0, 1, 2, 3, 4]


def test_sequences_without_images_are_dropped():
    assert list(pack(documents([[11] * 50, [12] * 50]), packing(16))) == []


def test_ids_name_the_documents_of_the_images():
    (sequence,) = pack(documents([["I", "I"], [11], ["I"]]), packing(19))
    assert sequence["id"] == "d0+d2"


@pytest.mark.parametrize(
    "length, level, max_images, message",
    [(4, "image", -1, "at least 5"), (16, "word", -1, "image, sample"), (16, "image", 0, "-1 for no cap")],
)
def test_bad_packing_settings(length, level, max_images, message):
    with pytest.raises(ValueError, match=message):
        packing(length, level, max_images)


def test_images_and_units_must_agree():
    with pytest.raises(ValueError, match="0 images but 1 start-of-image"):
        list(pack([{"input_ids": [BOS, START, 8, 8, 8], "images": [], "id": "x"}], packing(16)))


def test_long_captions_keep_their_image():
    rules = packing(12, "sample")
    (image_first,) = documents([["I", *range(20, 40)]])
    (text_first,) = documents([[*range(20, 40), "I"]])
    (short,) = documents([["I", 20]])
    assert limit_caption(image_first["input_ids"], rules) == [BOS, START, 8, 8, 8, 20, 21, 22, 23, 24, 25, 26]
    assert limit_caption(text_first["input_ids"], rules) == [BOS, 20, 21, 22, 23, 24, 25, START, 8, 8, 8, EOS]
    assert limit_caption(short["input_ids"], rules) == short["input_ids"]


def test_grouped_captions_form_one_document():
    rules = packing(42, "sample")
    (sequence,) = pack(documents([["I", 11], [12, "I"], ["I", 13], [14, "I"], ["I", 15], [16, "I"]]), rules)
    unit = [START, 8, 8, 8]
    grouped = group_captions(sequence, 2, rules, EOS)
    first, second, third = [*unit, 11, 12, *unit], [*unit, 13, 14, *unit], [*unit, 15, 16, *unit]
    assert grouped["input_ids"] == [BOS, *first, EOS, BOS, *second, EOS, BOS, *third, EOS]
    assert grouped["document_starts"] == [0, 0, 12, 12, 24, 24] and grouped["images"] == sequence["images"]
    whole = group_captions(sequence, 8, rules, EOS)["input_ids"]
    assert whole == [BOS, *first, *second, *third, EOS]
    assert sequence["input_ids"].count(BOS) == 6  # unchanged


# ---- mixing ----


def draw(sources, probabilities, stopping, batch_size=1, seed=0):
    return list(Mixture(sources, probabilities, batch_size, torch.Generator().manual_seed(seed), stopping))


@pytest.mark.parametrize("stopping", ["sum", "longest"])
def test_mixing_equals_the_released_order(stopping):
    case = next(case for case in vectors("mixing.json")["cases"] if case["sampling_type"] == stopping)
    assert draw(case["sources"], case["probs"], stopping, seed=case["seed"]) == case["yielded"]


@pytest.mark.parametrize("seed", range(5))
def test_stopping_rules(seed):
    first, second = [f"a{i}" for i in range(30)], [f"b{i}" for i in range(20)]
    assert sorted(draw([first, second], [2, 1], "sum", seed=seed)) == sorted(first + second)

    shortest = draw([first, second], [2, 1], "shortest", seed=seed)
    counts = Counter(name[0] for name in shortest)
    assert counts["a"] == 30 or counts["b"] == 20
    assert len(set(shortest)) == len(shortest)

    longest = draw([first, second], [2, 1], "longest", seed=seed)
    assert set(longest) == set(first + second)
    for letter, source in (
        ("a", first),
        ("b", second),
    ):  # each source in its own order, from the start again and again
        drawn = [name for name in longest if name[0] == letter]
        assert drawn == (source * (len(drawn) // len(source) + 1))[: len(drawn)]


def test_every_micro_batch_is_of_one_source_and_shares_follow_the_probabilities():
    mixed = draw([["a"] * 4000, ["b"] * 4000], [2, 1], "longest", batch_size=4)
    batches = [mixed[i : i + 4] for i in range(0, len(mixed), 4)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert abs(sum(batch[0] == "a" for batch in batches) / len(batches) - 2 / 3) < 0.04


@pytest.mark.parametrize(
    "probabilities, stopping, message",
    [([1], "sum", "2 data sources but 1"), ([1, -1], "sum", "positive"), ([1, 1], "never", "longest, sum, shortest")],
)
def test_bad_mixing_settings(probabilities, stopping, message):
    with pytest.raises(ValueError, match=message):
        draw([["a"], ["b"]], probabilities, stopping)


def test_an_empty_source_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match=r"Data source 1 \(\[\]\) has no usable sample: give data"):
        draw([["a"] * 3, []], [1, 1], "longest", batch_size=4)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stopping", ["sum", "longest", "shortest"])
def test_passes_fill_a_micro_batch_that_one_alone_cannot(number, stopping):
    drawn = draw([list(range(number))], [1], stopping, batch_size=4)
    assert drawn == (list(range(number)) * 4)[:4]
