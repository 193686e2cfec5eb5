# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Two-tower models of transformers (CLIP, SigLIP, SigLIP2): features of images and texts, and which image fits a text.

The vision tower can be replaced by another of the same shape, as a refined one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

from recipes.evaluation.answering import Answer, Question
from recipes.evaluation.benchmark import Request

WHAT = "a model with get_image_features and get_text_features, as CLIP, SigLIP and SigLIP2 of transformers"


def load_two_towers(
    name: str | Path, encoder: str | Path | None = None, dtype: str = "auto", device: str | torch.device | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a two-tower model and its processor for inference.

    Args:
        name: folder or Hub id.
        encoder: folder or Hub id whose vision tower replaces the model's own: a vision model alone, or two towers.
        dtype: "auto" for that of the weights, or a name of torch's.
        device: the GPU if there is one, by default.

    Raises:
        ValueError: there is nothing to load, the model is of another kind, or the encoder has another shape.
    """
    try:
        model = AutoModel.from_pretrained(name, dtype=dtype)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"No two-tower model to load at {str(name)!r}: expected {WHAT}. It says: {error}") from error
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"{str(name)!r} is a {type(model).__name__}: expected {WHAT}.")
    if encoder is not None:
        replace_vision_tower(model, encoder)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


def replace_vision_tower(model: PreTrainedModel, encoder: str | Path) -> None:
    """Give a two-tower model the weights of another vision tower, and its projection where it comes with one.

    Raises:
        ValueError: there is no such encoder, or its weights have other names or shapes.
    """
    try:
        other = AutoModel.from_pretrained(encoder, dtype=model.dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"No vision encoder to load at {str(encoder)!r}. It says: {error}") from error
    own = model.vision_model
    wanted = {name: tuple(value.shape) for name, value in own.state_dict().items()}
    given = getattr(other, "vision_model", other).state_dict()
    given = {name: value for name, value in given.items() if name in wanted or not name.startswith("head.")}
    found = {name: tuple(value.shape) for name, value in given.items()}
    if found != wanted:
        odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ValueError(
            f"The vision encoder at {str(encoder)!r} does not fit {type(model).__name__}: {len(odd)} weights differ, as "
            f"{odd[0]}: {found.get(odd[0])} instead of {wanted.get(odd[0])}. Give one that was refined from this model."
        )
    own.load_state_dict(given)
    projection = getattr(other, "visual_projection", None)
    if projection is not None and projection.weight.shape == model.visual_projection.weight.shape:
        model.visual_projection.load_state_dict(projection.state_dict())


class TwoTowers:
    """Tells which of several images fits a text best.

    Args:
        kept_images: features of so many images are kept for questions to come; 0 keeps none.

    Attributes:
        encoded: number of images that were encoded.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, kept_images: int = 64) -> None:
        self.model, self.processor, self.kept_images = model, processor, kept_images
        self.encoded = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def alone(self) -> "TwoTowers":
        """Return one that encodes every image anew."""
        return TwoTowers(self.model, self.processor, kept_images=0)

    def prompt(self, request: Request) -> str:
        """Return the text of a request."""
        return "".join(str(piece) for piece in request.pieces if isinstance(piece, str)).strip()

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], **options: Any) -> list[Answer]:
        """Return, for each question, the number of the image (from 1) that fits its text best, as text.

        `option_scores` of the answer are the shares of the images, softmax of the scaled cosines. A later image wins over
        an earlier one of the same share.
        """
        images = self._images(questions)
        texts = self.text_features([question.prompt for question in questions])
        answers = []
        for text, question in zip(texts, questions, strict=True):
            shown = torch.stack([images[name] for name in question.image_names])
            shares = (self.model.logit_scale.float().exp() * (shown @ text)).softmax(0).tolist()
            best = max(range(len(shares)), key=lambda number: (shares[number], number))
            answers.append(Answer(str(best + 1), [], {"option_scores": shares}))
        return answers

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the features (N, D) of images, float32 of length 1."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return _unit(self.model.get_image_features(**inputs))

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the features (N, D) of texts, float32 of length 1; texts that are too long are cut."""
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        longest = getattr(self.model.config.text_config, "max_position_embeddings", None)
        inputs = self.processor(
            text=list(texts), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        )
        return _unit(self.model.get_text_features(**inputs.to(self.model.device)))

    def _images(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Return the features of all images of the questions by name; each is encoded once."""
        named = {
            name: image
            for question in questions
            for name, image in zip(question.image_names, question.images, strict=True)
        }
        new = {name: image for name, image in named.items() if name not in self._kept}
        if new:
            self._kept.update(zip(new, self.image_features(list(new.values())), strict=True))
            self.encoded += len(new)
        found = {name: self._kept[name] for name in named}
        for name in named:
            self._kept.move_to_end(name)
        while len(self._kept) > self.kept_images:
            self._kept.popitem(last=False)
        return found


def _unit(output: Any) -> torch.Tensor:
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return nn.functional.normalize(features.float(), dim=-1)
