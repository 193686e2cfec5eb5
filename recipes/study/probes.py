# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Linear probes: what frozen image tokens tell about an image, learned from few labelled ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import BACKGROUNDS, TEXTURES

CAPTIONED = ("kind", "number")
OMITTED = ("color", "orientation", "size", "position", "background", "texture")
PENALTIES = tuple(10.0**power for power in range(-3, 5))


def label(scene: Scene, attribute: str) -> str | None:
    """Return what a probe is to tell of an image, None where it has no answer that was ever labelled."""
    if attribute == "number":
        return str(len(scene.objects))
    if attribute == "background":
        return scene.background if scene.background in BACKGROUNDS else None
    if attribute == "texture":
        return scene.texture if scene.texture in TEXTURES else None
    return getattr(scene.main, attribute)


@torch.inference_mode()
def tokens_of(
    model: DeemForConditionalGeneration, processor: DeemProcessor, images: Sequence[Image.Image], size: int = 100
) -> Tensor:
    """Return the image tokens, (N, Q, P), on the CPU."""
    found = []
    for start in range(0, len(images), size):
        pixels = processor.image_processor(list(images[start : start + size]), return_tensors="pt")["pixel_values"]
        found.append(model.get_image_features(pixels.to(model.device), return_dict=True).image_tokens.cpu())
    return torch.cat(found)


class Probe:
    """A ridge regression onto one-hot labels from standardized vectors; its penalty is the best of leave-one-out.

    Args:
        vectors: (N, W) of the labelled images.
        labels: N of them; those that are None are left out.
    """

    def __init__(self, vectors: Tensor, labels: Sequence[str | None]) -> None:
        kept = [number for number, one in enumerate(labels) if one is not None]
        self.classes = sorted({labels[number] for number in kept})
        known = vectors[kept].double()
        self.mean, self.deviation = known.mean(0), known.std(0).clamp(min=1e-6)
        rows = self._standard(known)
        right = torch.tensor([self.classes.index(labels[number]) for number in kept])
        truth = F.one_hot(right, len(self.classes)).double()
        self.base = truth.mean(0)
        left, values, across = torch.linalg.svd(rows, full_matrices=False)
        inner, best = left.T @ (truth - self.base), -1.0
        for penalty in PENALTIES:
            shrunk = values.square() / (values.square() + penalty * len(kept))
            hat = (left.square() * shrunk).sum(1, keepdim=True) + 1 / len(kept)
            fitted = left @ (shrunk[:, None] * inner) + self.base
            without = truth - (truth - fitted) / (1 - hat).clamp(min=1e-6)  # as if each had not been there
            share = float((without.argmax(1) == right).double().mean())
            if share > best:
                best = share
                self.weights = across.T @ ((values / (values.square() + penalty * len(kept)))[:, None] * inner)

    def _standard(self, vectors: Tensor) -> Tensor:
        return (vectors.double() - self.mean) / self.deviation

    def scores(self, vectors: Tensor, labels: Sequence[str | None]) -> list[float]:
        """Return 1 for each image that is told rightly, else 0; images without label are left out."""
        found = (self._standard(vectors) @ self.weights + self.base).argmax(1).tolist()
        pairs = zip(found, labels, strict=True)
        return [float(self.classes[number] == one) for number, one in pairs if one is not None]
