# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Steps between a reader and the stream: images mirrored, dialogues cut to a length, texts tokenized."""

import random
from typing import Any

from PIL import Image, ImageOps
from transformers import ProcessorMixin

from processing import DeemDataCollator
from processing.image_reading_deem import upright
from recipes.data.faults import BadSample


def tokenize(sample: dict[str, Any], processor: ProcessorMixin) -> dict[str, Any]:
    """Tokenize a text sample to a document for packing: bos, tokens with every image expanded, eos."""
    tokenizer = processor.tokenizer
    input_ids = tokenizer(processor.expand_image_tokens(sample["text"]), add_special_tokens=False)["input_ids"]
    return {
        "input_ids": [tokenizer.bos_token_id, *input_ids, tokenizer.eos_token_id],
        "images": sample["images"],
        "id": sample["id"],
    }


def count_tokens(sample: dict[str, Any], processor: ProcessorMixin) -> int:
    """Return the number of tokens that the collator makes of a sample.

    Raises:
        BadSample: for a mask of another size than its image.
        ValueError: for whatever else the collator refuses.
    """
    for image, mask in zip(sample.get("images") or (), sample.get("region_masks") or (), strict=False):
        if mask is not None and mask.shape != upright(image).size[::-1]:
            raise BadSample("region mask of another size than its image", sample["id"])
    return len(DeemDataCollator(processor, return_targets=False).encode(sample)["input_ids"])


def mirrored(image: Image.Image) -> Image.Image:
    """Exchange left and right. The image is turned upright first: with its EXIF orientation kept, one that lies on its
    side would be upside down after the image processor turns it."""
    return ImageOps.mirror(upright(image))


def flip_images(sample: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Mirror each image with probability 0.5, before both of its sizes are made, so that they agree."""
    return {**sample, "images": [mirrored(image) if rng.random() < 0.5 else image for image in sample["images"]]}


def limit_rounds(sample: dict[str, Any], processor: ProcessorMixin, max_length: int) -> dict[str, Any]:
    """Leave out the last rounds of a dialogue, images included, until it fits into `max_length` tokens.

    Raises:
        BadSample: if not even the first round fits, or the sample is no dialogue and does not fit.
    """
    messages = sample.get("messages")
    if messages is None:
        if len(tokenize(sample, processor)["input_ids"]) > max_length:
            raise BadSample("longer than max_length", sample["id"])
        return sample
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    for end in reversed(ends):
        kept = messages[:end]
        text = processor.apply_chat_template(kept, tokenize=False)
        ids = processor.tokenizer(processor.expand_image_tokens(text), add_special_tokens=False)["input_ids"]
        if len(ids) <= max_length:
            break
    else:
        raise BadSample("longer than max_length", sample["id"])
    if end == ends[-1]:
        return sample
    items = [item for message in kept if not isinstance(message["content"], str) for item in message["content"]]
    number = sum(item["type"] == "image" for item in items)
    cut = {name: sample[name][:number] for name in ("images", "region_masks") if sample.get(name) is not None}
    return {**sample, "messages": kept, **cut}
