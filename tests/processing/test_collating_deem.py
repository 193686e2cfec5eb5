# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Label rules, document starts, the three forms of samples and the batch contract."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from deem_fixtures import IMAGE, Q, tiny_config
from deem_fixtures import START as START_OF_IMAGE
from PIL import Image

from modeling_deem.image_states_deem import ImagePlaces, supervised_images
from processing import DeemDataCollator, find_document_starts, make_labels

BOS, EOS, START, SLOT, PAD = 1, 2, 7, 8, 9
TOY = {"bos_token_id": BOS, "start_of_image_token_id": START}


def make_image(color: str = "red", size: tuple[int, int] = (80, 70)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture
def collator(tiny_processor) -> DeemDataCollator:
    return DeemDataCollator(tiny_processor)


def trained_text(batch: dict, collator: DeemDataCollator) -> list[str]:
    return [collator.processor.decode(row[row != -100]) for row in batch["labels"]]


def test_label_vectors(shared_file) -> None:
    vectors = shared_file("vectors/text_labels.json")
    ids = vectors["tokens"]
    for case in vectors["cases"]:
        labels = make_labels(
            torch.tensor(case["text_ids"]),
            torch.tensor(case["attention_mask"]),
            bos_token_id=ids["bos"],
            image_token_id=ids["img"],
            start_of_image_token_id=ids["soi"],
            pad_token_id=ids["pad"],
            prompt_lengths=torch.tensor(case["prompt_offset"]),
            ignore_text_without_image=case["ignore_text_without_image"],
        )
        assert labels[:, 1:].tolist() == case["expected_shifted_labels"], case["name"]


def test_labels_are_the_same_on_either_side_of_the_padding() -> None:
    row = [BOS, 11, 12, START, SLOT, SLOT, 13, 14, EOS]
    sides = []
    for ids, mask in (([*row, PAD, PAD], [1] * 9 + [0, 0]), ([PAD, PAD, *row], [0, 0] + [1] * 9)):
        tensors = torch.tensor([ids]), torch.tensor([mask])
        labels = make_labels(*tensors, image_token_id=SLOT, prompt_lengths=3, **TOY)
        sides.append(labels[tensors[1] == 1].tolist())
    assert sides[0] == sides[1] == [-100, -100, -100, START, -100, -100, 13, 14, EOS]


def test_labels_without_image_in_their_document() -> None:
    row = torch.tensor([[BOS, 11, START, SLOT, 12, EOS, BOS, 13, EOS, BOS, 14, START, SLOT, 15, EOS]])
    labels = make_labels(row, torch.ones_like(row), image_token_id=SLOT, ignore_text_without_image=True, **TOY)
    no = -100
    assert labels.tolist() == [[no, no, START, no, 12, EOS, no, no, no, no, no, START, no, 15, EOS]]


def test_document_starts_against_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (20, 50), generator=generator)
    expected = []
    for row in ids.tolist():
        for column, token in enumerate(row):
            if token == START:
                earlier = [place for place in range(column) if row[place] == BOS]
                expected.append(earlier[-1] if earlier else 0)
    assert find_document_starts(ids, **TOY).tolist() == expected


def test_text_records(collator) -> None:
    samples = [
        {"text": "<image>one<image>", "images": [make_image("red"), make_image("blue")]},
        {"text": "<s>two</s>"},
        {"text": "a <image>: red", "prompt": "a <image>:", "images": [make_image("green")], "dataset": "ignored"},
    ]
    batch = collator(samples)
    assert trained_text(batch, collator) == ["one<|startofimage|></s>", "two</s>", " red</s>"]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == [1 + 5 + 3 + 5 + 1, 1 + 3 + 1, 1 + 2 + 5 + 1 + 4 + 1]
    assert (batch["attention_mask"][1, :5] == 1).all(), "training pads on the right"
    assert (batch["input_ids"][batch["attention_mask"] == 0] == collator.pad_token_id).all()
    assert batch["document_starts"].tolist() == [0, 0, 0]
    assert batch["pixel_values"].shape == batch["target_pixel_values"].shape == (3, 3, 64, 64)
    assert batch["target_pixel_values"][:, :, 0, 0].tolist()[1] == [-1.0, -1.0, 1.0]  # in the order of the text
    keys = {"input_ids", "attention_mask", "labels", "pixel_values", "target_pixel_values", "document_starts"}
    assert set(batch) == keys
    assert {batch[name].dtype for name in keys - {"pixel_values", "target_pixel_values"}} == {torch.int64}


