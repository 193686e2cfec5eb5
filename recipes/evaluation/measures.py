# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The table of measures: what `recipes/evaluate.py` can measure.

A measure takes a `Subject` and a number of images and returns figures by name. A new one is a function in a file of its
own and a line in `MEASURES`; its option `--num_<name>` follows from the table.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, ProcessorMixin

from recipes.data.samples import IMAGE, content
from recipes.evaluation.figures import (
    caption_figure,
    color_figure,
    consistency_figure,
    drawing_figure,
    drawn_kind_figure,
    share_right,
)
from recipes.evaluation.judge import KindJudge
from recipes.evaluation.scenes import color_question, one_color_scenes, several_object_scenes
from recipes.evaluation.subject import Subject
from recipes.generation.checkpoint import load_for_inference
from recipes.generation.prompt import make_prompt
from recipes.generation.tasks import batches
from recipes.prompts import REGION_INSTRUCTIONS
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import first_color

Figures = dict[str, dict[str, Any]]


def caption_figures(subject: Subject, number: int) -> Figures:
    """Measure whether captions name the main object's kind."""
    scenes = subject.unseen(number)
    prompts = [make_prompt(subject.processor, "caption", num_images=1)] * number
    captions = subject.write(prompts, [[scene.image] for scene in scenes], max_new_tokens=16)
    return {"caption": caption_figure(scenes, captions)}


def question_figures(subject: Subject, number: int) -> Figures:
    """Measure whether questions about colors are answered exactly, one per image."""
    scenes = subject.unseen(number)
    prompts = [make_prompt(subject.processor, "question", color_question(scene)["question"], 1) for scene in scenes]
    answers = subject.write(prompts, [[scene.image] for scene in scenes], max_new_tokens=6)
    return {"color": color_figure(scenes, answers)}


def consistency_figures(subject: Subject, number: int) -> Figures:
    """Measure how far the consistency loss lies below the reference's; nothing without a reference."""
    if subject.reference is None:
        return {}
    scenes, options = subject.unseen(number), (subject.batch_size, subject.seed)
    loss = consistency_loss(subject.model, subject.processor, scenes, *options)
    reference = consistency_loss(*load_for_inference(subject.reference), scenes, *options)
    return {"consistency": consistency_figure(loss, reference, number)}


@torch.inference_mode()
def consistency_loss(
    model: PreTrainedModel, processor: ProcessorMixin, scenes: Sequence[Scene], batch_size: int = 50, seed: int = 0
) -> float:
    """Return the mean consistency loss over `scenes`; two models get the same noise and timesteps for the same seed."""
    generator = torch.Generator(model.device).manual_seed(seed)
    total = 0.0
    for (batch,) in batches(batch_size, scenes):
        images = [scene.image for scene in batch]
        inputs = processor.image_processor(images, return_targets=True, return_tensors="pt").to(model.device)
        total += model.consistency_loss(**inputs, generator=generator).item() * len(batch)
    return total / len(scenes)


def drawing_figures(subject: Subject, number: int) -> Figures:
    """Measure whether images drawn from captions with one object show its color, and its kind to a judge.

    The judge is the encoder of the reference, where there is one; else the model's own, which its drawings have trained.
    """
    scenes = one_color_scenes(subject.world, number)
    captions = [scene.caption("medium") for scene in scenes]
    drawn = subject.draw([make_prompt(subject.processor, subject.draw_template, caption) for caption in captions])
    judging = load_for_inference(subject.reference) if subject.reference else (subject.model, subject.processor)
    judge = KindJudge(*judging, subject.world)
    real = share_right("", None, judge.name([scene.image for scene in scenes]), [scene.main.kind for scene in scenes])
    kinds = drawn_kind_figure(captions, judge.name(drawn), real["value"])
    return {"drawing": drawing_figure(captions, drawn), "drawn_kind": kinds}


def region_figures(subject: Subject, number: int) -> Figures:
    """Measure whether descriptions of marked objects name their color first, and with another object's mask instead.

    Scenes have two objects or more, and no color occurs twice in an image: with another object's mask the share must be
    near 0 if the mask is what decides.
    """
    scenes = several_object_scenes(subject.world, number)
    chosen = [scene.index % len(scene.objects) for scene in scenes]
    others = [(index + 1) % len(scene.objects) for scene, index in zip(scenes, chosen, strict=True)]
    truths = [scene.objects[index].color for scene, index in zip(scenes, chosen, strict=True)]
    figures = {}
    for name, what, marked in (
        ("region", "marked objects whose color is named", chosen),
        ("region_wrong_mask", "the same with another object's mask", others),
    ):
        said = describe_regions(subject, scenes, marked)
        figures[name] = share_right(what, None, [first_color(text) for text in said], truths)
    return figures


def describe_regions(subject: Subject, scenes: Sequence[Scene], marked: Sequence[int]) -> list[str]:
    """Return what the model says of one object of each scene, asked as in the region stage: image, image with mask.

    Args:
        marked: number of the object, for each scene.
    """
    request = content(IMAGE, f" {REGION_INSTRUCTIONS['refcoco']} ", IMAGE)
    prompt = subject.processor.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True)
    images = [[scene.image] * 2 for scene in scenes]
    masks = [[None, scene.objects[index].mask] for scene, index in zip(scenes, marked, strict=True)]
    return subject.write([prompt] * len(scenes), images, region_masks=masks, max_new_tokens=12)


class Measure(NamedTuple):
    """A line of the table: the function, how many images it takes by default, and what the option says of them."""

    figures: Callable[[Subject, int], Figures]
    number: int
    help: str


MEASURES = {
    "captions": Measure(caption_figures, 500, "Images to caption."),
    "questions": Measure(question_figures, 500, "Images to ask about, one question each."),
    "consistency": Measure(consistency_figures, 500, "Images for the consistency loss."),
    "drawings": Measure(drawing_figures, 120, "Captions to draw; as many of each color."),
    "regions": Measure(region_figures, 0, "Images with a marked object to describe; for models of the region stage."),
}
