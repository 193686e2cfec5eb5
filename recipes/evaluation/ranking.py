# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""How likely each of many answers is to one question, behind one prompt that a model reads once.

The prompt, images included, is read once and its cache is repeated for the options. Models that do not go on behind a
repeated cache, which a few options show, read the prompt again with each option, which gives the same scores.
"""

import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Rows = tuple[torch.Tensor, torch.Tensor]


def option_token_ids(tokenizer: Any, options: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each option, tokenized alone and without special tokens.

    Raises:
        ValueError: an option has no tokens.
    """
    ids = [tokenizer(option, add_special_tokens=False).input_ids for option in options]
    if empty := [option for option, row in zip(options, ids, strict=True) if not row]:
        raise ValueError(f"The option {empty[0]!r} has no tokens, so that it has no likelihood.")
    return ids


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel, inputs: dict[str, Any], options: Sequence[Sequence[int]], size: int, once: bool = True
) -> list[float]:
    """Return, for each option, the sum of the log-probabilities of its tokens behind the prompt.

    Args:
        inputs: of the model, one row without padding; tensors alone where the prompt is not read once.
        options: tokens of each.
        size: options at a time.
        once: read the prompt once; otherwise with each batch of options.
    """
    if not once:
        return [score for rows in _padded(options, size, model.device) for score in _read_whole(model, inputs, *rows)]
    read = model(**inputs, use_cache=True)
    first = read.logits[0, -1].float().log_softmax(-1)
    scores: list[float] = []
    for ids, mask in _padded(options, size, model.device):
        scores += (first[ids[:, 0]].double() + _read_behind(model, inputs, read, ids, mask)).tolist()
    return scores


TOLERANCE = {torch.float32: 1e-3}  # of the log-probability of a token, by the model's dtype
COARSE = 0.1  # the same for other dtypes
PROBED = 3  # options, the longest


@torch.inference_mode()
def goes_on_behind_cache(model: PreTrainedModel, inputs: dict[str, Any], options: Sequence[Sequence[int]]) -> bool:
    """Return whether a model gives options the same likelihoods behind a repeated cache as behind the whole prompt.

    A model that does not is warned of; it is slower, and no less right.
    """
    probe = sorted(options, key=len)[-PROBED:]
    plain = log_likelihoods(model, inputs, probe, PROBED, once=False)
    try:
        behind = log_likelihoods(model, inputs, probe, PROBED)
        error = max(abs(one - other) / len(row) for one, other, row in zip(behind, plain, probe, strict=True))
        reason = f"likelihoods differ by {error:.3g} a token"
        sound = error <= TOLERANCE.get(model.dtype, COARSE)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as failure:  # as the model has it
        sound, reason = False, f"{type(failure).__name__}: {failure}"
    if not sound:
        warnings.warn(
            f"{type(model).__name__} does not go on behind a repeated cache ({reason}); the prompt is read with each batch "
            "of options instead, which is slower.",
            stacklevel=2,
        )
    return sound


def _padded(options: Sequence[Sequence[int]], size: int, device: torch.device) -> Iterator[Rows]:
    """Yield ids and mask (n, L) of batches of options, padded on the right."""
    for start in range(0, len(options), size):
        rows = [torch.tensor(row) for row in options[start : start + size]]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        yield ids, (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()


def _read_behind(
    model: PreTrainedModel, inputs: dict[str, Any], read: Any, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return the summed log-probabilities (n,) of all tokens but the first, behind the cache of the prompt."""
    number = len(ids)
    if ids.shape[1] == 1:
        return torch.zeros(number, dtype=torch.double, device=ids.device)
    cache = deepcopy(read.past_key_values)
    cache.batch_repeat_interleave(number)
    given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if (states := getattr(read, "image_states", None)) is not None:  # DEEM: what the prompt's tokens see
        given["image_states"] = states.repeat(number)
    places = inputs["input_ids"].shape[1] + torch.arange(ids.shape[1] - 1, device=ids.device)
    if (
        shift := getattr(getattr(model, "model", None), "rope_deltas", None)
    ) is not None:  # of Qwen-VL, whose images take fewer places
        given["position_ids"] = (places + shift.to(places)).expand(3, number, -1)
    before = inputs["attention_mask"].expand(number, -1)
    logits = model(input_ids=ids[:, :-1], attention_mask=torch.cat([before, mask[:, :-1]], dim=1), **given).logits
    return _summed(logits, ids[:, 1:], mask[:, 1:])


def _read_whole(model: PreTrainedModel, inputs: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """Return the summed log-probabilities (n,) of options, each read with the prompt before it."""
    number, length = len(ids), inputs["input_ids"].shape[1]
    given: dict[str, Any] = {}
    for name, value in inputs.items():
        if value.shape[:2] == (1, length):  # of the tokens
            behind = {"input_ids": ids, "attention_mask": mask}.get(name, torch.zeros_like(ids))
            given[name] = torch.cat([value.expand(number, -1), behind.to(value)], dim=1)
        else:
            given[name] = value.repeat(number, *[1] * (value.ndim - 1))
    logits = model(**given, use_cache=False).logits[:, length - 1 : -1]
    return _summed(logits, ids, mask).tolist()


def _summed(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    chosen = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (chosen.double() * mask).sum(1)