def test_text_only_batch_has_no_image_keys(collator) -> None:
    assert set(collator([{"text": "a"}, {"text": "bc", "images": []}])) == {"input_ids", "attention_mask", "labels"}


def test_training_ids_are_those_of_inference(collator) -> None:
    prompt = "a <image>:"
    batch = collator([{"text": prompt + " red", "prompt": prompt, "images": [make_image()]}])
    inference = collator.processor(text=prompt, images=make_image(), return_tensors="pt")
    length = inference["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == inference["input_ids"][0].tolist()
    assert (batch["labels"][0, :length] == -100).all() and (batch["labels"][0, length:] != -100).all()
    torch.testing.assert_close(batch["pixel_values"], inference["pixel_values"])


def test_messages_train_the_assistant_only(collator) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "image": make_image("red"), "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Drawn: "}, {"type": "image"}]},
    ]  # fmt: skip
    batch = collator([{"messages": messages, "images": [make_image("blue"), make_image("lime")]}])
    assert trained_text(batch, collator) == [" A fox.</s> Drawn: <|startofimage|></s>"]
    colors = [tuple(pixel) for pixel in batch["target_pixel_values"][:, :, 0, 0].tolist()]
    assert colors == [(1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0)]
    ids = collator.processor.apply_chat_template(messages[:1], tokenize=True, return_dict=True)["input_ids"][0]
    assert batch["input_ids"][0, : len(ids)].tolist() == ids
    assert (batch["input_ids"] == 1).sum() == 1


def test_packed_records(collator) -> None:
    start, slot = collator.processor.start_of_image_token_id, collator.processor.image_token_id
    unit = [start, *[slot] * 4]
    ids = [20, *unit, 21, EOS, BOS, 22, *unit, EOS]
    batch = collator([{"input_ids": ids, "images": [make_image()] * 2}, {"text": "<image>", "images": [make_image()]}])
    assert batch["document_starts"].tolist() == [0, 8, 0]
    no = -100
    expected = [20, start, *[no] * 4, 21, EOS, no, 22, start, *[no] * 4, EOS]
    assert batch["labels"][0].tolist() == expected
    given = collator([{"input_ids": ids, "images": [make_image()] * 2, "document_starts": [0, 0]}])
    assert given["document_starts"].tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_places_of_images_are_those_of_the_model(collator, seed) -> None:
    """The collator's rule of documents, and the labels of drawing, against the model's own, on random packed batches."""
    rng = random.Random(seed)
    config, one = tiny_config(), make_image()
    unit = [START_OF_IMAGE, *[IMAGE] * Q]

    def document() -> tuple[list[int], int]:
        pieces = [unit if rng.random() < 0.4 else [rng.randrange(3, 259)] for _ in range(rng.randrange(1, 9))]
        return [BOS, *(token for piece in pieces for token in piece), EOS], pieces.count(unit)

    samples = []
    for _ in range(rng.randrange(1, 5)):
        documents = [document() for _ in range(rng.randrange(1, 5))]
        images = [[one] * count for _, count in documents]
        if rng.random() < 0.5:  # as concatenation gives them
            pairs = zip(documents, images, strict=True)
            samples.append({"samples": [{"input_ids": ids, "images": own} for (ids, _), own in pairs]})
        else:  # as packing cuts them: the first document may have begun in the row before
            ids, own = [token for ids, _ in documents for token in ids], [image for row in images for image in row]
            samples.append({"input_ids": ids[rng.randrange(2) :], "images": own})
        if "input_ids" in samples[-1] and own and rng.random() < 0.5:
            samples[-1]["image_loss_mask"] = [rng.random() < 0.5 for _ in own]
    samples.append({"input_ids": [BOS, 7, *unit, EOS], "images": [one]})  # one image at least
    batch = collator([*samples, {"text": "words"}])
    places = ImagePlaces.of_images(batch["input_ids"], config)
    assert batch["document_starts"].tolist() == places.document_starts.tolist()

    supervised = supervised_images(batch, config)
    wanted = batch.get("image_loss_mask", torch.ones_like(supervised))
    trained = (batch["labels"][places.rows, places.columns] != -100) & (places.columns > 0)
    begins_with_bos = batch["input_ids"][places.rows, places.document_starts] == BOS
    assert torch.equal(supervised[begins_with_bos], (trained & wanted)[begins_with_bos])
    slow = [columns - starts + 1 > 2 for columns, starts in zip(places.columns, places.document_starts, strict=True)]
    assert supervised.tolist() == (torch.tensor(slow) & wanted).tolist()


