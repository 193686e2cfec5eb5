# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The feedback in a Trainer of others: `class MyTrainer(ConsistencyLossMixin, Trainer)`, or `SFTTrainer` of trl.

    trainer = MyTrainer(model, args, train_dataset=rows, processing_class=processor, feedback=feedback)

Rows with `images` or `image` get their targets here; a collator of one's own may give `target_pixel_values` itself.
"""

import inspect
import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from .feedback_deem import DeemFeedback
from .feedback_images_deem import FeedbackImageProcessor
from .feedback_tokens_deem import DOOR, check_door, count_tiles

TARGETS, TILES, FOLDER = "target_pixel_values", "num_tiles", "feedback"


def images_of(row: dict[str, Any]) -> list[Any]:
    """The images of a row, in the order of its text: `images`, `image`, or within `messages` or `prompt`."""
    if row.get("images") is not None:
        return list(row["images"])
    if row.get("image") is not None:
        return [row["image"]]
    turns = [turn for name in ("messages", "prompt", "completion") for turn in row.get(name) or () if name in row]
    contents = [turn["content"] for turn in turns if isinstance(turn, dict) and isinstance(turn.get("content"), list)]
    return [part["image"] for content in contents for part in content if part.get("image") is not None]


class TargetCollator:
    """Adds `target_pixel_values` of the rows' images to the batches of a collator that does not give them.

    Args:
        augment: mirror and crop `images` or `image` of each row at random, for the model and the targets alike.
    """

    def __init__(self, collator: Callable, processor: FeedbackImageProcessor, augment: bool = False) -> None:
        self.collator, self.processor, self.augment = collator, processor, augment

    def __getattr__(self, name: str) -> Any:  # a trainer may look for its collator's tokenizer
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [self.augmented(row) if self.augment else row for row in rows]
        images = [image for row in rows if isinstance(row, dict) for image in images_of(row)]
        batch = self.collator(rows)
        if TARGETS not in batch and images:
            batch[TARGETS] = self.processor(images)[TARGETS]
        return batch

    def augmented(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its images mirrored and cropped."""
        if row.get("images"):
            return {**row, "images": self.processor.flip_and_crop(row["images"])}
        return {**row, "image": self.processor.flip_and_crop([row["image"]])[0]} if row.get("image") else row


class ZeroGradients(TrainerCallback):
    """Forgets the feedback's gradients behind a step; Trainer does so for the model alone."""

    def __init__(self, feedback: nn.Module) -> None:
        self.feedback = feedback

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.feedback.zero_grad()


@dataclass
class Redrawn:
    """What of a micro-batch is redrawn.

    Attributes:
        selected: int64 (n,), of its images.
        seeds: one per selected image: noise and timestep do not depend on how a step is divided.
    """

    selected: torch.Tensor
    seeds: list[int]


