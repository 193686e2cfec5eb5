# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Ask a model in training questions from its data: the share that it answers as the data does."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from recipes.prompts import ANSWER_BEGIN, CAPTION_BEGIN

MOST_WORDS = 8  # of an answer that can be right or wrong as a whole


def is_question(sample: dict[str, Any]) -> bool:
    """Return whether a sample is a dialogue that ends in a short answer in words, and not in a caption."""
    if "messages" not in sample or sample.get("mode") == "text_to_image":
        return False
    answer = answer_of(sample)
    return 0 < len(answer.split()) <= MOST_WORDS and not answer.startswith(CAPTION_BEGIN)


def answer_of(sample: dict[str, Any]) -> str:
    """Return what the assistant says last, without images."""
    said = sample["messages"][-1]["content"]
    return said if isinstance(said, str) else "".join(item.get("text", "") for item in said)


def normalized(answer: str) -> str:
    """Return an answer for comparison: lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(" .")


def bare(answer: str) -> str:
    """Return a normalized answer without `ANSWER_BEGIN`, which may be part of the prompt."""
    return normalized(answer).removeprefix(normalized(ANSWER_BEGIN)).strip()


@torch.no_grad()
def share_answered(
    model: nn.Module, processor: ProcessorMixin, samples: Iterable[dict[str, Any]], max_new_tokens: int = 16
) -> float:
    """Return the share of questions whose greedy answer is the right one, asked in the form saved with the processor.

    Every process must call this with the same samples.

    Args:
        samples: dialogues as the readers give them, regions included.
    """
    right = []
    for sample in samples:
        prompt = processor.apply_chat_template(sample["messages"][:-1], add_generation_prompt=True)
        regions = {"region_masks": sample["region_masks"]} if sample.get("region_masks") else {}
        inputs = processor(text=[prompt], images=sample["images"], return_tensors="pt", **regions)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right.append(bare(said) == bare(answer_of(sample)))
    return sum(right) / len(right)
