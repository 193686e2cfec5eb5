# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What is evaluated: a model, the world whose unseen scenes it is shown, and the options of its tasks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from recipes.generation.tasks import draw_images, redraw_images, write_text
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import HELD_OUT


@dataclass
class Subject:
    """A model with all that a measure needs.

    Attributes:
        world: its scenes from `HELD_OUT` on were never trained on.
        reference: checkpoint to compare the consistency loss with.
        draw_template: form of the prompt that images are drawn from, a key of `recipes.prompts.PROMPTS`.
        guidance_scale: classifier-free guidance of drawn images; reconstructions are not guided.
        sampling: `num_inference_steps` and `scheduler`, for drawn images and reconstructions.
        batch_size: images at a time.
        seed: of the noise.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    world: World
    reference: str | None = None
    draw_template: str = "plain"
    guidance_scale: float = 3.5
    sampling: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 50
    seed: int = 0
    scenes: list[Scene] = field(default_factory=list, init=False, repr=False)

    def unseen(self, number: int) -> list[Scene]:
        """Return the first unseen scenes; each is drawn once, however many measures use it."""
        self.scenes += [self.world.scene(HELD_OUT + index) for index in range(len(self.scenes), number)]
        return self.scenes[:number]

    def write(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], **options: Any) -> list[str]:
        """Continue each prompt with text; see `write_text`."""
        return write_text(self.model, self.processor, prompts, images, self.batch_size, **options)

    def draw(self, prompts: Sequence[str]) -> list[Image.Image]:
        """Draw an image after each prompt."""
        options = {"guidance_scale": self.guidance_scale, "seed": self.seed, **self.sampling}
        rows = [[]] * len(prompts)
        return draw_images(self.model, self.processor, prompts, rows, batch_size=self.batch_size, **options)

    def redraw(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Draw each image again from its own image tokens."""
        options = {"seed": self.seed, "batch_size": self.batch_size, **self.sampling}
        return redraw_images(self.model, self.processor, images, **options)
