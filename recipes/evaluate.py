# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""How well a checkpoint names, answers, sees and draws, on pictures of the synthetic world that it was not trained on.

    python recipes/evaluate.py --model runs/demo/sft --reference runs/demo/initial --out runs/demo/evaluation

Figures, each beside its aim (where there is one) and what chance would give:

1. caption: the first kind of object that the caption names is the kind of the main object;
2. color: a question about an object's color is answered exactly;
3. consistency: DEEM's feedback loss lies below that of a reference (the composed model before pretraining), with the
   same noise and timesteps;
4. drawing: a picture drawn from a caption that names one color has it as its dominant color;
5. region (with --num_regions, after the region stage): the description of a marked object names its color first; and the
   same where another object of the picture is marked, which must be near 0 if the mask is what decides.

Writes `metrics.json` and `samples/` (pictures and `samples.json`), which the run report shows.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from trl import TrlParser

from recipes.data.samples import IMAGE, content
from recipes.generate import (
    batches,
    draw_pictures,
    load_checkpoint,
    make_prompt,
    make_scheduler,
    redraw_pictures,
    write_text,
)
from recipes.prompts import PROMPTS, REGION_INSTRUCTIONS
from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import COLORS, HELD_OUT, dominant_color, first_color, first_kind


@dataclass
class EvaluateArguments:
    """Options of `recipes/evaluate.py`."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint folder or Hub id."})
    reference: str | None = field(
        default=None, metadata={"help": "Checkpoint to compare the consistency loss with; without it, no comparison."}
    )
    out: str = field(default="outputs/evaluate", metadata={"help": "Folder for metrics.json and samples/."})
    num_captions: int = field(default=500, metadata={"help": "Pictures to caption."})
    num_questions: int = field(default=500, metadata={"help": "Pictures to ask about, one question each."})
    num_consistency: int = field(default=500, metadata={"help": "Pictures for the consistency loss."})
    num_drawings: int = field(default=100, metadata={"help": "Captions to draw."})
    num_regions: int = field(
        default=0, metadata={"help": "Pictures with a marked object to describe; for models of the region stage."}
    )
    num_samples: int = field(default=8, metadata={"help": "Pictures on the sample sheet."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps of a picture."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Classifier-free guidance of drawn pictures."})
    scheduler: str | None = field(
        default=None,
        metadata={"help": "Class name of a diffusers scheduler; DDIM, or the model's own for flow matching."},
    )
    draw_template: str = field(
        default="plain", metadata={"help": "Form of the prompt that pictures are drawn from.", "choices": [*PROMPTS]}
    )
    batch_size: int = field(default=50, metadata={"help": "Pictures at a time."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    world_seed: int = field(default=0, metadata={"help": "Seed of the world; its held-out scenes are used."})
    size: int = field(default=64, metadata={"help": "Side of the world's pictures, in pixels."})
    shifted: bool = field(default=False, metadata={"help": "Use the out-of-distribution variant of the world."})


def color_question(scene: Scene) -> dict[str, str]:
    """One question about a color in `scene`: which of them depends on the scene's number only."""
    asked = [question for question in scene.questions() if question["attribute"] == "color"]
    return asked[scene.index % len(asked)]


def one_color_scenes(world: World, number: int) -> list[Scene]:
    """Unseen scenes with a single object, so that their captions name one color; each color equally often (+-1)."""
    per_color: dict[str, list[Scene]] = {color: [] for color in COLORS}
    most = -(-number // len(COLORS))
    for scene in map(world.scene, count(HELD_OUT)):
        if len(scene.objects) == 1 and len(per_color[scene.main.color]) < most:
            per_color[scene.main.color].append(scene)
        if all(len(scenes) == most for scenes in per_color.values()):
            break
    return [scene for row in zip(*per_color.values(), strict=True) for scene in row][:number]


def several_object_scenes(world: World, number: int) -> list[Scene]:
    """The first unseen scenes with two objects or more."""
    scenes = (world.scene(index) for index in count(HELD_OUT))
    return list(islice((scene for scene in scenes if len(scene.objects) > 1), number))


def share_right(what: str, aim: float | None, given: Sequence[str | None], truths: Sequence[str]) -> dict[str, Any]:
    """One figure of the report: the share of `given` that equals `truths`, beside its aim and what chance gives.

    Chance is always giving the most frequent of the right answers.
    """
    right = sum(one == truth for one, truth in zip(given, truths, strict=True))
    chance = max(Counter(truths).values()) / len(truths)
    return {"what": what, "value": right / len(truths), "aim": aim, "chance": chance, "count": len(truths)}


def region_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    scenes: Sequence[Scene],
    marked: Sequence[int],
    batch_size: int = 50,
) -> list[str]:
    """What is said of one object of each scene, by number, in the form of the region stage: picture, picture with mask."""
    request = content(IMAGE, f" {REGION_INSTRUCTIONS['refcoco']} ", IMAGE)
    prompt = processor.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True)
    images = [[scene.image] * 2 for scene in scenes]
    masks = [[None, scene.objects[number].mask] for scene, number in zip(scenes, marked, strict=True)]
    prompts = [prompt] * len(scenes)
    return write_text(model, processor, prompts, images, batch_size, region_masks=masks, max_new_tokens=12)


