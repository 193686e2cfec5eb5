# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a model answers about scenes of the world, whether it is right, and how sure its language model is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from recipes.evaluation.answers import bare
from recipes.generation.prompt import make_prompt
from recipes.generation.tasks import batches, make_inputs
from recipes.synthetic.scenes import Scene

ASKED = {  # of the main object, or of the whole image
    "kind": "What is the main object?",
    "color": "What color is the main object?",
    "size": "What size is the main object?",
    "position": "Where is the main object?",
    "count": "How many objects are there?",
    "background": "What color is the background?",
}
MAX_NEW_TOKENS = 8


@dataclass
class Said:
    """An answer: its text, whether it is right, and the log-probability of its tokens, as a sum."""

    text: str
    right: bool
    log_probability: float


def questions_of(scene: Scene, attributes: Sequence[str] = tuple(ASKED)) -> dict[str, tuple[str, str]]:
    """Return question and right answer by attribute."""
    truth = {one["question"]: one["answer"] for one in scene.questions()}
    return {name: (ASKED[name], truth[ASKED[name]]) for name in attributes}


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    asked: Sequence[tuple[str, str]],
    batch_size: int = 50,
) -> list[Said]:
    """Answer one question about each image, greedily, in the form of recipes/evaluate.py.

    Args:
        asked: question and right answer of each image.
    """
    said = []
    for pictures, pairs in batches(batch_size, images, asked):
        prompts = [make_prompt(processor, "question", question, 1) for question, _ in pairs]
        inputs = make_inputs(model, processor, prompts, [[picture] for picture in pictures])
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "num_beams": 1}
        found = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        tokens = found.sequences[:, inputs["input_ids"].shape[1] :]
        scores = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)  # [n, new]
        ended = (tokens == processor.tokenizer.eos_token_id).long()
        written = ended.cumsum(1) - ended == 0  # up to the eos, which counts
        sums = torch.where(written, scores, 0.0).sum(1).tolist()
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        rows = zip(texts, pairs, sums, strict=True)
        said += [Said(text.strip(), bare(text) == bare(right), total) for text, (_, right), total in rows]
    return said
