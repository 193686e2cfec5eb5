# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Judges of RobustVQA: what takes images for which class. A two-tower model, an image classifier, or any function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor

RULES = ("released", "clean")
Judge = Callable[[Sequence[Image.Image]], list[str]]  # images -> the names of the classes they are taken for
RELEASED_PROMPT, CLEAN_PROMPT = "A photo of a {name}", "a photo of a {name}"


def plain_name(name: str) -> str:
    """Return a class's name for comparison: the first of several, lower case, spaces for underscores."""
    return name.split(",")[0].replace("_", " ").strip().lower()


def nearest_class(image_features: torch.Tensor, text_features: torch.Tensor, rule: str) -> torch.Tensor:
    """Return the number of the class (N,) whose text lies nearest to each image.

    Args:
        image_features: (N, D).
        text_features: (C, D), one per class.
        rule: "released" normalizes the images' features alone, so that longer text vectors win; "clean" both.

    Raises:
        ValueError: for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown rule {rule!r}; give one of {', '.join(RULES)}.")
    images = nn.functional.normalize(image_features.float(), dim=-1)
    texts = text_features.float()
    return (images @ (texts if rule == "released" else nn.functional.normalize(texts, dim=-1)).T).argmax(dim=-1)


class TwoTowerJudge:
    """A model of transformers with `get_image_features` and `get_text_features`, asked with a prompt per class.

    Under the released rule images are squashed to a square and names keep their underscores.
    """

    def __init__(self, name: str, classes: Sequence[str], rule: str) -> None:
        self.model = AutoModel.from_pretrained(name).eval()
        self.processor = AutoProcessor.from_pretrained(name)
        self.classes, self.rule = list(classes), rule
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        if rule == "released":
            prompts = [RELEASED_PROMPT.format(name=one) for one in classes]
        else:
            prompts = [CLEAN_PROMPT.format(name=one.replace("_", " ")) for one in classes]
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        found = []
        for start in range(0, len(prompts), 100):
            texts = prompts[start : start + 100]
            inputs = self.processor(text=texts, padding=padding, truncation=True, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                found.append(_pooled(self.model.get_text_features(**inputs)))
        self.text_features = torch.cat(found)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the nearest class of each image."""
        if self.rule == "released":
            side = image_side(self.processor.image_processor)
            images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in images]
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.device)
        features = _pooled(self.model.get_image_features(**inputs))
        return [self.classes[number] for number in nearest_class(features, self.text_features, self.rule).tolist()]


class ClassifierJudge:
    """An image classifier of transformers; its labels are matched with the classes by name, or by number where the
    classes are as many as its labels and have other names."""

    def __init__(self, name: str, classes: Sequence[str]) -> None:
        self.model = AutoModelForImageClassification.from_pretrained(name).eval()
        self.processor = AutoImageProcessor.from_pretrained(name)
        labels = [self.model.config.id2label[number] for number in range(self.model.config.num_labels)]
        known = {plain_name(one): one for one in classes}
        named = [known.get(plain_name(label)) for label in labels]
        if any(one is None for one in named) and len(labels) == len(classes):
            named = list(classes)
        if not any(named):
            raise ValueError(
                f"None of the labels of {name} ({', '.join(labels[:3])}, ...) is a class of the images "
                f"({', '.join(classes[:3])}, ...). Give --class_names in the order of its labels."
            )
        self.names = [one or label for one, label in zip(named, labels, strict=True)]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the first label of each image."""
        inputs = self.processor(images=list(images), return_tensors="pt")
        return [self.names[number] for number in self.model(**inputs).logits.argmax(-1).tolist()]


def load_judge(name: str, classes: Sequence[str], rule: str) -> Judge:
    """Return a judge: a folder or Hub id of transformers, or `module:function`.

    A function is called with the classes' names and returns the judge.

    Raises:
        ValueError: there is no such judge, or it has nothing to do with the classes.
    """
    if rule not in RULES:
        raise ValueError(f"Unknown rule {rule!r}; give one of {', '.join(RULES)}.")
    module, _, function = name.rpartition(":")
    if module and module.replace(".", "").replace("_", "").isalnum():
        try:
            return getattr(importlib.import_module(module), function)(list(classes))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"No judge {name!r}: {error}. Give module:function, a folder or a Hub id.") from error
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"No judge to load at {name!r}: {error}") from error
    if any(kind.endswith("ForImageClassification") for kind in config.architectures or ()):
        return ClassifierJudge(name, classes)
    return TwoTowerJudge(name, classes, rule)


def _pooled(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def image_side(image_processor: Any) -> int:
    """Return the side of the square images that an image processor gives its model, in pixels."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    return int(size.get("height") or size["shortest_edge"])
