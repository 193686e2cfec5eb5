# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What several processes need beyond one: exact weights of the losses, and ranks that take the same way through a model.

DDP copes with parts that a rank does not use (`ddp_find_unused_parameters`). FSDP2 and DeepSpeed ZeRO gather and reduce
the parameters of a part as it is passed: a rank without pictures, or with one loss less, would keep the others waiting
for ever. `same_way` gives every rank the same parts to pass, and changes no loss and no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from modeling_deem.image_states_deem import supervised_images

LOSSES = ("text_loss", "image_loss", "consistency_loss")
PICTURES = ("pixel_values", "target_pixel_values", "target_latents")  # the forms in which a model is given pictures


def loss_counts(batch: dict[str, Any], config: Any, weights: dict[str, float]) -> dict[str, int]:
    """What each loss of a micro-batch is a mean over: text targets, supervised images, images.

    Args:
        batch: of `DeemDataCollator`, on any device.
        config: `DeemConfig`.
        weights: of the losses; what has weight 0 is not learned from and counts 0.
    """
    counts = dict.fromkeys(LOSSES, 0)
    if batch.get("labels") is not None:
        counts["text_loss"] = int((batch["labels"][:, 1:] != -100).sum())
    targets = batch.get("target_latents", batch.get("target_pixel_values"))
    if targets is not None:
        counts["consistency_loss"] = len(targets)
        if weights["image_loss"] and config.image_decoder_config is not None:
            counts["image_loss"] = int(supervised_images(batch, config).sum())
    return {name: count if weights[name] else 0 for name, count in counts.items()}


def same_way(
    batch: dict[str, Any], config: Any, weights: dict[str, float], gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """The micro-batch as this rank must pass it through the model for all ranks to use the same parts.

    If any rank has pictures, one without gets a blank one in a row of its own; a loss that any rank computes, all do.
    The caller multiplies what is computed for company by 0.

    Args:
        config: `DeemConfig`.
        weights: of the losses on this rank.
        gather: joins a tensor (k,) of every rank to (ranks * k,); called once, on every rank.
    """
    shapes = {name: tuple(batch[name].shape[1:]) if name in batch else (0, 0, 0) for name in PICTURES}
    mine = [size for shape in shapes.values() for size in shape] + [int(weights[name] != 0) for name in LOSSES]
    together = gather(torch.tensor(mine, device=batch["input_ids"].device)).view(-1, len(mine)).amax(0).tolist()
    computed = {f"{name}_weight": (weights[name] or 1.0) * together.pop() for name in reversed(LOSSES)}
    shapes = {name: together[3 * index : 3 * index + 3] for index, name in enumerate(PICTURES)}
    if shapes["pixel_values"][0] and "pixel_values" not in batch:
        batch = with_blank_image(batch, config, {name: shape for name, shape in shapes.items() if shape[0]})
    return batch | computed


def with_blank_image(batch: dict[str, Any], config: Any, shapes: dict[str, Sequence[int]]) -> dict[str, Any]:
    """A micro-batch of text with one row more, which holds a gray picture and nothing to learn.

    Args:
        shapes: of the picture in each form that the model is to be given, without the batch dimension.
    """
    input_ids, start, image = batch["input_ids"], config.start_of_image_token_id, config.image_token_id
    row = torch.tensor([config.bos_token_id or 0, start, *[image] * config.num_image_tokens], device=input_ids.device)
    length = max(input_ids.shape[1], len(row))
    mask = batch.get("attention_mask", torch.ones_like(input_ids))

    def appended(rows: torch.Tensor, row: torch.Tensor, padding: int) -> torch.Tensor:
        rows = F.pad(rows, (0, length - rows.shape[1]), value=padding)
        return torch.cat([rows, F.pad(row, (0, length - len(row)), value=padding)[None]])

    texts = {
        "input_ids": appended(input_ids, row, config.pad_token_id or 0),
        "attention_mask": appended(mask, torch.ones_like(row), 0),
    }
    if "labels" in batch:
        texts["labels"] = appended(batch["labels"], torch.full_like(row, -100), -100)
    return batch | texts | {name: torch.zeros(1, *shape, device=row.device) for name, shape in shapes.items()}
