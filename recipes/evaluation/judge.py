# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A judge of drawn images: which kind of object a vision encoder recognizes in an image with one object."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from recipes.generation.tasks import batches
from recipes.synthetic.scenes import World
from recipes.synthetic.vocabulary import KINDS


class KindJudge:
    """A linear classifier on the pooled vectors of a model's vision encoder, fitted to real images of the world.

    Of a model from before its training as DEEM the encoder has never met the denoiser, so that no drawing can please it but
    by its shape.

    Args:
        world: its first `number` scenes of training, with one object each, are what is fitted.
        number: of scenes.
        penalty: of the ridge regression, per scene.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, world: World, number: int = 600, penalty: float = 0.01
    ) -> None:
        self.tower, self.image_processor = model.model.vision_tower, processor.image_processor
        single = World(world.seed, world.size, world.shifted, max_objects=1)
        scenes = [single.scene(index) for index in range(number)]
        vectors = self.encode([scene.image for scene in scenes])  # [N, W]
        self.mean, self.deviation = vectors.mean(0), vectors.std(0).clamp(min=1e-6)
        rows = self.standardized(vectors)
        right = F.one_hot(torch.tensor([KINDS.index(scene.main.kind) for scene in scenes]), len(KINDS)).to(rows)
        damped = rows.T @ rows + penalty * number * torch.eye(rows.shape[1], device=rows.device)
        self.weights = torch.linalg.solve(damped, rows.T @ right)  # [W + 1, kinds]

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the encoder's pooled vectors of the images, (N, W) float32."""
        pooled = []
        for (batch,) in batches(100, images):
            inputs = self.image_processor(list(batch), return_tensors="pt")
            pooled.append(self.tower.encode(inputs["pixel_values"].to(self.tower.positions.device))[1].float())
        return torch.cat(pooled)

    def standardized(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return vectors (N, W) with the mean and deviation of the fitted ones, and a constant: (N, W + 1)."""
        return F.pad((vectors - self.mean) / self.deviation, (0, 1), value=1.0)

    def name(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the kind that is recognized in each image."""
        return [KINDS[number] for number in (self.standardized(self.encode(images)) @ self.weights).argmax(1).tolist()]