def region_figures(
    model: PreTrainedModel, processor: ProcessorMixin, scenes: Sequence[Scene], batch_size: int = 50
) -> dict[str, dict[str, Any]]:
    """Share of marked objects whose color is named first, with their own mask and with that of the next object.

    Scenes have two objects or more; no color occurs twice in a picture.
    """
    chosen = [scene.index % len(scene.objects) for scene in scenes]
    others = [(number + 1) % len(scene.objects) for scene, number in zip(scenes, chosen, strict=True)]
    truths = [scene.objects[number].color for scene, number in zip(scenes, chosen, strict=True)]
    figures = {}
    for name, what, marked in (
        ("region", "marked objects whose color is named", chosen),
        ("region_wrong_mask", "the same with another object's mask", others),
    ):
        said = region_answers(model, processor, scenes, marked, batch_size)
        figures[name] = share_right(what, None, [first_color(text) for text in said], truths)
    return figures


def caption_figure(scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, Any]:
    """Share of captions whose first kind of object is that of the picture's main object."""
    named = [first_kind(caption) for caption in captions]
    return share_right("captions that name the main object's kind", 0.80, named, [scene.main.kind for scene in scenes])


def color_figure(scenes: Sequence[Scene], answers: Sequence[str]) -> dict[str, Any]:
    """Share of answers to `color_question` whose first word is the right color."""
    words = [re.findall(r"\w+", answer.lower()) for answer in answers]
    truths = [color_question(scene)["answer"] for scene in scenes]
    return share_right("color questions answered exactly", 0.60, [word[0] if word else None for word in words], truths)


def drawing_figure(captions: Sequence[str], drawn: Sequence[Image.Image]) -> dict[str, Any]:
    """Share of pictures whose dominant color is the first that their caption names."""
    seen = [dominant_color(picture) for picture in drawn]
    truths = [first_color(caption) for caption in captions]
    return share_right("drawings in the color of their caption", 0.50, seen, truths)


@torch.inference_mode()
def consistency_loss(
    model: PreTrainedModel, processor: ProcessorMixin, scenes: Sequence[Scene], batch_size: int = 50, seed: int = 0
) -> float:
    """Mean consistency loss over `scenes`; two models get the same noise and timesteps for the same seed."""
    generator = torch.Generator(model.device).manual_seed(seed)
    total = 0.0
    for (batch,) in batches(batch_size, scenes):
        pictures = [scene.image for scene in batch]
        inputs = processor.image_processor(pictures, return_targets=True, return_tensors="pt").to(model.device)
        total += model.consistency_loss(**inputs, generator=generator).item() * len(batch)
    return total / len(scenes)


def consistency_figure(loss: float, reference: float, number: int) -> dict[str, Any]:
    """How far a consistency loss lies below that of the reference, as a share of the latter."""
    figure = {"what": "consistency loss below that before pretraining", "value": 1 - loss / reference, "aim": 0.25}
    return figure | {"loss": loss, "reference": reference, "count": number}


def format_figures(metrics: dict[str, dict[str, Any]]) -> str:
    """The figures as aligned text, one line each."""
    lines = []
    for figure in metrics.values():
        beside = (
            f"chance {figure['chance']:.1%}" if "chance" in figure else "{loss:.4f} / {reference:.4f}".format(**figure)
        )
        aim = "       " if figure["aim"] is None else f"aim {figure['aim']:.0%}"
        lines.append(f"{figure['what']:48s} {figure['value']:7.1%}   {aim}   {beside}")
    return "\n".join(lines)


