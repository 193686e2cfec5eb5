# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Images drawn from captions, by a DEEM or any text-to-image pipeline of diffusers; each is kept as a file.

What is drawn depends on the seed and the sample's id alone, not on the batch. With several drawings a caption, the one that
fits it best by a two-tower model is kept.
"""

import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from recipes.data.samples import content
from recipes.evaluation.answering import Answer, Question, load_model
from recipes.evaluation.benchmark import Request, stable_number
from recipes.evaluation.two_towers import TwoTowers
from recipes.generation.checkpoint import make_scheduler
from recipes.generation.prompt_form import base_template
from recipes.generation.tasks import make_inputs, to_pil
from recipes.whole_files import whole_file

DRAWINGS = "drawings"
PIPELINE = "model_index.json"  # of a pipeline of diffusers
WITHHELD = "withheld by the pipeline's safety checker"
Drawn = list[Image.Image | None]  # None where the pipeline withholds it


class DeemPainter:
    """Draws with `generate_images` of a DEEM.

    Args:
        protocol: "deem" asks in the released dialogue, "standard" draws behind the caption alone.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, protocol: str) -> None:
        self.model, self.processor, self.protocol = model, processor, protocol

    def prompt(self, request: Request) -> str:
        """Return the text that a request becomes."""
        if self.protocol != "deem":
            return "".join(map(str, request.pieces)).strip()
        chat = [{"role": "user", "content": content(*request.pieces)}]
        form = base_template(self.processor)
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, chat_template=form)

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], scheduler: str | None = None, **options: Any
    ) -> Drawn:
        """Draw an image after each prompt."""
        inputs = make_inputs(self.model, self.processor, prompts, [[]] * len(prompts))
        noise = [torch.Generator(self.model.device).manual_seed(seed) for seed in seeds]
        made = make_scheduler(self.model, scheduler)
        return to_pil(self.model.generate_images(**inputs, generator=noise, scheduler=made, **options))


class PipelinePainter:
    """Draws with a text-to-image pipeline of diffusers."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)

    def prompt(self, request: Request) -> str:
        """Return the caption."""
        return "".join(map(str, request.pieces)).strip()

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], scheduler: str | None = None, **options: Any
    ) -> Drawn:
        """Draw an image of each prompt; noise is drawn on the CPU, the same for every device."""
        if scheduler:
            raise ValueError("--scheduler is that of a DEEM; a pipeline of diffusers draws with its own.")
        noise = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        output = self.pipeline(prompt=list(prompts), generator=noise, output_type="pil", **options)
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(prompts)
        return [None if withheld else image for image, withheld in zip(output.images, flagged, strict=True)]


class Drawer:
    """Answers captions with drawings.

    Args:
        painter: see above.
        seed: of the noise, with the sample's id.
        ranker: chooses among several drawings of a caption.

    Attributes:
        folder: where the drawings go, below `drawings/`.
    """

    def __init__(
        self,
        painter: DeemPainter | PipelinePainter,
        seed: int = 0,
        ranker: TwoTowers | None = None,
        folder: Any = None,
    ) -> None:
        self.painter, self.seed, self.ranker, self.folder = painter, seed, ranker, folder
        self._temporary: Any = None

    def alone(self) -> "Drawer":
        """Return one that draws into a folder that goes with it."""
        other = Drawer(self.painter, self.seed, self.ranker)
        other._temporary = tempfile.TemporaryDirectory()
        other.folder = Path(other._temporary.name)
        return other

    def prompt(self, request: Request) -> str:
        """Return the text that a request becomes."""
        return self.painter.prompt(request)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], drawings_per_caption: int = 1, **options: Any) -> list[Answer]:
        """Draw an image for each caption and keep it; the answer's text is its file in the folder.

        Args:
            drawings_per_caption: how many to draw of each, of which the ranker keeps one.
            options: of the painter.
        """
        prompts = [question.prompt for question in questions]
        candidates: list[Drawn] = [[] for _ in questions]
        for number in range(drawings_per_caption):
            seeds = [stable_number(self.seed, f"{question.id} drawing {number}") for question in questions]
            for of_question, image in zip(candidates, self.painter.draw(prompts, seeds, **options), strict=True):
                of_question.append(image)
        return [self._kept(question, drawn) for question, drawn in zip(questions, candidates, strict=True)]

    def _kept(self, question: Question, drawn: Drawn) -> Answer:
        """Write the drawing that fits its caption best."""
        shown = [image for image in drawn if image is not None]
        if not shown:
            return Answer("", [], {"error": WITHHELD})
        more: dict[str, Any] = {}
        best = 0
        if self.ranker is not None:
            text = self.ranker.text_features([question.asked])[0]
            scores = (self.ranker.image_features(shown) @ text).tolist()
            best = max(range(len(scores)), key=scores.__getitem__)
            more["option_scores"] = scores
        name = f"{DRAWINGS}/{sha256(question.id.encode()).hexdigest()[:24]}.png"
        with whole_file(self.folder / name) as unfinished:
            shown[best].save(unfinished, "PNG")
        found = sha256((self.folder / name).read_bytes()).hexdigest()
        more["drawn"] = [{"name": name, "sha256": found, "file": str(self.folder / name)}]
        return Answer(name, [], more)


def load_painter(
    name: str | Path, protocol: str | None = None, dtype: str = "auto", device: str | torch.device | None = None
) -> tuple[DeemPainter | PipelinePainter, Path | str]:
    """Load what draws, and return it with the folder of its files.

    Args:
        name: folder or Hub id of a DEEM with image decoder, or of a text-to-image pipeline of diffusers.
        protocol: of a DEEM; "deem" by default.
        dtype: "auto" for that of the weights, or a name of torch's.
        device: the GPU if there is one, by default.

    Raises:
        ValueError: there is nothing that draws.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    failed = ""
    if not Path(name, PIPELINE).is_file():
        try:
            model, processor = load_model(name, dtype, device)
        except ValueError as error:
            if Path(name).is_dir():
                raise ValueError(
                    f"Nothing that draws at {str(name)!r}: expected a DEEM or {PIPELINE}. {error}"
                ) from error
            failed = str(error)
        else:
            if getattr(model, "image_decoder", None) is None:
                raise ValueError(
                    f"{type(model).__name__} at {str(name)!r} has no image decoder, so that it draws nothing."
                )
            return DeemPainter(model, processor, protocol or "deem"), name
    kind = {} if dtype == "auto" else {"torch_dtype": getattr(torch, dtype)}
    try:
        folder = name if Path(name).is_dir() else DiffusionPipeline.download(str(name))
        pipeline = DiffusionPipeline.from_pretrained(folder, **kind).to(device)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"Nothing that draws at {str(name)!r}: {error} {failed}") from error
    return PipelinePainter(pipeline), folder
