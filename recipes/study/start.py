# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What all arms of a seed begin from: its images, its encoder that forgot what captions leave out, the composed model.

seed<k>/start/images/<set>.npy    uint8 (N, 64, 64, 3): train, labelled, and tested<grade>
seed<k>/start/latents.pt          of the training images, as `DeemImageDecoder.encode_posterior` gives them
seed<k>/start/vision/             the encoder, trained against coarse captions alone
seed<k>/start/model/              model and processor, everything that joins the parts untrained
seed<k>/start/questions/<set>/    benchmark files about tested images
seed<k>/start/start.json          written last
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import set_seed

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes import pretrain
from recipes.evaluation.judge import KindJudge
from recipes.parts import whole_folder
from recipes.study.parts import words_of
from recipes.study.questions import write_questions
from recipes.study.settings import LABELLED, EvidenceArguments
from recipes.synthetic.parts.texts import caption_tokenizer
from recipes.synthetic.parts.vision_encoder import train_vision
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import HELD_OUT
from recipes.whole_files import whole_file, write_whole


def image_sets(arguments: EvidenceArguments, seed: int) -> dict[str, list[Scene]]:
    """Return the scenes of each set of images by its name; none is in two of them."""
    world = arguments.world(seed)
    sets = {"train": [world.scene(index) for index in range(arguments.num_images)]}
    sets["labelled"] = [world.scene(LABELLED + index) for index in range(arguments.num_labelled)]
    for grade in arguments.grades:
        shifted = arguments.world(seed, grade)
        sets[f"tested{grade}"] = [shifted.scene(HELD_OUT + index) for index in range(arguments.num_tested)]
    return sets


def read_images(folder: Path, name: str) -> list[Image.Image]:
    """Return a set of images of a start."""
    return [Image.fromarray(pixels) for pixels in np.load(folder / "images" / f"{name}.npy")]


def compose(vision: Path, parts: Path, folder: Path) -> tuple[DeemForConditionalGeneration, DeemProcessor]:
    """Join an encoder with the frozen parts, as recipes/pretrain.py does by default, and save the model."""
    model, processor = pretrain.compose_small(str(vision), str(parts / "text"), str(parts / "diffusion"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@torch.inference_mode()
def encode_latents(
    model: DeemForConditionalGeneration, processor: DeemProcessor, images: list[Image.Image], file: Path
) -> None:
    """Write what the latents of images are sampled from, (N, 8, s, s)."""
    found = []
    for start in range(0, len(images), 100):
        inputs = processor.image_processor(images[start : start + 100], return_targets=True, return_tensors="pt")
        found.append(model.image_decoder.encode_posterior(inputs["target_pixel_values"]))
    with whole_file(file) as unfinished:
        torch.save(torch.cat(found), unfinished)


def make_encoder(arguments: EvidenceArguments, seed: int) -> None:
    """Draw the images of a seed and train its encoder against coarse captions alone, unless it is there."""
    folder, begun = arguments.folder(seed, "start"), time.process_time()
    if (folder / "vision").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, scenes in image_sets(arguments, seed).items():
        with whole_file(folder / "images" / f"{name}.npy") as unfinished, open(unfinished, "wb") as stream:
            np.save(stream, np.stack([np.asarray(scene.image) for scene in tqdm(scenes, f"seed {seed} {name}")]))
    set_seed(seed)
    counts = (arguments.num_images, min(300, arguments.num_tested), arguments.vision_steps)
    with whole_folder(folder / "vision") as unfinished:
        words = caption_tokenizer(words_of(arguments))
        said = train_vision(unfinished, words, arguments.world(seed), *counts, details=("coarse",))
    print(f"seed {seed} encoder: {said}; {time.process_time() - begun:.0f} s of processor time", flush=True)


def make_start(arguments: EvidenceArguments, seed: int) -> None:
    """Make all that the arms of a seed share from its encoder and the frozen parts, unless it is there."""
    folder, begun = arguments.folder(seed, "start"), time.process_time()
    if (folder / "start.json").is_file():
        return
    set_seed(seed)
    model, processor = compose(folder / "vision", Path(arguments.parts), folder / "model")
    encode_latents(model, processor, read_images(folder, "train"), folder / "latents.pt")
    judge = KindJudge(model, processor, arguments.world(seed), min(600, arguments.num_images))
    for name, scenes in image_sets(arguments, seed).items():
        if name.startswith("tested"):
            write_questions(folder / "questions" / name, scenes[: arguments.num_asked], judge)
    write_whole(folder / "start.json", json.dumps({"seed": seed, "seconds": time.process_time() - begun}, indent=1))