def test_samples_that_share_a_row(collator) -> None:
    """Tokens, labels and images are those of each alone; each is a document."""
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A fox."},
    ]
    alone = [
        {"text": "<image>ab", "prompt": "<image>a", "images": [make_image()]},
        {"messages": chat, "images": [make_image("blue")], "region_masks": [np.ones((70, 80))]},
        {"text": "<image>", "images": [make_image("lime")], "image_loss_mask": [False]},
    ]
    batch, singles = collator([{"samples": alone, "id": "row"}]), [collator([one]) for one in alone]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles], dim=1)), name
    assert torch.equal(batch["pixel_values"], torch.cat([single["pixel_values"] for single in singles]))
    lengths = [single["input_ids"].shape[1] for single in singles]
    assert batch["document_starts"].tolist() == [0, lengths[0], lengths[0] + lengths[1]]
    assert batch["image_loss_mask"].tolist() == [True, True, False] and batch["region_masks"].shape[0] == 3
    with pytest.raises(ValueError, match=f"Sample row has {sum(lengths)} tokens"):
        DeemDataCollator(collator.processor, max_length=sum(lengths) - 1)([{"samples": alone, "id": "row"}])
    with pytest.raises(ValueError, match="A batch has one mode.*'image_to_text': 1"):
        collator([{"samples": [alone[0], {**alone[1], "mode": "image_to_text"}]}])
    with pytest.raises(ValueError, match="Sample number 0 has none of the keys"):
        collator([{"samples": [alone[0], {"images": []}]}])


def test_modes_set_the_weights(collator) -> None:
    def weights(*modes: str | None) -> dict:
        batch = collator([{"text": "<image>a", "images": [make_image()], "mode": mode} for mode in modes])
        return {name: value for name, value in batch.items() if name.endswith("weight")}

    assert weights(None, "interleaved") == {}
    assert weights("image_to_text", "image_to_text") == {"image_loss_weight": 0.0}
    assert weights("text_to_image") == {"text_loss_weight": 0.0}
    with pytest.raises(ValueError, match=r"'interleaved': 1, 'text_to_image': 2.*Group the samples by mode"):
        weights(None, "text_to_image", "text_to_image")
    with pytest.raises(ValueError, match="'i2t'; expected one of interleaved, image_to_text, text_to_image"):
        weights("i2t")


