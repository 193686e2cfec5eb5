# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a model gives of its images, in whatever form -> one row of tokens per image.

Letters: N images, L tokens of an image (differs from image to image), W their width, B rows of text, T text tokens.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

DOOR = "mm_encoder_outputs"


def check_door(model: nn.Module) -> None:
    """Check that a model takes images that are encoded already.

    Raises:
        ValueError: its forward has no argument `mm_encoder_outputs`, or it has no `get_image_features`.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # of peft
    missing = [] if hasattr(plain, "get_image_features") else ["no method get_image_features"]
    if DOOR not in inspect.signature(plain.forward).parameters:
        missing.append(f"no argument {DOOR} of its forward")
    if missing:
        raise ValueError(
            f"{type(plain).__name__} has {' and '.join(missing)}: the feedback and the language model would see "
            f"different passes of the encoder. Models with this door in transformers 5.23 are LLaVA, LLaVA-OneVision, "
            "Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM, PaliGemma, Gemma 3 and others; of any model source='encoder' works on "
            "the vision encoder alone."
        )


def source_size(config: Any, source: str) -> int:
    """Return the width of what `source` names, read off a model's config.

    Raises:
        ValueError: the config does not say, or the model has no such source.
    """
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    if source != "encoder":
        if text is config and vision is None:
            raise ValueError(
                f"source is {source!r}, but {config.model_type!r} is no vision-language model: use source='encoder'."
            )
        return text.hidden_size
    vision = config if vision is None else vision
    size = getattr(vision, "hidden_size", None) or (getattr(vision, "hidden_sizes", None) or [None])[-1]
    if size is None:
        raise ValueError(f"The config of {vision.model_type!r} says no hidden_size: give source_size.")
    return size


def has_first_token(model: nn.Module) -> bool:
    """Whether the tokens of a model's vision encoder begin with one for the whole image (CLS)."""
    names = ("class_embedding", "cls_token")
    return any(name.split(".")[-1] in names for name, _ in model.named_parameters())


def image_units(images: Any) -> list[torch.Tensor]:
    """What a model makes of images for its language model, one (L, W) for each unit that it tells apart.

    A unit is an image, or a tile of one; of SmolVLM all images of a row of the batch.

    Args:
        images: what `get_image_features` returned.

    Raises:
        ValueError: it is something else.
    """
    given = getattr(images, "pooler_output", None)
    if given is None or (isinstance(given, torch.Tensor) and given.dim() != 3):
        raise ValueError(
            f"images are of type {type(images).__name__}, without image tokens in pooler_output: give what "
            "model.get_image_features(..., return_dict=True) returned."
        )
    return [unit for unit in given if len(unit)]  # a row of text alone has an empty one


def group(units: list[torch.Tensor], count: int, num_tiles: Sequence[int] | None) -> list[torch.Tensor]:
    """Join units (L, W) to `count` images, (L', W) each.

    Args:
        num_tiles: of each image; needed where units are not images.

    Raises:
        ValueError: their numbers do not fit.
    """
    if len(units) == count:
        return units
    if num_tiles is None:
        raise ValueError(
            f"{count} target images, but the model gives tokens of {len(units)}. Give one target per image, in their order; "
            "where the model cuts images into tiles, give num_tiles, the number of tiles of each."
        )
    num_tiles, tokens = [int(number) for number in num_tiles], torch.cat(units)
    per_tile, rest = divmod(len(tokens), max(sum(num_tiles), 1))
    if len(num_tiles) != count or rest:
        raise ValueError(
            f"num_tiles are {num_tiles} for {count} images and {len(tokens)} tokens: expected one number per image, and "
            "as many tokens in each tile."
        )
    return list(tokens.split([number * per_tile for number in num_tiles]))