def write_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[dict[str, Any]],
    folder: str | Path,
    guidance_scale: float = 3.5,
    template: str = "plain",
    **sampling_options: Any,
) -> None:
    """Write what the report's sample sheet shows: input, reconstruction, picture drawn from the caption, texts.

    Args:
        samples: dicts with `image` (PIL), `caption` (its true text) and, optionally, `question` and `answer`.
        folder: gets `<i>_input.png`, `<i>_reconstruction.png`, `<i>_drawn.png` and `samples.json`.
        guidance_scale: of the drawn pictures; reconstructions are not guided.
        template: form of the prompt that pictures are drawn from, a key of `recipes.prompts.PROMPTS`.
        sampling_options: of `draw_pictures` and `redraw_pictures`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = [sample["image"] for sample in samples]
    rows = [[image] for image in images]
    asked = [sample for sample in samples if "question" in sample]
    to_draw = [make_prompt(processor, template, sample["caption"]) for sample in samples]
    to_answer = [make_prompt(processor, "question", sample["question"], 1) for sample in asked]
    to_caption = [make_prompt(processor, "caption", num_images=1)] * len(samples)

    redrawn = redraw_pictures(model, processor, images, **sampling_options)
    drawn = draw_pictures(
        model, processor, to_draw, [[]] * len(samples), guidance_scale=guidance_scale, **sampling_options
    )
    captions = write_text(model, processor, to_caption, rows, max_new_tokens=24)
    answers = iter(write_text(model, processor, to_answer, [[sample["image"]] for sample in asked], max_new_tokens=6))

    records = []
    for number, (sample, caption) in enumerate(zip(samples, captions, strict=True)):
        record = {"truth": sample["caption"], "caption": caption}
        for role, picture in ("input", images[number]), ("reconstruction", redrawn[number]), ("drawn", drawn[number]):
            record[role] = f"{number}_{role}.png"
            picture.save(folder / record[role])
        if "question" in sample:
            record |= {"question": sample["question"], "right_answer": sample["answer"], "answer": next(answers)}
        records.append(record)
    (folder / "samples.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def main(arguments: EvaluateArguments) -> dict[str, dict[str, Any]]:
    """Measure, print and write the figures; returns them."""
    world = World(seed=arguments.world_seed, size=arguments.size, shifted=arguments.shifted)
    most = max(arguments.num_captions, arguments.num_questions, arguments.num_consistency, arguments.num_samples)
    unseen = [world.scene(HELD_OUT + index) for index in range(most)]
    to_draw = one_color_scenes(world, arguments.num_drawings)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    batch_size, seed = arguments.batch_size, arguments.seed
    model, processor = load_checkpoint(arguments.model)
    drawing = {
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "scheduler": make_scheduler(model, arguments.scheduler),
        "seed": seed,
    }
    metrics = {}
    if arguments.num_captions:
        scenes = unseen[: arguments.num_captions]
        prompts = [make_prompt(processor, "caption", num_images=1)] * len(scenes)
        captions = write_text(
            model, processor, prompts, [[scene.image] for scene in scenes], batch_size, max_new_tokens=16
        )
        metrics["caption"] = caption_figure(scenes, captions)
    if arguments.num_questions:
        scenes = unseen[: arguments.num_questions]
        prompts = [make_prompt(processor, "question", color_question(scene)["question"], 1) for scene in scenes]
        answers = write_text(
            model, processor, prompts, [[scene.image] for scene in scenes], batch_size, max_new_tokens=6
        )
        metrics["color"] = color_figure(scenes, answers)
    if arguments.num_consistency and arguments.reference is not None:
        scenes = unseen[: arguments.num_consistency]
        loss = consistency_loss(model, processor, scenes, batch_size, seed)
        reference = consistency_loss(*load_checkpoint(arguments.reference), scenes, batch_size, seed)
        metrics["consistency"] = consistency_figure(loss, reference, len(scenes))
    if arguments.num_drawings:
        captions = [scene.caption("medium") for scene in to_draw]
        prompts = [make_prompt(processor, arguments.draw_template, caption) for caption in captions]
        drawn = draw_pictures(model, processor, prompts, [[]] * len(prompts), batch_size=batch_size, **drawing)
        metrics["drawing"] = drawing_figure(captions, drawn)
    if arguments.num_regions:
        scenes = several_object_scenes(world, arguments.num_regions)
        metrics |= region_figures(model, processor, scenes, batch_size)
    if arguments.num_samples:
        samples = []
        for scene in unseen[: arguments.num_samples]:
            asked = color_question(scene)
            texts = {"caption": scene.caption("medium"), "question": asked["question"], "answer": asked["answer"]}
            samples.append({"image": scene.image} | texts)
        write_samples(model, processor, samples, out / "samples", template=arguments.draw_template, **drawing)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    print(format_figures(metrics))
    return metrics


if __name__ == "__main__":
    main(*TrlParser(EvaluateArguments, allow_abbrev=False).parse_args_and_config())