def test_masks_and_supervision_per_image(collator) -> None:
    whole = {"text": "<image>", "images": [make_image()]}
    region = {"text": "<image><image>", "images": [make_image()] * 2, "region_masks": [None, np.zeros((70, 80))]}
    assert "region_masks" not in collator([whole])
    batch = collator([whole, region, {**whole, "image_loss_mask": [False]}])
    assert batch["region_masks"].mean(dim=(1, 2, 3)).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert batch["image_loss_mask"].tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    "sample, message",
    [
        (
            {"text": "<image>", "images": []},
            "Image features and image tokens do not match: sample x7 has 0 images, but 1",
        ),
        (
            {"text": "a", "images": [make_image()]},
            "Image features and image tokens do not match: sample x7 has 1 images",
        ),
        ({"text": "ab", "prompt": "b"}, "Sample x7: the prompt 'b' does not begin the text"),
        ({"images": []}, "Sample x7 has none of the keys text, messages, input_ids and samples"),
        ({"text": "a", "messages": []}, "Give exactly one"),
        ({"messages": [{"role": "user", "content": "a"}]}, "Sample x7 has nothing to train"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
            "Image features and image tokens do not match: sample x7 has 1 image parts in its messages and 0 images",
        ),
        (
            {"text": "<image>", "images": [make_image()], "region_masks": []},
            "Sample x7 has 0 entries in region_masks for 1",
        ),
        ({"text": "a" * 90}, "Sample x7 has 92 tokens .* max_length is 80"),
        (
            {"text": "<image>", "images": [make_image()], "region_masks": [np.ones((3, 3))]},
            "Region mask 0 is 3 x 3 but its image is 70 x 80",
        ),
    ],
)
def test_bad_samples_are_named(tiny_processor, sample, message) -> None:
    with pytest.raises(ValueError, match=message):
        DeemDataCollator(tiny_processor, max_length=80)([{**sample, "id": "x7"}])


def test_too_many_images_are_named(tiny_processor) -> None:
    collator = DeemDataCollator(tiny_processor, max_images=2)
    three = {"text": "<image>" * 3, "images": [make_image()] * 3, "id": "x7"}
    row = {"samples": [{"text": "<image>", "images": [make_image()]}] * 3, "id": "x7"}
    for sample in (three, row):
        with pytest.raises(ValueError, match="Sample x7 has 3 images, max_images is 2"):
            collator([sample])
    assert collator([{"text": "<image>" * 2, "images": [make_image()] * 2}])["pixel_values"].shape[0] == 2