def encoder_tokens(images: Any, count: int, num_tiles: Sequence[int] | None) -> list[torch.Tensor]:
    """The encoder's last hidden states of each image, (L, W).

    Raises:
        ValueError: the model gives none, or of another number of images.
    """
    states = getattr(images, "last_hidden_state", None)
    if states is None:
        raise ValueError(
            f"source is 'encoder', but the {type(images).__name__} given has no last_hidden_state. Use source='tokens', "
            "or give the output of the vision encoder itself."
        )
    if states.dim() == 4:  # maps of an encoder in stages
        states = states.flatten(2).transpose(1, 2)
    if states.dim() == 3:
        return group(list(states), count, num_tiles)
    units = image_units(images)  # patches of all images in one row (Qwen): in proportion to their tokens
    per_token, rest = divmod(len(states), sum(len(unit) for unit in units))
    if rest:
        raise ValueError(
            f"{len(states)} patches for {sum(len(unit) for unit in units)} image tokens: which patches are whose cannot be "
            "told. Use source='tokens'."
        )
    return group(list(states.split([per_token * len(unit) for unit in units])), count, num_tiles)


def language_tokens(
    images: Any,
    count: int,
    num_tiles: Sequence[int] | None,
    hidden_states: torch.Tensor | None,
    image_mask: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The language model's hidden states (B, T, W) at the tokens of each image, (L, W).

    Args:
        image_mask: bool (B, T), where image tokens stand.

    Raises:
        ValueError: one of them is missing, or their numbers do not fit.
    """
    if hidden_states is None or image_mask is None:
        raise ValueError(
            "source is 'language': give hidden_states, outputs.hidden_states[-1] of model(..., output_hidden_states=True), "
            "and image_mask, input_ids == model.config.image_token_id."
        )
    units, found = image_units(images), hidden_states[image_mask.bool()]
    if len(found) != (expected := sum(len(unit) for unit in units)):
        raise ValueError(f"image_mask holds {len(found)} tokens, but the images have {expected}.")
    return group(list(found.split([len(unit) for unit in units])), count, num_tiles)


def pad_tokens(tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens (L, W) of each image -> (N, longest, W) and the bool mask (N, longest); None where all are as long."""
    lengths = torch.tensor([len(one) for one in tokens])
    if len(lengths.unique()) == 1:
        return torch.stack(tokens), None
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return pad_sequence(tokens, batch_first=True), mask.to(tokens[0].device)


def count_tiles(model: nn.Module, images: Any, inputs: dict[str, Any], count: int) -> list[int] | None:
    """Return how many tiles each image of a batch was cut into; None where a tile is an image, or it cannot be told.

    Read off `image_sizes` (LLaVA-NeXT, LLaVA-OneVision), else off the runs of image tokens in the text (InternVL).

    Args:
        inputs: of the model's forward.
        count: number of images.
    """
    config, sizes = model.config, inputs.get("image_sizes")
    if sizes is not None and getattr(config, "image_grid_pinpoints", None):
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        whole = [number == 1 for number in inputs.get("batch_num_images", [1] * count) for _ in range(int(number))]
        side = config.vision_config.image_size
        numbers = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
        return [number if cut else 1 for number, cut in zip(numbers, whole, strict=True)]
    units, states = image_units(images), getattr(images, "last_hidden_state", None)
    if len(units) == count:
        tiles = count if states is None or states.dim() != 3 else len(states)
        per_tile = sum(len(unit) for unit in units) / max(tiles, 1)
        return None if tiles == count else [round(len(unit) / per_tile) for unit in units]
    if inputs.get("input_ids") is None:
        return None
    runs, per_tile = image_runs(inputs["input_ids"] == config.image_token_id), len(units[0])
    fits = len(runs) == count and all(run % per_tile == 0 for run in runs)
    return [run // per_tile for run in runs] if fits else None


def image_runs(is_image: torch.Tensor) -> list[int]:
    """Lengths of the runs of image tokens, where bool (B, T) is True, row by row."""
    starts = is_image & ~torch.nn.functional.pad(is_image, (1, 0))[:, :-1]
    return torch.bincount(starts.flatten().cumsum(0)[is_image.flatten()])[1:].tolist()
