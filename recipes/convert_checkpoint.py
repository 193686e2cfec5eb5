# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Checkpoints of the original DEEM and its relatives -> checkpoints of this package. Every tensor is accounted for.

    python recipes/convert_checkpoint.py --source official --weights state_dict.safetensors --config config.json \
        --tokenizer VICUNA_FOLDER --out DIR

Sources:
    official        a state dict of the released code -> a DEEM checkpoint with its processor. `--config` holds the
                    hyper-parameters (depths and dims of the trunk, llm, perceivers, unet, vae, scheduler, ...), with
                    the keys of `deem_config`.
    open_clip       a CLIP ConvNeXt state dict -> an encoder folder, ready for `from_vision_text_diffusion_pretrained`.
    mm_interleaved  DEEM's parent. Its language side, perceivers and diffusion side have the same structure; its
                    vision encoder (CLIP ViT-L with an adapter) has no counterpart here and starts from an open_clip
                    ConvNeXt given as `--extra`, or fresh. Only names were compared with descriptions, no such
                    checkpoint was at hand; a name that does not fit stops the conversion.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import logging as transformers_logging
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_deem import DeemConfig, DeemForConditionalGeneration, DeemImageProcessorPil, DeemProcessor
from recipes.original.names import (
    FRESH,
    HEAD,
    HEAD_NEW,
    RECOMPUTED,
    RULES,
    UNUSED,
    UNUSED_WITHOUT_DIFFUSION,
    convert_value,
    find,
    rename,
)
from recipes.original.sizes import deem_config

SOURCES = ("official", "open_clip", "mm_interleaved")
REPORT = "conversion.json"

# ---- conversion -------------------------------------------------------------------------------------------------------


@dataclass
class Conversion:
    """What became of every tensor.

    Attributes:
        state: target name -> tensor.
        sources: source name -> [outcome, target or reason]; outcomes: converted, merged, duplicate, recomputed, unused.
        fresh: target name -> why no source gives it; the model's own initialization does.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Counts, and every source that was not simply converted, grouped by reason."""
        counts = Counter(outcome for outcome, _ in self.sources.values())
        lines = [f"{len(self.sources)} source tensors: " + ", ".join(f"{n} {name}" for name, n in counts.items())]
        other: dict[str, list[str]] = {}
        for name, (outcome, what) in self.sources.items():
            if outcome not in ("converted", "merged"):
                other.setdefault(f"{outcome}: {what}", []).append(name)
        for name, reason in self.fresh.items():
            other.setdefault(f"fresh: {reason}", []).append(name)
        for reason, names in other.items():
            shown = ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
            lines.append(f"  {reason}\n    {shown}")
        lines.append(
            f"{len(self.state) + len(self.fresh)} target tensors: {len(self.state)} filled, {len(self.fresh)} fresh"
        )
        return "\n".join(lines)