@pytest.mark.parametrize(
    "sample",
    [
        {"text": "<image>", "images": []},
        {"text": "<image>" * 3, "images": [make_image()] * 3},
        {"text": "a" * 90},
        {"text": "a", "mode": "i2t"},
        {"text": 3},
        {"text": "a", "prompt": ["a"]},
        {"text": "\ud83d"},
        {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]},
        {"text": "a", "images": 3},
        {"text": "a", "images": torch.zeros(2, 3, 8, 8)},
        {"text": "a", "mode": []},
        {"text": "ab", "trained_spans": [(0, 3)]},
        {"text": "ab", "trained_spans": [3]},
        {"text": "<image>", "images": [make_image()], "image_loss_mask": ["no"]},
        {"text": "<image>", "images": [make_image()], "document_starts": [99]},
        {"text": "<image>", "images": [make_image()], "region_masks": 3},
        {"samples": []},
        {"samples": [3]},
        {"messages": 3},
        {"input_ids": [BOS, START_OF_IMAGE, IMAGE, IMAGE, 20, IMAGE, IMAGE], "images": [make_image()]},
        {"input_ids": []},
        {"input_ids": [1, 20, 100_000]},
        {"input_ids": [1, 2.5]},
        {"input_ids": [-1]},
        {"input_ids": torch.tensor([1, 7, 8])[:0]},
        {"text": "<image>", "images": [make_image()], "region_masks": [np.ones((3, 3))]},
        {"text": "<image>", "images": [make_image(size=(400, 3))]},
        {"text": "<image>", "images": [Image.new("F", (8, 8))]},
        {"text": "<image>", "images": ["no/such/file.jpg"]},
        {"text": "<image>", "images": [np.full((8, 8, 3), np.nan)]},
        {"messages": [{"role": "system", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
    ],
)
def test_a_sample_is_checked_before_it_is_in_a_batch(tiny_processor, sample) -> None:
    collator = DeemDataCollator(tiny_processor, max_length=80, max_images=2)
    with pytest.raises(ValueError, match="[Ss]ample x7"):
        collator.check({**sample, "id": "x7"})
    with pytest.raises(ValueError, match="[Ss]ample number 0|could not be|Could not|Region mask|An (image|array) of"):
        collator([sample])


@pytest.mark.parametrize("sample", [None, 3, "text", ["a"]])
def test_what_is_no_sample_is_refused_in_words(collator, sample) -> None:
    for refuse in (collator.check, lambda sample: collator([sample])):
        with pytest.raises(ValueError, match="A sample is .*; expected a dict"):
            refuse(sample)


def test_sound_samples_pass_the_check(tiny_processor) -> None:
    collator = DeemDataCollator(tiny_processor, max_length=80, max_images=2)
    turned = make_image()
    turned.getexif()[0x0112] = 6
    for sample in (
        {
            "text": "<image>a",
            "images": [turned],
            "region_masks": [np.ones((80, 70))],
        },  # masks lie on the upright image
        {"text": "words"},
        {"samples": [{"text": "<image>a", "images": [make_image()]}, {"text": "b"}]},
    ):
        before = copy.deepcopy({name: value for name, value in sample.items() if name == "text"})
        collator.check(sample)
        collator([sample])
        assert before.items() <= sample.items()


def test_tokenizer_must_tell_bos_from_eos(tiny_processor) -> None:
    tiny_processor.tokenizer.bos_token = "</s>"
    with pytest.raises(ValueError, match="bos and eos different"):
        DeemDataCollator(tiny_processor)


def test_samples_stay_unchanged(collator) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]
    samples = [
        {"messages": messages, "images": [make_image()]},
        {"text": "<image>a", "images": [make_image()], "region_masks": [np.ones((70, 80))]},
        {"input_ids": [BOS, 20, EOS]},
    ]
    before = copy.deepcopy(samples)
    collator(samples)
    assert (samples[1].pop("region_masks")[0] == before[1].pop("region_masks")[0]).all()
    assert samples == before


def test_targets_can_be_left_out(tiny_processor) -> None:
    batch = DeemDataCollator(tiny_processor, return_targets=False)([{"text": "<image>", "images": [make_image()]}])
    assert "target_pixel_values" not in batch


def test_example_in_the_docstring_is_true(tiny_processor) -> None:
    code, printed = [], []
    example = re.search(r"```python\n(.*?)```", DeemDataCollator.__doc__, re.DOTALL).group(1)
    for line in (line[4:] for line in example.splitlines()):
        (code if line.startswith((">>> ", "... ")) else printed).append(line.removeprefix(">>> ").removeprefix("... "))
    lines: list[str] = []
    names = {
        "processor": tiny_processor,
        "DeemDataCollator": DeemDataCollator,
        "red": make_image("red"),
        "blue": make_image("blue"),
        "print": lambda *values: lines.extend(" ".join(map(str, values)).splitlines()),
    }
    exec("\n".join(code), names)  # the example is ours
    assert [line.rstrip() for line in lines] == [line.rstrip() for line in printed if line.strip()]


@pytest.mark.parametrize("images", [[[]], [[Image.new("RGB", (8, 8))]], [None]])
def test_images_of_a_sample_that_are_no_list_of_images_are_named(tiny_processor, images: list) -> None:
    with pytest.raises(ValueError, match=r"Sample card has list .* for images; expected a list of images"):
        DeemDataCollator(tiny_processor)([{"id": "card", "text": "A <image>", "images": images}])
