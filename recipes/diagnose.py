# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a checkpoint's feedback does: one page of pictures, `diagnosis.html`, and the numbers, `diagnosis.json`.

    python recipes/diagnose.py --model runs/demo/sft --out runs/diagnosis            # on unseen scenes of the world
    python recipes/diagnose.py --model CKPT --data 'photos/*.tar' --out runs/diagnosis  # on data of your own
    python recipes/diagnose.py --model runs/demo/sft --adapt_images 40               # and learning at test time

- **Leak test**: images redrawn from the tokens or features of another image, from tokens alone and from features alone.
- **Timesteps**: the same at each timestep. Where do another image's tokens cost more than the own?
- **Gradient**: each loss's share in the vision tower, and the angles between them.
- **Tokens**: how much worse images are redrawn without each token; how much tokens differ.
- **Scores**, on the world alone: AUROC of the error between familiar and shifted images and between right and wrong
  answers, beside the log-probability of the answer.

The checkpoint is not changed. docs/feedback.md says how to read the page. The stations lie in recipes/diagnosis/.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed
from trl import TrlParser

from modeling_deem import DeemForConditionalGeneration
from recipes.diagnosis.adapting import adapt_report
from recipes.diagnosis.conditions import by_timestep, condition_errors, conditions_of, leak_test
from recipes.diagnosis.gradients import gradient_report
from recipes.diagnosis.images import images_of, read_batches
from recipes.diagnosis.report import write_diagnosis
from recipes.diagnosis.scores import score_report
from recipes.diagnosis.tokens import token_effects, token_spread
from recipes.generation.checkpoint import load_for_inference
from recipes.synthetic.scenes import World
from recipes.whole_files import check_writable, write_whole


@dataclass
class DiagnoseArguments:
    """Options of `recipes/diagnose.py`."""

    model: str = field(default="runs/demo/sft", metadata={"help": "Checkpoint of a DEEM, folder or Hub id."})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Data as in recipes/pretrain.py (docs/data.md); by default unseen scenes of the world."},
    )
    out: str = field(default="runs/diagnosis", metadata={"help": "Folder for the page and the numbers."})
    num_images: int = field(default=128, metadata={"help": "Images for leak test, timesteps and spread of tokens."})
    num_noise: int = field(default=1, metadata={"help": "Noises that each error is a mean over."})
    num_timesteps: int = field(default=10, metadata={"help": "Timesteps, spread evenly over all of the scheduler's."})
    gradient_batches: int = field(default=8, metadata={"help": "Batches for the gradients; 0 leaves them out."})
    part: str = field(default="vision_tower", metadata={"help": "Part whose gradient is taken, by name."})
    token_images: int = field(default=32, metadata={"help": "Images for leaving out each token; 0 leaves it out."})
    score_images: int = field(default=200, metadata={"help": "Scenes of each grade for AUROC; 0 leaves it out."})
    grades: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "Grades of shift, 1 to 4."})
    adapt_images: int = field(default=0, metadata={"help": "Scenes to adapt to, each alone; 0 leaves it out."})
    adapt_grade: int = field(default=2, metadata={"help": "Their grade of shift."})
    adapt_steps: int = field(default=5, metadata={"help": "Steps on each."})
    adapt_learning_rates: list[float] = field(
        default_factory=lambda: [4e-6, 3e-5, 1e-4], metadata={"help": "Rates of these steps, each tried."}
    )
    batch_size: int = field(default=16, metadata={"help": "Samples of a batch, and images at a time."})
    world_seed: int = field(default=0, metadata={"help": "Seed of the world."})
    seed: int = field(default=0, metadata={"help": "Seed of all noise."})


def spread_timesteps(total: int, number: int) -> list[int]:
    """Return the middles of `number` equal parts of the timesteps 0 to total - 1.

    Raises:
        ValueError: there are not as many.
    """
    if not 1 <= number <= total:
        raise ValueError(f"--num_timesteps {number}: give 1 to {total}, the timesteps of the scheduler.")
    return [int((place + 0.5) * total / number) for place in range(number)]


def diagnose(arguments: DiagnoseArguments, model: Any, processor: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the numbers of all stations, and what pictures are made of."""
    decoder, size = model.require_image_decoder(), arguments.batch_size
    world = World(seed=arguments.world_seed)
    number = max(arguments.num_images, arguments.gradient_batches * size)
    batches = read_batches(arguments.data, processor, world, number, size, arguments.seed)
    images = images_of(batches, arguments.num_images, model.device)
    default = {"num_noise": arguments.num_noise, "seed": arguments.seed}  # at the loss's own timesteps
    levels = spread_timesteps(decoder.scheduler.config.num_train_timesteps, arguments.num_timesteps)
    errors = condition_errors(model, images, default | {"timesteps": levels}, size)
    window = decoder.config.consistency_timestep_range
    found: dict[str, Any] = {"model": arguments.model, "images": len(images), "window": list(window)}
    found["conditions"] = {name: words for name, (*_, words) in conditions_of(model).items()}
    found["leak"], found["timesteps"] = leak_test(errors, window), by_timestep(errors)
    found["spread"] = token_spread(model, images, size)
    if arguments.gradient_batches:
        found["gradients"] = gradient_report(
            model, batches[: arguments.gradient_batches], arguments.part, arguments.seed
        )
    if arguments.token_images:
        found["tokens"] = token_effects(model, images.rows(slice(arguments.token_images)), default, size)
    if not arguments.data and arguments.score_images:
        found["scores"] = score_report(
            model, processor, world, arguments.grades, arguments.score_images, default, size
        )
    if not arguments.data and arguments.adapt_images:
        options = (arguments.adapt_grade, arguments.adapt_images, arguments.adapt_steps)
        rates = arguments.adapt_learning_rates
        found["adapting"] = adapt_report(model, processor, world, *options, rates, default, arguments.seed)
    return found, {"images": images, "errors": errors}


def main(arguments: DiagnoseArguments) -> dict[str, Any]:
    """Diagnose a checkpoint, write the page and the numbers, and return the latter."""
    out = Path(arguments.out)
    check_writable(out)
    set_seed(arguments.seed)
    model, processor = load_for_inference(arguments.model)
    if not isinstance(model, DeemForConditionalGeneration):
        raise ValueError(
            f"{arguments.model} is a {type(model).__name__}, not a DEEM: of other models with the feedback, "
            "DeemFeedback.image_error and ConsistencyLossMixin's logs tell the errors."
        )
    found, seen = diagnose(arguments, model, processor)
    write_whole(out / "diagnosis.json", json.dumps(found, indent=1) + "\n")
    page = write_diagnosis(out, found, seen["images"], seen["errors"])
    print(f"diagnosis: {page}")
    return found


if __name__ == "__main__":
    main(*TrlParser(DiagnoseArguments, allow_abbrev=False).parse_args_and_config())