def convert(
    weights: dict[str, torch.Tensor],
    shapes: dict[str, torch.Size],
    source: str = "official",
    expected: Iterable[str] = (),
    new_tokens: int | None = None,
) -> Conversion:
    """Renames and reshapes a source's state dict.

    Args:
        weights: source name -> tensor.
        shapes: target name -> shape, of the model to fill.
        source: one of `SOURCES`.
        expected: source names that must be there, where they are known.
        new_tokens: how many rows the head of new tokens must have, where it is known.

    Raises:
        ValueError: naming the tensor, for one that has no place, is missing, has another shape, or differs from the
            value that the model computes (position tables) or from its duplicate.
    """
    unused = UNUSED[source]
    if not any(name.startswith("image_decoder.") for name in shapes):
        unused = unused + UNUSED_WITHOUT_DIFFUSION
    check_present(weights, source, expected)
    result, added, came_from = Conversion(), {}, {}
    for name, tensor in weights.items():
        if (compute := find(name, RECOMPUTED)) is not None:
            check_recomputed(name, tensor, compute(tensor))
            result.sources[name] = ["recomputed", "equal to what the model computes"]
            continue
        if (reason := find(name, unused)) is not None:
            result.sources[name] = ["unused", reason]
            continue
        target = rename(name, RULES[source])
        if target not in shapes:
            raise ValueError(
                f"Unexpected tensor {name!r} {tuple(tensor.shape)}: its place would be {target!r}, which the model of "
                "this config does not have. Check that --source and --config belong to the weights."
            )
        if HEAD_NEW.match(name):
            added[name] = target
            result.sources[name] = ["merged", f"added to the last rows of {target}"]
            continue
        value = convert_value(name, tensor, shapes[target])
        check_shape(name, tensor, value.shape, target, shapes[target])
        if target in result.state:
            if not torch.equal(value, result.state[target]):
                raise ValueError(f"{name!r} and {came_from[target]!r} should be one tensor, but their values differ.")
            result.sources[name] = ["duplicate", f"of {came_from[target]}"]
            continue
        result.state[target], came_from[target] = value.contiguous().clone(), name
        result.sources[name] = ["converted", target]
    for name, target in added.items():
        add_new_rows(result.state[target], name, weights[name], target, new_tokens)
    result.fresh = started_anew(result.state, shapes, source)
    return result


def check_present(weights: dict[str, torch.Tensor], source: str, expected: Iterable[str]) -> None:
    """Refuse weights that lack an expected tensor, or the head's new rows that belong to a head."""
    given = {rename(name, RULES[source]) for name in weights if not HEAD_NEW.match(name)}
    expected = set(expected) | {name.replace(".head.", ".head_new.") for name in weights if HEAD.match(name)}
    absent = sorted(
        name
        for name in expected - weights.keys()
        if HEAD_NEW.match(name) or rename(name, RULES[source]) not in given  # under its other name
    )
    if absent:
        raise ValueError(
            f"{len(absent)} tensors are missing from the weights: {shorten(absent)}. Give the file that holds them "
            "with --extra."
        )


def add_new_rows(
    whole: torch.Tensor, name: str, rows: torch.Tensor, target: str, new_tokens: int | None = None
) -> None:
    """Add the head of the new tokens to the last rows of the whole head, in place."""
    given = whole[-(len(rows) if new_tokens is None else new_tokens) :]
    check_shape(name, rows, rows.shape, f"the last rows of {target}", given.shape)
    merged = whole[-len(rows) :].float() + rows.float()
    whole[-len(rows) :] = merged.to(whole.dtype)


def started_anew(state: dict[str, torch.Tensor], shapes: dict[str, torch.Size], source: str) -> dict[str, str]:
    """Tensors of the model that no source has and that start fresh, with the reason; any other missing one is an error."""
    missing = [name for name in shapes if name not in state]
    fresh = {name: reason for name in missing if (reason := find(name, FRESH[source])) is not None}
    if lost := [name for name in missing if name not in fresh]:
        raise ValueError(
            f"{len(lost)} tensors of the model are missing from the weights (under our names): {shorten(lost)}. "
            "Give the file that holds them with --extra, or the config that belongs to the weights."
        )
    return fresh


