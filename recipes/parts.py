# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Train the small pretrained parts that a DEEM of the synthetic world starts from: minutes on two CPU cores.

    python recipes/parts.py --out runs/parts

    runs/parts/text/        LlamaForCausalLM with its tokenizer, trained on the world's texts (no images)
    runs/parts/vision/      ConvNextModel with its image processor, trained contrastively against captions that name
                            kinds, counts and colors: like real encoders it has no reason to keep the rest
    runs/parts/diffusion/   a StableDiffusionPipeline: VAE, UNet, and a text encoder trained jointly with the UNet

Each is an ordinary `save_pretrained` folder in the place of a large checkpoint. A part that is there is not trained again;
`--overwrite` trains all anew. Every part prints one line: its loss, its time, and a figure on images or texts that it was not trained on.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerFast, set_seed
from trl import TrlParser

from recipes.synthetic.parts.diffusion_modules import SIZE
from recipes.synthetic.parts.diffusion_pipeline import train_diffusion
from recipes.synthetic.parts.language_model import train_text
from recipes.synthetic.parts.texts import caption_tokenizer
from recipes.synthetic.parts.vision_encoder import train_vision
from recipes.synthetic.scenes import World

PARTS = ("text", "vision", "diffusion")


@dataclass
class PartsArguments:
    """Options of `recipes/parts.py`."""

    out: str = field(default="runs/parts", metadata={"help": "Folder of the parts: text/, vision/, diffusion/."})
    only: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": f"Parts to make, of {', '.join(PARTS)} (all)."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Train parts anew that are there already."})
    seed: int = field(default=0, metadata={"help": "Seed of the world, the initial weights and the batches."})
    num_pictures: int = field(default=6000, metadata={"help": "World images to train on."})
    num_texts: int = field(default=8000, metadata={"help": "World texts to train on, of each of three sorts."})
    num_held_out: int = field(default=300, metadata={"help": "Images or texts that the figures are measured on."})
    text_steps: int = field(default=300, metadata={"help": "Training steps of the language model."})
    vision_steps: int = field(default=800, metadata={"help": "Training steps of the vision encoder."})
    vae_steps: int = field(default=400, metadata={"help": "Training steps of the VAE."})
    unet_steps: int = field(default=600, metadata={"help": "Training steps of the UNet and its text encoder."})
    steps_scale: float = field(default=1.0, metadata={"help": "Multiplies all four numbers of steps."})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(PARTS))
        if unknown:
            raise ValueError(f"--only {' '.join(unknown)}: no such part. Give one or more of {', '.join(PARTS)}.")
        for name in ("num_pictures", "num_texts", "num_held_out"):
            if getattr(self, name) < 8:
                raise ValueError(f"--{name} {getattr(self, name)} is too few to train or measure on. Give at least 8.")

    def steps(self, name: str) -> int:
        """Return the training steps of text, vision, vae or unet, scaled; at least one."""
        return max(1, round(getattr(self, f"{name}_steps") * self.steps_scale))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, and give it its name when all is written: a folder of that name is always whole."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(unfinished, folder)


def train_part(name: str, arguments: PartsArguments, folder: Path) -> str:
    """Train one part into `folder`; return its figures, in words."""
    world, held_out = World(arguments.seed, SIZE), arguments.num_held_out
    if name == "text":
        return train_text(folder, world, arguments.num_texts, held_out, arguments.steps("text"))
    tokenizer = caption_tokenizer(PreTrainedTokenizerFast.from_pretrained(Path(arguments.out, "text")))
    if name == "vision":
        return train_vision(folder, tokenizer, world, arguments.num_pictures, held_out, arguments.steps("vision"))
    steps = arguments.steps("vae"), arguments.steps("unet")
    return train_diffusion(folder, tokenizer, world, arguments.num_pictures, held_out, *steps)


def make_parts(arguments: PartsArguments) -> tuple[str, str, str]:
    """Train the parts that are not there yet; return the folders of vision, text and diffusion.

    Raises:
        ValueError: the part text, whose tokenizer the others need, is missing.
    """
    for name in PARTS:  # text comes first: the other two read captions with its tokenizer
        folder = Path(arguments.out, name)
        if name not in arguments.only:
            continue
        if folder.exists() and not arguments.overwrite:
            print(f"{name}: there already, {folder} (--overwrite trains it anew)")
            continue
        if name != "text" and not Path(arguments.out, "text").exists():
            raise ValueError(
                f"The part {name!r} needs the tokenizer of the part 'text', and {Path(arguments.out, 'text')} is missing. "
                "Make it first, or leave out --only."
            )
        start = time.perf_counter()
        set_seed(arguments.seed)  # per part: it must not depend on which others were there already
        with whole_folder(folder) as unfinished:
            figures = train_part(name, arguments, unfinished)
            where = ("out", "only", "overwrite")  # what the part is does not depend on these
            settings = {key: value for key, value in asdict(arguments).items() if key not in where}
            settings["figures"] = figures
            (unfinished / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
        print(f"{name}: {figures}; {time.perf_counter() - start:.0f} s, {folder}", flush=True)
    vision, text, diffusion = (str(Path(arguments.out, name)) for name in ("vision", "text", "diffusion"))
    return vision, text, diffusion


if __name__ == "__main__":
    make_parts(*TrlParser(PartsArguments, allow_abbrev=False).parse_args_and_config())
