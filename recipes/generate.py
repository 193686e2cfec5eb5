# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Checkpoint + pictures + text -> text, drawn pictures, reconstructions, as files.

    python recipes/generate.py --images a.png b.png --text "what color is the circle?" --out outputs/generate
    python recipes/generate.py --images a.png                                   # a description of the picture
    python recipes/generate.py --images a.png --reconstruct                     # and what the encoder sees
    python recipes/generate.py --text "a red circle" --draw --no_answer --num_inference_steps 50
    python recipes/generate.py --config my_generation.yaml --seed 1             # any option from a file

Writes `answers.jsonl` (one line per text), `drawn_<i>.png` and `reconstruction_<i>_<name>.png`. The functions are also
what `recipes/evaluate.py` and the sample sheet of a run report call.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin
from trl import TrlParser

import modeling_deem  # noqa: F401  (registers the classes with AutoModel and AutoProcessor)
from recipes.prompts import PROMPTS


@dataclass
class GenerateArguments:
    """Options of `recipes/generate.py`."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint folder or Hub id."})
    images: list[str] = field(default_factory=list, metadata={"help": "Picture files, in the order of the text."})
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "One or more texts, each beside all pictures. `<image>` places a picture; else they lead."},
    )
    out: str = field(default="outputs/generate", metadata={"help": "Folder for the files written."})
    template: str = field(
        default="auto",
        metadata={
            "help": "Form of the prompt for text. auto: question for pictures with text, caption for pictures alone, "
            "chat for text alone.",
            "choices": ["auto", *PROMPTS],
        },
    )
    draw_template: str = field(
        default="plain",
        metadata={
            "help": "Form of the prompt for drawing; plain goes on from text and pictures.",
            "choices": [*PROMPTS],
        },
    )
    answer: bool = field(default=True, metadata={"help": "Write text after the prompt."})
    draw: bool = field(default=False, metadata={"help": "Draw one picture after the prompt."})
    reconstruct: bool = field(default=False, metadata={"help": "Redraw each picture from its own image tokens."})
    max_new_tokens: int = field(default=30, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams of the text search; 1 is greedy."})
    num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps of a picture."})
    guidance_scale: float = field(default=3.5, metadata={"help": "Classifier-free guidance of drawn pictures."})
    scheduler: str | None = field(
        default=None,
        metadata={"help": "Class name of a diffusers scheduler; DDIM, or the model's own for flow matching."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the noise that pictures start from."})


def load_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load model and processor for inference, on the GPU if there is one.

    Args:
        checkpoint: folder that `save_pretrained` (or a recipe) wrote, or Hub id.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        ValueError: there is no checkpoint; names the newest intermediate one if the folder holds some.
    """
    folder = Path(checkpoint)
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    mend = f"the run was not finished, take {steps[-1]}" if steps else "`make demo` trains one in runs/demo/sft"
    try:
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(folder / "config.json")
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModel.from_pretrained(checkpoint)
    except OSError as error:
        raise ValueError(
            f"No checkpoint to load at {str(checkpoint)!r}: expected a folder with config.json, model.safetensors and "
            f"processor_config.json ({mend}), or the id of a Hub repository."
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def make_scheduler(model: PreTrainedModel, name: str | None = None) -> diffusers.SchedulerMixin:
    """The diffusers scheduler of class `name`, set up like the noise schedule that the model was trained with.

    Without a name DDIM, which needs few steps and adds no noise; for flow matching the model's own.

    Raises:
        ValueError: diffusers has no such scheduler, or it is of another kind than the model's (flow matching against
            denoising); lists those that fit.
    """
    own = model.image_decoder.scheduler
    default = "DDIMScheduler" if isinstance(own, diffusers.DDPMScheduler) else type(own).__name__
    return model.image_decoder.make_scheduler(name or default)


def make_prompt(processor: ProcessorMixin, template: str, text: str = "", num_images: int = 0) -> str:
    """Put a user's text and the placeholders of `num_images` pictures into one of `PROMPTS`, up to the answer's begin.

    A text that places its pictures itself, by the image token, is left as it is.
    """
    user, answer_begin = PROMPTS[template]
    image = "" if processor.image_token in text else processor.image_token * num_images
    said = user.format(image=image, text=text)
    if answer_begin is None:
        return said
    messages = [{"role": "user", "content": [{"type": "text", "text": said}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True) + answer_begin


def make_inputs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image | str]],
    region_masks: Sequence[Sequence[Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Tokenize a batch of prompts, padded on the left, with the pictures of all rows in order, on the model's device."""
    pictures = [picture for row in images for picture in row]
    regions = {} if region_masks is None else {"region_masks": [mask for row in region_masks for mask in row]}
    inputs = processor(
        text=list(prompts), images=pictures or None, return_tensors="pt", padding=True, padding_side="left", **regions
    )
    return {name: value.to(model.device) for name, value in inputs.items()}


def make_generators(model: PreTrainedModel, seed: int, number: int) -> list[torch.Generator]:
    """One source of noise per picture, so that a picture does not depend on those it shares a batch with."""
    return [torch.Generator(model.device).manual_seed(seed + index) for index in range(number)]


def batches(size: int, *columns: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """Cut columns of equal length into batches of at most `size` rows."""
    for start in range(0, len(columns[0]), size):
        yield tuple(column[start : start + size] for column in columns)


@torch.inference_mode()
def write_text(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image | str]],
    batch_size: int = 50,
    region_masks: Sequence[Sequence[Any]] | None = None,
    **generation_options: Any,
) -> list[str]:
    """Continue each prompt with text.

    Args:
        prompts: B texts with one image token per picture.
        images: B rows of pictures, PIL or file names.
        region_masks: B rows of masks (H, W), one per picture; None for a whole picture.
        generation_options: any options of `model.generate`, such as `max_new_tokens` and `num_beams`.

    Returns:
        B continuations, without the prompt and without special tokens.
    """
    texts = []
    masks = [None] * len(prompts) if region_masks is None else region_masks
    for prompt_batch, image_batch, mask_batch in batches(batch_size, prompts, images, masks):
        given = None if region_masks is None else mask_batch
        inputs = make_inputs(model, processor, prompt_batch, image_batch, given)
        tokens = model.generate(**inputs, **generation_options)[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


@torch.inference_mode()
def draw_pictures(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    images: Sequence[Sequence[Image.Image | str]],
    seed: int = 0,
    batch_size: int = 50,
    **sampling_options: Any,
) -> list[Image.Image]:
    """Draw one picture after each prompt.

    Args:
        prompts: B texts with one image token per picture.
        images: B rows of pictures (PIL or file names), the context.
        seed: of the noise.
        sampling_options: options of `model.generate_images`: `num_inference_steps`, `guidance_scale`, `scheduler`.

    Returns:
        B pictures of the side that the model draws.
    """
    generators = make_generators(model, seed, len(prompts))
    pictures = []
    for prompt_batch, image_batch, generator in batches(batch_size, prompts, images, generators):
        inputs = make_inputs(model, processor, prompt_batch, image_batch)
        pictures += to_pictures(model.generate_images(**inputs, generator=generator, **sampling_options))
    return pictures


@torch.inference_mode()
def redraw_pictures(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image | str],
    seed: int = 0,
    batch_size: int = 50,
    **sampling_options: Any,
) -> list[Image.Image]:
    """What the encoder sees: draw each picture again from its own image tokens and features.

    Args:
        images: N pictures, PIL or file names.
        seed: of the noise.
        sampling_options: options of `model.reconstruct`: `num_inference_steps`, `guidance_scale`, `scheduler`.

    Returns:
        N pictures of the side that the model draws.
    """
    generators = make_generators(model, seed, len(images))
    pictures = []
    for image_batch, generator in batches(batch_size, images, generators):
        inputs = processor.image_processor(list(image_batch), return_tensors="pt").to(model.device)
        pictures += to_pictures(model.reconstruct(**inputs, generator=generator, **sampling_options))
    return pictures


def to_pictures(values: torch.Tensor) -> list[Image.Image]:
    """Turn values `(N, 3, H, W)` in [0, 1] into N PIL pictures."""
    return diffusers.image_processor.VaeImageProcessor.numpy_to_pil(values.float().cpu().permute(0, 2, 3, 1).numpy())


def main(arguments: GenerateArguments) -> None:
    """Run the tasks asked for and write their files."""
    images, texts = arguments.images, arguments.text or [""]
    if not images and not arguments.text:
        raise ValueError('Nothing to work on: give --images FILE ..., --text "..." or both.')
    if arguments.reconstruct and not images:
        raise ValueError("--reconstruct redraws pictures, but none was given: add --images FILE ...")
    model, processor = load_checkpoint(arguments.model)
    scheduler = make_scheduler(model, arguments.scheduler)
    sampling = {
        "num_inference_steps": arguments.num_inference_steps,
        "scheduler": scheduler,
        "seed": arguments.seed,
    }
    rows = [images] * len(texts)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    if arguments.answer:
        automatic = "chat" if not images else "question" if arguments.text else "caption"
        template = automatic if arguments.template == "auto" else arguments.template
        prompts = [make_prompt(processor, template, text, len(images)) for text in texts]
        options = {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams}
        answers = write_text(model, processor, prompts, rows, **options)
        with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
            for text, prompt, answer in zip(texts, prompts, answers, strict=True):
                record = {"images": images, "text": text, "prompt": prompt, "answer": answer}
                file.write(json.dumps(record) + "\n")
                print(answer)
    if arguments.draw:
        prompts = [make_prompt(processor, arguments.draw_template, text, len(images)) for text in texts]
        scale = arguments.guidance_scale
        for index, picture in enumerate(
            draw_pictures(model, processor, prompts, rows, guidance_scale=scale, **sampling)
        ):
            picture.save(out / f"drawn_{index}.png")
    if arguments.reconstruct:
        for index, picture in enumerate(redraw_pictures(model, processor, images, **sampling)):
            picture.save(out / f"reconstruction_{index}_{Path(images[index]).stem}.png")
    print(f"written to {out}")


if __name__ == "__main__":
    main(*TrlParser(GenerateArguments, allow_abbrev=False).parse_args_and_config())
