# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Convert checkpoints of the original DEEM and its relatives to checkpoints of this package, tensor by tensor.

    python recipes/convert_checkpoint.py --source official --weights state_dict.safetensors --config config.json \
        --tokenizer VICUNA_FOLDER --out DIR

Sources:
    official        a state dict of the released code -> a DEEM checkpoint with its processor. `--config` holds the
                    hyper-parameters (depths and dims of the trunk, llm, perceivers, unet, vae, scheduler, ...), with
                    the keys of `deem_config` in recipes/original/sizes.py.
    open_clip       a CLIP ConvNeXt state dict -> an encoder folder, ready for `from_vision_text_diffusion_pretrained`.
    mm_interleaved  DEEM's parent. Its language side, perceivers and diffusion side have the same structure; its
                    vision encoder (CLIP ViT-L with an adapter) has no counterpart here and starts from an open_clip
                    ConvNeXt given as `--extra`, or fresh. Never run on such a checkpoint: the names are those of its
                    description, and a name that does not fit stops the conversion.

Writes the checkpoint and `conversion.json`: what became of every tensor.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import ConvNextImageProcessorPil, ConvNextModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_deem import DeemForConditionalGeneration
from recipes.original.conversion import Conversion, convert
from recipes.original.names import RULES
from recipes.original.processor import make_processor
from recipes.original.sizes import config_of_weights, convnext_config
from recipes.original.weights import REPORT, load_weights, save_model, shapes_of


def convert_deem(args: argparse.Namespace, weights: dict[str, torch.Tensor]) -> Conversion:
    """Convert a whole model and write it with its processor.

    `requires_grad` and `frozen` of the hyper-parameters, if there, list the tensors that the weights must have.
    """
    if args.config is None:
        raise ValueError(f"--source {args.source} needs --config, the hyper-parameters of the weights as JSON.")
    source = json.loads(Path(args.config).read_text())
    config = config_of_weights(source, weights)
    processor = make_processor(config, source, args.tokenizer)
    shapes = shapes_of(lambda: DeemForConditionalGeneration(config))
    expected = [*source.get("requires_grad", []), *source.get("frozen", [])]
    new_tokens = config.text_config.vocab_size - min(config.image_token_id, config.start_of_image_token_id)
    conversion = convert(weights, shapes, args.source, expected, new_tokens)
    save_model(DeemForConditionalGeneration, config, conversion, args.out)
    processor.save_pretrained(args.out)
    return conversion


def convert_encoder(args: argparse.Namespace, weights: dict[str, torch.Tensor]) -> Conversion:
    """Convert a vision encoder and write it with its image processor."""
    settings = json.loads(Path(args.config).read_text()) if args.config else {}
    vision = settings.get("model_cfg", settings).get("vision_cfg", settings)
    preprocess = settings.get("preprocess_cfg", {})
    config = convnext_config(weights, vision.get("image_size", 256))
    conversion = convert(weights, shapes_of(lambda: ConvNextModel(config)), args.source)
    save_model(ConvNextModel, config, conversion, args.out)
    ConvNextImageProcessorPil(
        size={"shortest_edge": config.image_size},
        image_mean=preprocess.get("mean", OPENAI_CLIP_MEAN),
        image_std=preprocess.get("std", OPENAI_CLIP_STD),
    ).save_pretrained(args.out)
    return conversion


def main(argv: list[str] | None = None) -> Conversion:
    """Read, convert and write, then print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=[*RULES], required=True)
    parser.add_argument("--weights", nargs="+", required=True, help=".safetensors files; .bin with --allow-pickle")
    parser.add_argument("--extra", nargs="+", default=[], help="further files whose tensors are added")
    parser.add_argument("--config", help="hyper-parameters, JSON (open_clip: its open_clip_config.json, optional)")
    parser.add_argument("--tokenizer", help="folder of the language model's tokenizer, or 'none'")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files (tensors only)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    weights = load_weights([*args.weights, *args.extra], args.allow_pickle)
    conversion = (convert_encoder if args.source == "open_clip" else convert_deem)(args, weights)
    print(conversion.summary())
    print(f"Written to {args.out}; the full account is in {REPORT}.")
    return conversion


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