class ConsistencyLossMixin:
    """Adds the loss of a `DeemFeedback`, times its `loss_weight`, to that of a Trainer; 0 costs nothing.

    The images of a batch are encoded once. The loss is a mean over the redrawn images of a whole step, all micro-batches and
    processes; logs hold it as `consistency_loss`, beside `task_loss`. The feedback's parameters are groups of their own in
    the optimizer, clipped apart, and saved in the folder `feedback` of each checkpoint, from where training goes on.

    Args:
        feedback: composed for this model.
        feedback_learning_rate: of its parameters; `learning_rate` by default.
        connector_steps: steps in which the feedback trains alone, without a gradient into the model.
        augment: mirror and crop the rows' images at random, for the model and the targets alike.

    Raises:
        ValueError: a model without the door, or sharded by FSDP or DeepSpeed, or several GPUs in one process.
    """

    def __init__(
        self,
        *args: Any,
        feedback: DeemFeedback,
        feedback_learning_rate: float | None = None,
        connector_steps: int = 0,
        augment: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.feedback, self.feedback_learning_rate = feedback, feedback_learning_rate
        self.connector_steps, self.feedback_weight = connector_steps, float(feedback.config.loss_weight)
        self._plan: deque[Redrawn] = deque()
        self._redrawn_in_step = 0.0
        self._sums: dict[str, torch.Tensor] = {}  # [sum, count] of the consistency loss since the last log
        self._added, self._num_steps, self._num_evaluated = 0.0, 0, 0
        if not self.feedback_weight:
            return
        check_door(self.plain_model())
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "ConsistencyLossMixin runs with one process, or several by DDP: start one for each GPU by torchrun, "
                "without FSDP and DeepSpeed."
            )
        feedback.to(self.args.device)
        images = FeedbackImageProcessor(feedback.config.target_size, like=self.processing_class)
        self.data_collator = TargetCollator(self.data_collator, images, augment)
        self.add_callback(ZeroGradients(feedback))

    def plain_model(self) -> nn.Module:
        """The model without what accelerate and peft put around it."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, TARGETS, TILES, "images", "image"})

    # ---- the plan of a step ----

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        if self.feedback_weight:
            self.plan_step([len(batch[TARGETS]) if TARGETS in batch else 0 for batch in batch_samples])
        return super()._get_num_items_in_batch(batch_samples, device)

    def plan_step(self, counts: list[int]) -> None:
        """Choose which of a step's images are redrawn, with which noise.

        Args:
            counts: images of each micro-batch of this process.
        """
        config, total, process = self.feedback.config, sum(counts), self.accelerator.process_index
        together = self.accelerator.gather(torch.tensor([total], device=self.args.device))
        first = int(together[:process].sum())  # number, in the whole step, of the first image of this process
        chosen = set(range(total))
        if config.feedback_share < 1 and total:
            draw = torch.Generator().manual_seed(self.seed_of(first, "share"))
            chosen = set(
                torch.randperm(total, generator=draw)[: max(1, round(config.feedback_share * total))].tolist()
            )
        self._plan.clear()
        before = 0
        for count in counts:
            here = [index for index in range(count) if before + index in chosen]
            if config.objective == "contrastive" and len(here) < 2:
                here = []
            seeds = [self.seed_of(first + before + index) for index in here]
            self._plan.append(Redrawn(torch.tensor(here, dtype=torch.long), seeds))
            before += count
        redrawn = sum(len(one.seeds) for one in self._plan)
        self._redrawn_in_step = float(self.accelerator.reduce(torch.tensor(float(redrawn), device=self.args.device)))

    def seed_of(self, index: int, *what: str) -> int:
        """A seed of the `index`-th image of this step."""
        digits = [self.args.seed, self.state.global_step, index, *(ord(letter) for word in what for letter in word)]
        return hash(tuple(digits)) & 0x7FFFFFFFFFFFFFFF

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the trainer with that of the feedback, scaled as the trainer's."""
        inputs = dict(inputs)
        targets, tiles = inputs.pop(TARGETS, None), inputs.pop(TILES, None)
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        redrawn = self.next_redrawn(0 if targets is None else len(targets))
        if not self.feedback_weight or not redrawn.seeds:
            return super().compute_loss(model, inputs, **given)
        if inputs.get("pixel_values") is None:
            raise ValueError(f"{len(targets)} target images in a batch without pixel_values: give both, or neither.")
        images = self.encode(inputs)
        tiles = count_tiles(self.plain_model(), images, inputs, len(targets)) if tiles is None else tiles
        del inputs["pixel_values"]
        seen: list[torch.Tensor] = []
        hook = None
        if self.feedback.config.source == "language":
            keep = lambda module, args, output: seen.append(output[0])  # noqa: E731
            hook = self.plain_model().get_decoder().register_forward_hook(keep)
        is_image = inputs["input_ids"] == self.plain_model().config.image_token_id
        try:
            result = super().compute_loss(model, {**inputs, DOOR: {"image": images}}, **given)
        finally:
            if hook is not None:
                hook.remove()
        losses = self.feedback(
            images,
            targets,
            num_tiles=tiles,
            hidden_states=seen[0] if seen else None,
            image_mask=is_image if seen else None,
            selected=redrawn.selected.to(targets.device),
            detach=model.training and self.state.global_step < self.connector_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in redrawn.seeds],
        ).image_losses
        added = self.scaled(losses, model.training, num_items_in_batch)
        loss, *outputs = result if return_outputs else (result,)
        total = loss + added.to(loss.device)
        return (total, *outputs) if return_outputs else total

    def next_redrawn(self, count: int) -> Redrawn:
        """What of the micro-batch that comes is redrawn; in evaluation all, with the same noise each time."""
        if self.model.training and self._plan:
            return self._plan.popleft()
        if self.feedback.config.objective == "contrastive" and count < 2:
            count = 0
        seeds = [hash((self.args.seed, self._num_evaluated + index)) & 0x7FFFFFFF for index in range(count)]
        self._num_evaluated += count
        return Redrawn(torch.arange(count), seeds)

    def encode(self, inputs: dict[str, Any]) -> Any:
        """The images of a batch as `get_image_features` gives them, with what of the inputs it takes.

        Raises:
            ValueError: there are videos too.
        """
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("The feedback is for images; this batch has videos. Keep rows with videos apart.")
        encode = self.plain_model().get_image_features
        known = inspect.signature(encode).parameters
        given = {name: value for name, value in inputs.items() if name in known and name != "kwargs"}
        return encode(**given, return_dict=True)

    def scaled(self, losses: torch.Tensor, training: bool, num_items_in_batch: Any) -> torch.Tensor:
        """What the losses (n,) of a micro-batch add to that of the trainer; they are noted for the log."""
        pair = torch.stack([losses.detach().float().sum(), losses.new_tensor(len(losses), dtype=torch.float32)])
        key = "consistency_loss" if training else "eval_consistency_loss"
        self._sums[key] = self._sums.get(key, 0) + pair
        if not training:
            return self.feedback_weight * losses.mean()
        # Gradients are averaged over processes, and by some trainers over micro-batches.
        added = self.feedback_weight * losses.sum() / self._redrawn_in_step * self.accelerator.num_processes
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            is_scaled = self.compute_loss_func is not None
            is_scaled = is_scaled or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)
        self._added += float(added.detach())
        return added if is_scaled else added * self.current_gradient_accumulation_steps

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._num_steps += int(self.accelerator.sync_gradients)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients and self._redrawn_in_step:
            for parameter in self.trained():  # outside of what DDP wraps
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(mine, "mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        torch.nn.utils.clip_grad_norm_(self.trained(), self.args.max_grad_norm)
        return norm

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the feedback that train."""
        return [parameter for parameter in self.feedback.parameters() if parameter.requires_grad]

    # ---- optimizer, logs, checkpoints ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Add the feedback's parameters, decayed and not, as groups of their own."""
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.feedback_weight and not known & {id(parameter) for parameter in self.trained()}:
            decayed = set(self.get_decay_parameter_names(self.feedback))
            named = [(name, one) for name, one in self.feedback.named_parameters() if one.requires_grad]
            rate = {"lr": self.feedback_learning_rate or self.args.learning_rate}
            for decay, within in ((self.args.weight_decay, True), (0.0, False)):
                group = [one for name, one in named if (name in decayed) == within]
                if group:
                    optimizer.add_param_group({"params": group, "weight_decay": decay, **rate})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean consistency loss over the images since the last log, and what the rest of the loss was."""
        name = "eval_consistency_loss" if "eval_loss" in logs else "consistency_loss"
        pair = self._sums.pop(name, torch.zeros(2, device=self.args.device))
        if self.feedback_weight and ("loss" in logs or "eval_loss" in logs):
            total, count = self.accelerator.reduce(
                pair
            ).tolist()  # on every process, or the others would wait for ever
            if count:
                logs[name] = total / count
        if self.feedback_weight and "loss" in logs:
            added = self.accelerator.reduce(torch.tensor(self._added, device=self.args.device), "mean").item()
            logs["task_loss"] = logs["loss"] - added / max(self._num_steps, 1)
            self._added, self._num_steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._num_evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.feedback_weight and self.args.should_save:
            self.feedback.save_pretrained(os.path.join(output_dir or self.args.output_dir, FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_renamed(self.model if model is None else model, resume_from_checkpoint)
        self.load_feedback(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_renamed(self.model, self.state.best_model_checkpoint)
        self.load_feedback(self.state.best_model_checkpoint)

    def load_feedback(self, checkpoint: str) -> None:
        """Go on with the feedback of a checkpoint.

        Raises:
            FileNotFoundError: it has none.
        """
        if not self.feedback_weight:
            return
        folder = os.path.join(checkpoint, FOLDER)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{checkpoint} has no folder {FOLDER}: it was not trained with ConsistencyLossMixin. Start anew from its "
                "model, with a fresh feedback."
            )
        saved = type(self.feedback).from_pretrained(folder)
        self.feedback.load_state_dict(saved.state_dict())


def load_renamed(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint whose tensors have other names than the model's, as those of LLaVA and Qwen-VL have.

    They are saved under the names of older versions, which `from_pretrained` knows and Trainer (transformers 5.23) does not:
    it would go on from the model as it was given, without a word.
    """
    if not isinstance(model, PreTrainedModel):  # of peft: adapters keep their names
        return
    index, file = (Path(checkpoint, name) for name in ("model.safetensors.index.json", "model.safetensors"))
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    elif file.is_file():
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
    else:
        return
    if not names <= set(model.state_dict()):
        saved = type(model).from_pretrained(checkpoint, config=model.config, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


__all__ = ["ConsistencyLossMixin", "TargetCollator"]
