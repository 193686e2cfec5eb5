# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What turns images into features for distances of image sets: FID's Inception, any encoder, two towers, any function."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from recipes.evaluation.inception import USUAL_DIGEST, load_inception
from recipes.evaluation.judges import image_side
from recipes.evaluation.predictions import model_digests
from recipes.evaluation.two_towers import TwoTowers, load_two_towers

Features = np.ndarray  # (N, D) float32
RELEASED_SIDE = 64  # the release makes images so small before it takes Inception's features


class Extractor:
    """Makes features of images.

    Attributes:
        name: as the user calls it.
        kind: "inception", "encoder", "towers" or "function".
        facts: what the features depend on, for the results.
    """

    kind = "function"

    def __init__(self, name: str, function: Callable[[Sequence[Image.Image]], Any], facts: dict[str, Any]) -> None:
        self.name, self.function = name, function
        self.facts = {"kind": self.kind} | facts

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> dict[str, Features]:
        """Return features by the rule that they were made by, "" for the only one."""
        return {"": _array(self.function(images), len(images))}

    def texts(self, texts: Sequence[str]) -> Features | None:
        """Return features of texts, None where the extractor has none."""
        return None


class InceptionExtractor(Extractor):
    """FID's Inception: images at their size, and at 64 pixels as the release has them."""

    kind = "inception"

    def __init__(self, name: str, file: str | Path, device: torch.device) -> None:
        model, sha = load_inception(file)
        self.model, self.device = model.to(device), device
        facts = {
            "sha256": sha,
            "usual_file": sha.startswith(USUAL_DIGEST),
            "resize": "bilinear to 299, not antialiased",
        }
        super().__init__(name, self.read, facts)

    def read(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the features (N, 2048); images may be of different sizes."""
        values = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device) / 255 for image in images]
        resize = {"size": (299, 299), "mode": "bilinear", "align_corners": False}
        return self.model(torch.cat([torch.nn.functional.interpolate(one, **resize) for one in values]))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> dict[str, Features]:
        """Return features of the images as they are, and under "released_64px" of small ones."""
        small = [image.resize((RELEASED_SIDE, RELEASED_SIDE), Image.Resampling.BICUBIC) for image in images]
        found = {"": images, f"released_{RELEASED_SIDE}px": small}
        return {rule: _array(self.read(given), len(images)) for rule, given in found.items()}


class EncoderExtractor(Extractor):
    """Any vision encoder that AutoModel loads; images are squashed to its side, bicubic, as FD-DINOv2 has it."""

    kind = "encoder"

    def __init__(self, name: str, where: str, device: torch.device) -> None:
        self.model = AutoModel.from_pretrained(where).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(where)
        self.side = image_side(self.processor)
        facts = {"model": model_digests(where), "resize": f"bicubic to {self.side}, squashed"}
        super().__init__(name, self.read, facts)

    def read(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the pooled features (N, D), or the mean of the last states where the model pools none."""
        inputs = _squashed(self.processor, images, self.side).to(self.model.device)
        output = self.model(**inputs)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(1) if pooled is None else pooled).flatten(1)


class TowersExtractor(Extractor):
    """A two-tower model: image features as above, and features of the captions."""

    kind = "towers"

    def __init__(self, name: str, where: str, device: torch.device) -> None:
        self.towers = TwoTowers(*load_two_towers(where, device=device))
        self.side = image_side(self.towers.processor.image_processor)
        facts = {"model": model_digests(where), "resize": f"bicubic to {self.side}, squashed"}
        super().__init__(name, self.read, facts)

    def read(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the features (N, D), of length 1."""
        return self.towers.image_features([_squash(image, self.side) for image in images])

    def texts(self, texts: Sequence[str]) -> Features:
        """Return the features of captions, of length 1."""
        return _array(self.towers.text_features(texts), len(texts))


def load_extractor(name: str, where: str, device: torch.device) -> Extractor:
    """Return an extractor: a file of Inception's weights, a folder or Hub id of transformers, or `module:function`.

    A function takes images and returns (N, D) features.

    Raises:
        ValueError: there is none of these, or it gives no features.
    """
    if Path(where).is_file() or where.endswith((".pth", ".pt")):
        return InceptionExtractor(name, where, device)
    module, _, function = where.rpartition(":")
    if module and module.replace(".", "").replace("_", "").isalnum():
        try:
            return Extractor(name, getattr(importlib.import_module(module), function), {"function": where})
        except (ImportError, AttributeError) as error:
            raise ValueError(f"No extractor {where!r}: {error}. Give module:function.") from error
    try:
        towers = hasattr(AutoModel.from_pretrained(where), "get_text_features")
        return (TowersExtractor if towers else EncoderExtractor)(name, where, device)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No extractor to load at {where!r}: expected a file of Inception's weights, a vision encoder or two-tower "
            f"model of transformers, or module:function. It says: {error}"
        ) from error


def load_extractors(given: Sequence[str], device: torch.device) -> list[Extractor]:
    """Return the extractors of `NAME=WHERE` values. Raises ValueError for a value of another form, or a name twice."""
    pairs = [value.partition("=") for value in given]
    names = [name for name, _, _ in pairs]
    if bad := [name for name, _, where in pairs if not where or not name.replace("_", "").isalnum()]:
        raise ValueError(f"--extractors takes NAME=WHERE, with names of letters, digits and _; got {bad[0]!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"--extractors names an extractor twice: {', '.join(names)}.")
    return [load_extractor(name, where, device) for name, _, where in pairs]


def _squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _squashed(processor: Any, images: Sequence[Image.Image], side: int) -> Any:
    """Return the inputs of squashed images, normalized by the processor and not resized again."""
    small = [_squash(image, side) for image in images]
    return processor(images=small, do_resize=False, do_center_crop=False, return_tensors="pt")


def _array(features: Any, number: int) -> Features:
    found = features.float().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
    if found.ndim != 2 or len(found) != number:
        raise ValueError(f"An extractor gives (N, D) features; got {found.shape} for {number} images.")
    return found.astype(np.float32)
