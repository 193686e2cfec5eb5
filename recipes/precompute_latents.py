# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Encode every image of a training run once, so that training needs no VAE (see recipes/training/latent_cache.py).

    python recipes/precompute_latents.py pretrain --config recipes/configs/pretrain_cpu.yaml --latents runs/latents
    python recipes/pretrain.py --config recipes/configs/pretrain_cpu.yaml --latents runs/latents

The first word names the recipe, whose options are all taken. With `accelerate launch` the processes share the files. The
same command started again encodes only what is missing. At the end all files are read back, and some images are encoded
once more.
"""

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from recipes import pretrain, sft
from recipes.data.sources import build_dataset
from recipes.training.defaults import parse_recipe
from recipes.training.latent_cache import LatentCache, transform_id, vae_id
from recipes.training.latent_writer import LatentArguments, check_complete, compare, fill, read_images

RECIPES = {"pretrain": pretrain, "sft": sft}


def main() -> None:
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(f"{__doc__}\nAll options: python {sys.argv[0]} pretrain --help")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in RECIPES:
        raise ValueError(f"The first word names the recipe to compute for: {' or '.join(RECIPES)}.")
    recipe = RECIPES[sys.argv[1]]
    default = pretrain.default_config(sys.argv[2:]) if recipe is pretrain else recipe.CONFIG
    parsed = parse_recipe((*recipe.ARGUMENTS, LatentArguments), default, sys.argv[2:])
    model_args, run_args, data_args, training_args, latent_args = parsed
    if run_args.latents is None:
        raise ValueError("--latents missing: the folder for the latents, which training is then given too.")
    model, processor = recipe.load(model_args, run_args, data_args, training_args.seed)
    decoder = model.image_decoder.to(training_args.device).eval()
    sources = replace(data_args, data=[*data_args.data, *run_args.eval_data], data_probs=None, data_weights="equal")
    dataset, report = build_dataset(sources, processor, batch_size=1, seed=training_args.seed)
    state = PartialState()
    images = read_images(dataset, report, (state.process_index, state.num_processes))
    folder = Path(run_args.latents)
    sampled, seen = fill(folder, decoder, processor, images, latent_args, state.process_index)
    state.wait_for_everyone()
    cache = LatentCache(folder, vae_id(decoder.vae), transform_id(processor))
    check_complete(cache, seen)
    worst = compare(cache, decoder, processor, sampled)
    if state.is_main_process:
        cache.verify()
        print(report)
        print(
            f"{len(cache)} images in {folder}, read back; {len(sampled)} encoded again differ by {worst:.1g} at most"
        )


if __name__ == "__main__":
    main()
