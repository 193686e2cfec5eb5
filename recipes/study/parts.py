# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The frozen parts that all arms of all seeds share, each made once.

parts/words/       the tokenizer, which all others read with
parts/text/        the language model, see `reading.py`
parts/diffusion/   VAE, denoiser and its text encoder, as recipes/parts.py makes them
parts/vision/      an encoder that was told colors, as recipes/parts.py makes it; the arm "align" alone needs it
"""

import time
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed

from recipes.parts import PartsArguments, whole_folder
from recipes.study.reading import reading_tokenizer, train_reader
from recipes.study.settings import MOST_OBJECTS, EvidenceArguments
from recipes.synthetic.parts.diffusion_pipeline import train_diffusion
from recipes.synthetic.parts.texts import caption_tokenizer
from recipes.synthetic.parts.vision_encoder import train_vision
from recipes.synthetic.scenes import World

HELD_OUT_IMAGES = 300


def words_of(arguments: EvidenceArguments) -> PreTrainedTokenizerFast:
    """Return the tokenizer, made if it is not there."""
    folder = Path(arguments.parts, "words")
    if not folder.exists():
        with whole_folder(folder) as unfinished:
            reading_tokenizer(World(0, max_objects=MOST_OBJECTS)).save_pretrained(unfinished)
    return AutoTokenizer.from_pretrained(folder)


def part_names(arguments: EvidenceArguments) -> tuple[str, ...]:
    """Return the parts that the arms need."""
    return "text", "diffusion", *(["vision"] if "align" in arguments.arms else [])


def make_part(arguments: EvidenceArguments, name: str) -> None:
    """Train a part, unless it is there."""
    folder, begun = Path(arguments.parts, name), time.process_time()
    if folder.exists():
        return
    usual = PartsArguments(steps_scale=arguments.parts_scale)
    counts = (arguments.parts_images, min(HELD_OUT_IMAGES, arguments.parts_images))
    words, world = words_of(arguments), World(0)
    set_seed(0)
    with whole_folder(folder) as unfinished:
        if name == "text":
            steps = max(1, round(arguments.reading_steps * arguments.parts_scale))
            said = train_reader(unfinished, words, World(0, max_objects=MOST_OBJECTS), steps)
        elif name == "diffusion":
            steps = usual.steps("vae"), usual.steps("unet")
            said = train_diffusion(unfinished, caption_tokenizer(words), world, *counts, *steps)
        else:
            said = train_vision(unfinished, caption_tokenizer(words), world, *counts, usual.steps("vision"))
    print(f"{name}: {said}; {time.process_time() - begun:.0f} s of processor time", flush=True)