def shorten(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def check_shape(name: str, tensor: torch.Tensor, given: torch.Size, target: str, expected: torch.Size) -> None:
    if given != expected:
        raise ValueError(
            f"{name!r} has shape {tuple(tensor.shape)}, but {target!r} needs {tuple(expected)}"
            f"{f' (it gives {tuple(given)})' if given != tensor.shape else ''}. The config does not belong to the weights."
        )


def check_recomputed(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2 * max(torch.finfo(tensor.dtype).eps, 1e-6)
    if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, rtol=0, atol=tolerance):
        off = (
            f"by {(tensor.float() - expected).abs().max():.2e}"
            if tensor.shape == expected.shape
            else f"in shape: {tuple(tensor.shape)} instead of {tuple(expected.shape)}"
        )
        raise ValueError(f"{name!r} differs from what the model computes {off}. It was trained or made otherwise.")


# ---- configs ----------------------------------------------------------------------------------------------------------


def config_of_weights(source: dict[str, Any], weights: dict[str, torch.Tensor], **overrides: Any) -> DeemConfig:
    """`deem_config`, with what only the weights tell: the position table's side, and whether there are region tokens."""
    table = weights.get("visual_tokenizer.pos_embed")
    side = 16 if table is None else round((table.shape[0] - 1) ** 0.5)
    region = any(name.startswith("visual_tokenizer.feature_extractor.") for name in weights)
    return deem_config(source, position_grid_side=side, use_region_tokens=region, **overrides)


def convnext_config(weights: dict[str, torch.Tensor], image_size: int) -> ConvNextConfig:
    """The encoder's config, read off the shapes of an open_clip state dict."""
    blocks = [re.match(r"visual\.trunk\.stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.weight$", name) for name in weights]
    sizes = {(int(m[1]), int(m[2])): weights[m[0]].shape[0] for m in blocks if m}
    if not sizes:
        raise ValueError(
            "The weights have no 'visual.trunk.stages.*.blocks.*.conv_dw.weight': expected the state dict of an "
            "open_clip model with a timm ConvNeXt trunk."
        )
    stages = range(max(stage for stage, _ in sizes) + 1)
    return ConvNextConfig(
        depths=[sum(place[0] == stage for place in sizes) for stage in stages],
        hidden_sizes=[sizes[stage, 0] for stage in stages],
        num_stages=len(stages),
        layer_norm_eps=1e-6,
        image_size=image_size,
    )


# ---- files ------------------------------------------------------------------------------------------------------------


def load_weights(paths: Iterable[str | Path], allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of one or several files.

    Raises:
        ValueError: for a `.bin` without `allow_pickle`, another kind of file, or a name with two values.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in map(Path, paths):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.suffix in (".bin", ".pt", ".pth"):
            if not allow_pickle:
                raise ValueError(
                    f"{path} is a pickle. Convert it to .safetensors, or read it with --allow-pickle (only tensors "
                    "are unpickled, nothing is executed)."
                )
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
            if others := [name for name, value in tensors.items() if not torch.is_tensor(value)]:
                raise ValueError(f"{path} holds more than tensors: {others[:5]}. Expected a state dict.")
        else:
            raise ValueError(f"{path} is neither .safetensors nor .bin.")
        for name, tensor in tensors.items():
            if name in weights and not torch.equal(weights[name], tensor):
                raise ValueError(f"{name!r} of {path} has another value in an earlier file. Leave one of them out.")
        weights |= tensors
    return dict(sorted(weights.items()))


def number_tokenizer(config: DeemConfig) -> PreTrainedTokenizerFast:
    """A stand-in for test models that have no tokenizer: words are token ids, "10 11 12" is [10, 11, 12]."""
    special = {config.bos_token_id: "<s>", config.eos_token_id: "</s>", config.pad_token_id: "<pad>"}
    first_new = min(config.image_token_id, config.start_of_image_token_id)
    names = [special.get(index, str(index)) for index in range(first_new)]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name) for name in special.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def build_processor(config: DeemConfig, source: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> DeemProcessor:
    """The processor of a converted model; its special tokens must have the ids that the model was trained with.

    Raises:
        ValueError: if they have not.
    """
    if "<|sniffer|>" in tokenizer.get_vocab():
        raise ValueError(
            "The tokenizer already has the released image tokens ('<|sniffer|>'). Give the language model's own, "
            f"with the {min(config.image_token_id, config.start_of_image_token_id)} tokens it was trained with."
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    processor = DeemProcessor.from_parts(
        ConvNextImageProcessorPil(
            size={"shortest_edge": source["image_size"]}, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD
        ),
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        target_size=source["dec_image_size"],
        grounding_tokens=True,
    )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "start_of_image_token_id"):
        owner = processor if "image" in name else processor.tokenizer
        if getattr(owner, name) != getattr(config, name):
            raise ValueError(
                f"The tokenizer gives {name} = {getattr(owner, name)}, but the model was trained with "
                f"{getattr(config, name)}. Give the tokenizer of its language model, without added tokens."
            )
    return processor


def largest_dtype(state: dict[str, torch.Tensor]) -> torch.dtype:
    """The floating type of most elements."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
    return sizes.most_common(1)[0][0]


def shapes_of(build: Callable[[], torch.nn.Module]) -> dict[str, torch.Size]:
    """Names and shapes of a model's state, without its memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build().state_dict().items()}


def save(model_class: type, config: Any, conversion: Conversion, out: Path) -> torch.nn.Module:
    """Writes the model and the account of its conversion."""
    verbosity = transformers_logging.get_verbosity()
    if conversion.fresh:
        transformers_logging.set_verbosity_error()  # listed by the summary, with reasons
    torch.manual_seed(0)  # fresh tensors are the same each time
    try:
        model = model_class.from_pretrained(
            None, config=config, state_dict=dict(conversion.state), dtype=largest_dtype(conversion.state)
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if model_class is DeemForConditionalGeneration:
        model.generation_config.bos_token_id = config.bos_token_id
        model.generation_config.eos_token_id = [config.eos_token_id, config.start_of_image_token_id]
        model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(out)
    account = {"sources": conversion.sources, "fresh": conversion.fresh}
    (out / REPORT).write_text(json.dumps(account, indent=1) + "\n")
    return model


def convert_deem(args: argparse.Namespace, weights: dict[str, torch.Tensor]) -> Conversion:
    if args.config is None:
        raise ValueError(f"--source {args.source} needs --config, the hyper-parameters of the weights as JSON.")
    source = json.loads(Path(args.config).read_text())
    config = config_of_weights(source, weights)
    tokenizer = None
    if args.tokenizer not in (None, "none"):
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    elif args.tokenizer is None and config.text_config.vocab_size < 1000:
        tokenizer = number_tokenizer(config)
        print("No --tokenizer: this test-sized vocabulary gets one whose words are token ids ('10 11 12').")
    elif args.tokenizer is None:
        raise ValueError(
            f"A vocabulary of {config.text_config.vocab_size} needs its tokenizer: --tokenizer FOLDER of the language "
            "model (Vicuna). --tokenizer none writes the model and its image processor only."
        )
    processor = (
        DeemImageProcessorPil(size=source["image_size"], target_size=source["dec_image_size"])
        if tokenizer is None
        else build_processor(config, source, tokenizer)
    )
    shapes = shapes_of(lambda: DeemForConditionalGeneration(config))
    expected = [*source.get("requires_grad", []), *source.get("frozen", [])]
    new_tokens = config.text_config.vocab_size - min(config.image_token_id, config.start_of_image_token_id)
    conversion = convert(weights, shapes, args.source, expected, new_tokens)
    save(DeemForConditionalGeneration, config, conversion, args.out)
    processor.save_pretrained(args.out)
    return conversion


def convert_encoder(args: argparse.Namespace, weights: dict[str, torch.Tensor]) -> Conversion:
    settings = json.loads(Path(args.config).read_text()) if args.config else {}
    vision = settings.get("model_cfg", settings).get("vision_cfg", settings)
    preprocess = settings.get("preprocess_cfg", {})
    config = convnext_config(weights, vision.get("image_size", 256))
    conversion = convert(weights, shapes_of(lambda: ConvNextModel(config)), args.source)
    save(ConvNextModel, config, conversion, args.out)
    ConvNextImageProcessorPil(
        size={"shortest_edge": config.image_size},
        image_mean=preprocess.get("mean", OPENAI_CLIP_MEAN),
        image_std=preprocess.get("std", OPENAI_CLIP_STD),
    ).save_pretrained(args.out)
    return conversion


def main(argv: list[str] | None = None) -> Conversion:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=SOURCES, required=True)
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
