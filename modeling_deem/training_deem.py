# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`DeemTrainer`: transformers' Trainer that computes, scales and logs the three losses by name. No model needs this file."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .image_states_deem import supervised_images

LOSSES = ("text_loss", "image_loss", "consistency_loss")
IMAGE_INPUTS = ("pixel_values", "target_pixel_values", "target_latents")  # the forms in which a model is given images


def loss_counts(batch: dict[str, Any], config: Any, weights: dict[str, float]) -> dict[str, int]:
    """Return what each loss of a micro-batch is a mean over: text targets, supervised images, images.

    Args:
        batch: of `DeemDataCollator`, on any device.
        weights: of the losses; a loss of weight 0 counts 0.
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


def with_same_parts(
    batch: dict[str, Any], config: Any, weights: dict[str, float], gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    """Return the micro-batch as this rank must pass it through the model for all ranks to use the same parts.

    FSDP2 and DeepSpeed ZeRO gather and reduce the parameters of a part as it is passed: a rank without images, or with one
    loss less, would leave the others waiting for ever. If any rank has images, a rank without gets a blank one in a row
    of its own; a loss that any rank computes, all compute, and the caller multiplies it by 0.

    Args:
        weights: of the losses on this rank.
        gather: joins tensors (k,) of all ranks to (ranks * k,); called once.
    """
    shapes = {name: tuple(batch[name].shape[1:]) if name in batch else (0, 0, 0) for name in IMAGE_INPUTS}
    mine = [size for shape in shapes.values() for size in shape] + [int(weights[name] != 0) for name in LOSSES]
    together = gather(torch.tensor(mine, device=batch["input_ids"].device)).view(-1, len(mine)).amax(0).tolist()
    computed = {f"{name}_weight": (weights[name] or 1.0) * together.pop() for name in reversed(LOSSES)}
    shapes = {name: together[3 * index : 3 * index + 3] for index, name in enumerate(IMAGE_INPUTS)}
    if shapes["pixel_values"][0] and "pixel_values" not in batch:
        batch = with_blank_image(batch, config, {name: shape for name, shape in shapes.items() if shape[0]})
    return batch | computed


def with_blank_image(batch: dict[str, Any], config: Any, shapes: dict[str, Sequence[int]]) -> dict[str, Any]:
    """Return a micro-batch of text with one row more, which holds a gray image and nothing to learn.

    Args:
        shapes: of the image in each form that the model is to be given, without the batch dimension.
    """
    input_ids, start, image = batch["input_ids"], config.start_of_image_token_id, config.image_token_id
    row = torch.tensor([config.bos_token_id or 0, start, *[image] * config.num_image_tokens], device=input_ids.device)
    length = max(input_ids.shape[1], len(row))

    def append(rows: torch.Tensor, row: torch.Tensor, padding: int) -> torch.Tensor:
        rows = F.pad(rows, (0, length - rows.shape[1]), value=padding)
        return torch.cat([rows, F.pad(row, (0, length - len(row)), value=padding)[None]])

    mask = append(batch.get("attention_mask", torch.ones_like(input_ids)), torch.ones_like(row), 0)
    texts = {"input_ids": append(input_ids, row, config.pad_token_id or 0), "attention_mask": mask}
    if "labels" in batch:
        texts["labels"] = append(batch["labels"], torch.full_like(row, -100), -100)
    return batch | texts | {name: torch.zeros(1, *shape, device=row.device) for name, shape in shapes.items()}


def fill_in_arguments(args: TrainingArguments) -> None:
    """Set the arguments that batches of `DeemDataCollator` need, where they have transformers' default."""
    args.remove_unused_columns = False  # the collator takes samples, whose keys are not those of `forward`
    args.prediction_loss_only = True  # evaluations keep losses, not logits
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False  # a batch has a varying number of images and cannot be sliced
    # A batch of text alone leaves parts unused. `train` seeds each process for itself, but they share one order of data.
    defaults = {"ddp_find_unused_parameters": True, "data_seed": args.seed, "label_names": ["labels"]}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def refuse_without_effect(args: TrainingArguments, streamed: bool = False) -> None:
    """Refuse arguments that would change nothing.

    Args:
        streamed: the training data is an IterableDataset, which has an order of its own.

    Raises:
        ValueError: one is set.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor {args.label_smoothing_factor:g} would have no effect: DEEM's text loss is the plain "
            "cross entropy. Leave it out, or set it to 0."
        )
    if streamed and args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy {args.train_sampling_strategy} would have no effect: the data is a stream in an order "
            "of its own. Leave it out."
        )


class DeemTrainer(Trainer):
    """Trains a `DeemForConditionalGeneration` on batches of `DeemDataCollator`; takes all that Trainer takes.

    Each loss is a mean over what it is computed on in the whole step, all micro-batches and processes: text targets,
    supervised images, images. Every log holds the three by name. `eval_loss` is a mean over samples. Several GPUs in one
    process, and arguments without effect (`refuse_without_effect`), are a ValueError.
    """

    loss_is_scaled_for_ga = True  # compute_loss scales each loss by its share of the whole step

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, *more: Any, **kwargs: Any) -> None:
        if args.n_gpu > 1:  # Trainer would take nn.DataParallel, which cuts the rows of a batch from their images
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start a process for each by torchrun or accelerate launch."
            )
        fill_in_arguments(args)
        super().__init__(model, args, *more, **kwargs)
        refuse_without_effect(args, isinstance(self.train_dataset, IterableDataset))
        # Trainer writes `use_cache = False` into the config. Saved with a checkpoint it would make generation slow.
        vars(model.config).pop("use_cache", None)
        self._sums: dict[str, torch.Tensor] = {}  # [weighted sum, weight] per loss since the last log
        self._counts: dict[str, float] = {}  # what each loss of the current step is a mean over

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the weighted sum of the losses, scaled so that the micro-batches of one optimizer step add up."""
        plain = self.accelerator.unwrap_model(model)
        weights = plain.loss_weights(*(inputs.get(f"{name}_weight") for name in LOSSES))
        counts = loss_counts(inputs, plain.config, weights)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            inputs = with_same_parts(inputs, plain.config, weights, self.accelerator.gather)
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
        # Gradients are averaged over processes, but a loss is a mean over what all of them have.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        total = None
        for name in LOSSES:
            if (loss := getattr(outputs, name)) is None:
                continue
            share = counts[name] / max(self._counts[name], 1)
            # the text loss is a sum already divided by the targets of the step, the others are means over the micro-batch
            divided = name == "text_loss" and num_items_in_batch is not None and share > 0
            scaled = loss if divided else loss * share
            weighted = weights[name] * processes * scaled
            total = weighted if total is None else total + weighted
            key, scale = (name, 1.0) if model.training else (f"eval_{name}", float(self._counts[name]))
            pair = torch.stack([scaled.detach().float() * scale, loss.new_tensor(share * scale, dtype=torch.float32)])
            self._sums[key] = self._sums.get(key, 0) + pair
        if total is not None and not model.training:  # Trainer would count a smaller batch as a whole one
            rows = float(len(inputs["input_ids"]))
            pair = torch.stack([total.detach().float() * rows, total.new_tensor(rows, dtype=torch.float32)])
            self._sums["eval_loss"] = self._sums.get("eval_loss", 0) + pair
        if total is None:
            raise ValueError(
                f"Nothing to learn in a batch with {', '.join(inputs)} and loss weights {weights}: give labels or target "
                "images, and a weight above 0 for one of their losses."
            )
        return (total, outputs) if return_outputs else total

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Count the text targets of the whole step, all micro-batches and processes; keep the other losses' counts."""
        model = self.accelerator.unwrap_model(self.model)
        totals = torch.zeros(len(LOSSES))
        for batch in batch_samples:
            weights = model.loss_weights(*(batch.get(f"{name}_weight") for name in LOSSES))
            totals += torch.tensor(list(loss_counts(batch, model.config, weights).values()))
        if self.args.average_tokens_across_devices:
            totals = self.accelerator.reduce(totals.to(device))
        self._counts = dict(zip(LOSSES, totals.tolist(), strict=True))
        return torch.tensor(self._counts["text_loss"], device=device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to each training or evaluation log the mean of every named loss over where it was computed."""
        names = ["eval_loss", *(f"eval_{name}" for name in LOSSES)] if "eval_loss" in logs else LOSSES
        for name in names:
            pair = self._sums.pop(name, torch.zeros(2, device=self.args.device))
            total, weight = self.accelerator.reduce(
                pair
            ).tolist()  # on every process, or the others would wait for ever
            if weight > 0:
                logs[name] = total / weight
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the base class, with the same noise in every evaluation and none taken from training."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As the base class, with noise of its own in each process."""
        if not resume_from_checkpoint and self.args.world_size > 1:
            # Until here all processes drew alike, as the model's start needs it. A checkpoint has the states of all.
            set_seed(self.args.seed + self.args.process_index)
        return super().train(resume_from_checkpoint, **kwargs)
