# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Encode every picture of a training run once, so that training needs no VAE (see recipes/training/latent_cache.py).

    python recipes/precompute_latents.py pretrain --config recipes/configs/pretrain_cpu.yaml --latents runs/latents
    python recipes/pretrain.py --config recipes/configs/pretrain_cpu.yaml --latents runs/latents

The first word names the recipe; all its options hold. With `accelerate launch` the files are shared out. The same command
started again encodes only what is missing. At the end all files are read back, and some pictures encoded once more.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from modeling_deem import DeemImageDecoder
from processing import DeemProcessor
from recipes import pretrain, sft
from recipes.data.faults import DataReport
from recipes.data.sources import build_dataset
from recipes.data.stream.dataset import MixedDataset
from recipes.data.stream.shuffle import ReaderPass
from recipes.data.stream.steps import mirrored
from recipes.training.defaults import parse_recipe
from recipes.training.latent_cache import SUFFIX, LatentCache, picture_key, transform_id, vae_id, write_shard

RECIPES = {"pretrain": pretrain, "sft": sft}


@dataclass
class LatentArguments:
    """Options of `recipes/precompute_latents.py`, besides those of the recipe."""

    latent_batch_size: int = field(default=16, metadata={"help": "Pictures that the VAE encodes at a time."})
    shard_size: int = field(default=1000, metadata={"help": "Pictures per file."})
    num_verified: int = field(default=16, metadata={"help": "Pictures encoded once more at the end, for comparison."})


def pictures(dataset: MixedDataset, report: DataReport, part: tuple[int, int]) -> Iterator[Image.Image]:
    """Every picture that the sources can give, mirrored too where they are flipped; some come more than once."""
    seen = set()
    for source in dataset.sources:
        reader = source.reader
        # The same files and reader, whatever they are called. Files of the Hub do not tell configurations apart.
        on_disk = all(isinstance(shard, Path) for shard in reader.shards)
        files = (type(reader), *(reader.shards if on_disk else [reader.name]))
        if files in seen:
            continue
        seen.add(files)
        # A reader leaves out pictures at random; another pass would want those.
        for name, value in {"max_images": sys.maxsize, "single_image_drop": 0.0}.items():
            if hasattr(reader, name):
                setattr(reader, name, value)
        for _, record in ReaderPass(reader, report, source.seed, share=part, max_skipped=source.max_skipped):
            for image in record["images"]:
                yield image
                if source.flip:
                    yield mirrored(image)


@torch.no_grad()
def encode(decoder: DeemImageDecoder, processor: DeemProcessor, images: list[Image.Image]) -> torch.Tensor:
    """Pictures -> (N, 8, s, s) on the CPU, see `DeemImageDecoder.encode_posterior`."""
    targets = processor.image_processor(images, return_targets=True, return_tensors="pt")["target_pixel_values"]
    return decoder.encode_posterior(targets.to(decoder.device)).cpu()


def fill(
    folder: Path,
    decoder: DeemImageDecoder,
    processor: DeemProcessor,
    images: Iterator[Image.Image],
    arguments: LatentArguments,
    part: tuple[int, int] = (0, 1),
) -> tuple[list[Image.Image], set[str]]:
    """Encode the pictures that the folder does not hold yet.

    Returns:
        Some of all pictures, for `compare`, and the keys of all, for `check_complete`.

    Raises:
        ValueError: the folder holds latents of another VAE or transform, or a broken file.
    """
    vae, transform = vae_id(decoder.vae), transform_id(processor)
    folder.mkdir(parents=True, exist_ok=True)
    known = set(LatentCache(folder, vae, transform).shard_of) if any(folder.glob(f"*{SUFFIX}")) else set()
    waiting: dict[str, Image.Image] = {}
    made: dict[str, torch.Tensor] = {}
    sampled: list[Image.Image] = []
    seen: set[str] = set()
    # Behind the last file, not as many as there are: where one was deleted, that is the number of another.
    numbers = [int(file.stem.split("-")[1]) for file in folder.glob(f"{part[0]:03d}-*{SUFFIX}")]
    number = 1 + max(numbers, default=-1)

    def encode_waiting() -> None:
        if waiting:
            encoded = encode(decoder, processor, list(waiting.values()))
            made.update(
                (key, one.clone(memory_format=torch.contiguous_format))
                for key, one in zip(waiting, encoded, strict=True)
            )
            waiting.clear()

    def write() -> None:
        nonlocal number, made
        if made:
            write_shard(folder / f"{part[0]:03d}-{number:05d}{SUFFIX}", made, vae, transform)
            number, made = number + 1, {}

    for index, image in enumerate(tqdm(images, "pictures")):
        if index % 97 == 0 and len(sampled) < arguments.num_verified:
            sampled.append(image)
        seen.add(key := picture_key(image))
        if key in known:
            continue
        known.add(key)
        waiting[key] = image
        if len(waiting) == arguments.latent_batch_size:
            encode_waiting()
        if len(made) >= arguments.shard_size:
            write()
    encode_waiting()
    write()
    return sampled, seen


def check_complete(cache: LatentCache, seen: set[str]) -> None:
    """Raises ValueError if the cache lacks one of the pictures that a run has come across."""
    if missing := [key for key in seen if key not in cache]:
        raise ValueError(
            f"{len(missing)} of {len(seen)} pictures are not in {cache.folder} although they were encoded: did something "
            "else write there? Start the same command again."
        )


def compare(
    cache: LatentCache, decoder: DeemImageDecoder, processor: DeemProcessor, images: list[Image.Image]
) -> float:
    """Largest difference between the cache and pictures encoded now.

    Raises:
        ValueError: it is above 1e-3.
    """
    worst = 0.0
    for image in images:
        worst = max(worst, float((cache[picture_key(image)] - encode(decoder, processor, [image])[0]).abs().max()))
    if worst > 1e-3:
        raise ValueError(f"A picture encoded once more differs from {cache.folder} by {worst:.2g}: compute it anew.")
    return worst


def main() -> None:
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(f"{__doc__}\nAll options: python {sys.argv[0]} pretrain --help")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        raise ValueError(f"The first word names the recipe to compute for: {' or '.join(RECIPES)}.")
    recipe = RECIPES[sys.argv[1]]
    parsed = parse_recipe((*recipe.ARGUMENTS, LatentArguments), recipe.CONFIG, sys.argv[2:])
    model_args, run_args, data_args, training_args, arguments = parsed
    if run_args.latents is None:
        raise ValueError("--latents missing: the folder for the latents, which training is then given too.")
    model, processor = recipe.load(model_args, run_args, data_args, training_args.seed)
    decoder = model.image_decoder.to(training_args.device).eval()
    state = PartialState()
    sources = replace(data_args, data=[*data_args.data, *run_args.eval_data], data_probs=None, data_weights="equal")
    dataset, report = build_dataset(sources, processor, batch_size=1, seed=training_args.seed)
    part = (state.process_index, state.num_processes)
    folder = Path(run_args.latents)
    sampled, seen = fill(folder, decoder, processor, pictures(dataset, report, part), arguments, part)
    state.wait_for_everyone()
    cache = LatentCache(folder, vae_id(decoder.vae), transform_id(processor))
    check_complete(cache, seen)
    worst = compare(cache, decoder, processor, sampled)
    if state.is_main_process:
        cache.verify()
        print(report)
        print(
            f"{len(cache)} pictures in {folder}, read back; {len(sampled)} encoded again differ by {worst:.1g} at most"
        )


if __name__ == "__main__":
    main()
