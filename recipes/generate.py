# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write text, draw images and redraw images with a checkpoint; results are files.

    python recipes/generate.py --images a.png b.png --text "what color is the circle?" --out outputs/generate
    python recipes/generate.py --images a.png                                   # a description of the image
    python recipes/generate.py --images a.png --reconstruct                     # and what the encoder sees
    python recipes/generate.py --text "a red circle" --draw --no_answer --num_inference_steps 50
    python recipes/generate.py --images a.png --text "what color is it?" --adapt 5  # after learning from redrawing a.png
    python recipes/generate.py --config my_generation.yaml --seed 1             # any option from a file

Writes `answers.jsonl` (one line per text), `drawn_<i>.png` and `reconstruction_<i>_<name>.png`. The tasks themselves lie
in recipes/generation/.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin
from trl import TrlParser

from recipes.generation.checkpoint import DRAWING_STEPS, load_for_inference, make_scheduler
from recipes.generation.prompt import make_prompt
from recipes.generation.tasks import adapting, draw_images, redraw_images, write_text
from recipes.prompts import PROMPTS
from recipes.whole_files import check_writable


@dataclass
class GenerateArguments:
    """Options of `recipes/generate.py`."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint folder or Hub id."})
    images: list[str] = field(default_factory=list, metadata={"help": "Image files, in the order of the text."})
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "One or more texts, each with all images. `<image>` places an image; else they come first."},
    )
    out: str = field(default="outputs/generate", metadata={"help": "Folder for the files written."})
    template: str = field(
        default="auto",
        metadata={
            "help": "Form of the prompt for text. auto: that in which the model was trained, as saved in its chat "
            "template.",
            "choices": ["auto", *PROMPTS],
        },
    )
    draw_template: str = field(
        default="plain",
        metadata={
            "help": "Form of the prompt for drawing; plain goes on from text and images.",
            "choices": [*PROMPTS],
        },
    )
    answer: bool = field(default=True, metadata={"help": "Write text after the prompt."})
    draw: bool = field(default=False, metadata={"help": "Draw one image after the prompt."})
    reconstruct: bool = field(default=False, metadata={"help": "Redraw each image from its own image tokens."})
    max_new_tokens: int = field(default=30, metadata={"help": "Longest answer, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams of the text search; 1 is greedy."})
    num_inference_steps: int = field(
        default=DRAWING_STEPS,
        metadata={"help": "Denoising steps of an image; give more with a scheduler that adds noise."},
    )
    guidance_scale: float = field(default=3.5, metadata={"help": "Classifier-free guidance of drawn images."})
    scheduler: str | None = field(
        default=None,
        metadata={"help": "Class name of a diffusers scheduler; DDIM, or the model's own for flow matching."},
    )
    adapt: int = field(
        default=0,
        metadata={"help": "Steps on the feedback of the very images before all tasks; the checkpoint stays as it is."},
    )
    adapt_learning_rate: float = field(default=4e-6, metadata={"help": "Of these steps, in the vision tower."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise that drawing and adapting start from."})


def main(arguments: GenerateArguments) -> None:
    """Do the tasks asked for and write their files."""
    if not arguments.images and not arguments.text:
        raise ValueError('Nothing to work on: give --images FILE ..., --text "..." or both.')
    for asked, name in ((arguments.reconstruct, "--reconstruct redraws"), (arguments.adapt, "--adapt learns from")):
        if asked and not arguments.images:
            raise ValueError(f"{name} images, but none was given: add --images FILE ...")
    if arguments.adapt < 0 or arguments.adapt_learning_rate <= 0:
        raise ValueError(
            f"--adapt {arguments.adapt} --adapt_learning_rate {arguments.adapt_learning_rate}: expected 0 or more steps, at "
            "a rate above 0."
        )
    model, processor = load_for_inference(arguments.model)
    out = Path(arguments.out)
    check_writable(out)
    options = (arguments.adapt, arguments.adapt_learning_rate, arguments.seed)
    with adapting(model, processor, arguments.images, *options):
        do_tasks(arguments, model, processor, out)
    print(f"written to {out}")


def do_tasks(arguments: GenerateArguments, model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """Write text, draw and redraw, as asked for, into a folder."""
    images, texts = arguments.images, arguments.text or [""]
    scheduler = make_scheduler(model, arguments.scheduler)
    sampling = {"num_inference_steps": arguments.num_inference_steps, "scheduler": scheduler, "seed": arguments.seed}
    rows = [images] * len(texts)

    if arguments.answer:
        prompts = [make_prompt(processor, arguments.template, text, len(images)) for text in texts]
        options = {"max_new_tokens": arguments.max_new_tokens, "num_beams": arguments.num_beams}
        answers = write_text(model, processor, prompts, rows, **options)
        with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
            for text, prompt, answer in zip(texts, prompts, answers, strict=True):
                line = {"images": images, "text": text, "prompt": prompt, "answer": answer}
                file.write(json.dumps(line) + "\n")
                print(answer)
    if arguments.draw:
        prompts = [make_prompt(processor, arguments.draw_template, text, len(images)) for text in texts]
        drawn = draw_images(model, processor, prompts, rows, guidance_scale=arguments.guidance_scale, **sampling)
        for index, image in enumerate(drawn):
            image.save(out / f"drawn_{index}.png")
    if arguments.reconstruct:
        for index, image in enumerate(redraw_images(model, processor, images, **sampling)):
            image.save(out / f"reconstruction_{index}_{Path(images[index]).stem}.png")


if __name__ == "__main__":
    main(*TrlParser(GenerateArguments, allow_abbrev=False).parse_args_and_config())
