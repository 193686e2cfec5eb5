# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What all arms of a seed begin from: its images, its encoder that forgot what captions leave out, the composed model.

seed<k>/start/images/<set>.npy    uint8 (N, 64, 64, 3): train, labelled, and tested<grade>
seed<k>/start/latents.pt          of the training images, as `DeemImageDecoder.encode_posterior` gives them
seed<k>/start/vision/             the encoder, trained against coarse captions alone
seed<k>/start/model/              model and processor, everything that joins the parts untrained
seed<k>/start/questions/<set>/    benchmark files about labelled and tested images
seed<k>/start/start.json          written last
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes import pretrain
from recipes.evaluation.judge import KindJudge
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


def make_start(arguments: EvidenceArguments, seed: int) -> None:
    """Make all that the arms of a seed share, unless it is there."""
    folder, begun = arguments.folder(seed, "start"), time.process_time()
    if (folder / "start.json").is_file():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    sets = image_sets(arguments, seed)
    for name, scenes in sets.items():
        with whole_file(folder / "images" / f"{name}.npy") as unfinished, open(unfinished, "wb") as stream:
            np.save(stream, np.stack([np.asarray(scene.image) for scene in tqdm(scenes, f"seed {seed} {name}")]))
    set_seed(seed)
    parts = Path(arguments.parts)
    tokenizer: PreTrainedTokenizerFast = caption_tokenizer(AutoTokenizer.from_pretrained(parts / "text"))
    counts = (arguments.num_images, min(300, arguments.num_tested), arguments.vision_steps)
    said = train_vision(folder / "vision", tokenizer, arguments.world(seed), *counts, details=("coarse",))
    model, processor = compose(folder / "vision", parts, folder / "model")
    encode_latents(model, processor, read_images(folder, "train"), folder / "latents.pt")
    judge = KindJudge(model, processor, arguments.world(seed), min(600, arguments.num_images))
    for name, scenes in sets.items():
        if name != "train":
            count = arguments.num_labelled if name == "labelled" else arguments.num_asked
            write_questions(folder / "questions" / name, scenes[:count], judge, every=name == "labelled")
    about = {"seed": seed, "vision": said, "seconds": time.process_time() - begun}
    write_whole(folder / "start.json", json.dumps(about, indent=1))
