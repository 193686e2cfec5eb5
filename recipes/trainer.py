# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`DeemTrainer`: transformers' Trainer with named losses, named parameter groups, and checkpoints that survive SIGKILL."""

import difflib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from recipes.data.reading import DataReport

LOSSES = ("text_loss", "image_loss", "consistency_loss")
COMPLETE = "complete"  # the file that says: everything of this checkpoint is on disk


@dataclass
class DeemTrainingArguments(TrainingArguments):
    """TrainingArguments with what DEEM's batches and streams need, the paper's optimiser, and the two name lists."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Checkpoints, logs and the final model."})
    max_steps: int = field(
        default=10_000, metadata={"help": "Optimiser steps; the data stream has no end of its own."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Rate of every parameter that no group names."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay; never on biases and norm weights."})
    adam_beta2: float = field(default=0.995, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW epsilon."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    seed: int = field(default=32, metadata={"help": "Seed of initialisation, noise, data order and choices."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Samples are records, not columns."})
    # Batches hold floats and a varying number of images: each process reads its own instead of being sent slices.
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False}, metadata={"help": "Options of accelerate."}
    )
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where logs go."})
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Names of parts that do not train, e.g. model.language_model."}
    )
    groups: dict | str | None = field(
        default=None,
        metadata={
            "help": "Name -> {lr, weight_decay} of its parameters, first match wins (a mapping; JSON as a flag)."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            self.groups = json.loads(self.groups)
        super().__post_init__()


# ---- parts by name ----


def match_parameters(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that contain `pattern` as whole dotted components; `*` and `?` stand for anything within it.

    `gate` matches `model.image_attention.0.gate`, not `mlp.gate_proj.weight`; `gate*` matches both.

    Raises:
        ValueError: if nothing matches, offering near names.
    """
    names = list(names)
    inner = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    regex = re.compile(rf"(?:.*\.)?{inner}(?:\..*)?\Z")
    found = [name for name in names if regex.match(name)]
    if not found:
        known = {
            ".".join(parts[i:j])
            for parts in map(lambda name: name.split("."), names)
            for i in range(len(parts))
            for j in range(i + 1, len(parts) + 1)
        }
        near = difflib.get_close_matches(pattern, sorted(known, key=len), n=3, cutoff=0.5)
        hint = (
            f"Did you mean {', '.join(map(repr, near))}?"
            if near
            else f"Parts: {', '.join(sorted(set(map(part_of, names))))}."
        )
        raise ValueError(f"The name {pattern!r} matches none of the {len(names)} parameters of the model. {hint}")
    return found


def part_of(name: str) -> str:
    """The part a parameter belongs to: a child of the model, and of the image decoder."""
    pieces = name.removeprefix("model.").split(".")
    return ".".join(pieces[: 2 if pieces[0] == "image_decoder" else 1])


def freeze_parts(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    """Switch off the gradients of all parameters that a pattern names.

    With a frozen language model, the output rows of the tokens that DEEM added are trained all the same (see
    `train_only_new_rows`), unless `lm_head` is named too.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for pattern in patterns for name in match_parameters(pattern, parameters)}
    for name in frozen:
        parameters[name].requires_grad_(False)
    if all(not parameter.requires_grad for parameter in model.model.language_model.parameters()):
        if "lm_head.weight" not in frozen:
            train_only_new_rows(model.lm_head, first_new_token(model))


def first_new_token(model: PreTrainedModel) -> int:
    """Size of the language model's own vocabulary: DEEM's tokens were added behind it."""
    return min(model.config.image_token_id, model.config.start_of_image_token_id)


def train_only_new_rows(lm_head: nn.Module, first_new_row: int) -> None:
    """Let weight and bias rows from `first_new_row` on train, and keep the others bit for bit as they are.

    The gradient of the old rows is zeroed, so AdamW's moments for them stay 0. Weight decay would still move them:
    `parameter_groups` gives marked parameters none.
    """
    for parameter in lm_head.parameters():
        parameter.requires_grad_(True)
        parameter.first_new_row = first_new_row
        keep = torch.arange(parameter.shape[0], device=parameter.device) >= first_new_row
        keep = keep.view(-1, *[1] * (parameter.dim() - 1))
        parameter.register_hook(lambda grad, keep=keep: grad * keep.to(grad))


def no_decay_names(model: nn.Module) -> set[str]:
    """Biases, and every parameter of a normalisation layer."""
    return {
        name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(prefix, recurse=False)
        if name.endswith("bias") or "norm" in type(module).__name__.lower()
    }


def parameter_groups(
    model: nn.Module, groups: dict[str, dict[str, float]] | None, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters; the first matching name wins.

    Args:
        groups: `{pattern: {"lr": float, "weight_decay": float}}`, each value optional.
        lr, weight_decay: for what no pattern matches.

    Returns:
        groups with `params`, `names`, `lr`, `weight_decay`. Parameters of equal settings share a group.

    Raises:
        ValueError: for a pattern that matches no parameter, or an unknown setting.
    """
    parameters = dict(model.named_parameters())
    settings = dict.fromkeys(parameters, (lr, weight_decay))
    for pattern, setting in reversed((groups or {}).items()):
        if unknown := set(setting) - {"lr", "weight_decay"}:
            raise ValueError(f"Group {pattern!r} has unknown settings {sorted(unknown)}: give lr and/or weight_decay.")
        chosen = (float(setting.get("lr", lr)), float(setting.get("weight_decay", weight_decay)))
        settings.update(dict.fromkeys(match_parameters(pattern, parameters), chosen))
    no_decay = no_decay_names(model)
    collected: dict[tuple[float, float], dict[str, Any]] = {(lr, weight_decay): {"params": [], "names": []}}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        rate, decay = settings[name]
        key = (rate, 0.0 if name in no_decay or hasattr(parameter, "first_new_row") else decay)
        group = collected.setdefault(key, {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return [
        {**group, "lr": rate, "weight_decay": decay} for (rate, decay), group in collected.items() if group["params"]
    ]


def parts_table(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`{part: {"trainable": int, "frozen": int, "lr": [...], "weight_decay": [...]}}`, parameters counted once."""
    setting = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    table: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        row = table.setdefault(part_of(name), {"trainable": 0, "frozen": 0, "lr": set(), "weight_decay": set()})
        size = parameter.numel()
        old = size // parameter.shape[0] * parameter.first_new_row if hasattr(parameter, "first_new_row") else 0
        row["trainable"] += (size - old) * (name in setting)
        row["frozen"] += size if name not in setting else old
        if name in setting:
            row["lr"].add(setting[name][0])
            row["weight_decay"].add(setting[name][1])
    return {
        part: {key: sorted(value) if isinstance(value, set) else value for key, value in row.items()}
        for part, row in table.items()
    }


def format_parts(table: dict[str, dict[str, Any]]) -> str:
    """The table of parts as aligned text, with totals."""
    rows = [("part", "trainable", "frozen", "lr", "weight decay")]
    for part, row in table.items():
        rates, decays = (", ".join(f"{value:g}" for value in row[key]) or "-" for key in ("lr", "weight_decay"))
        rows.append((part, f"{row['trainable']:,}", f"{row['frozen']:,}", rates, decays))
    totals = (f"{sum(row[key] for row in table.values()):,}" for key in ("trainable", "frozen"))
    rows.append(("total", *totals, "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if 0 < i < 3 else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


# ---- checkpoints ----


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The checkpoint of the latest step whose saving came to its end, or None."""
    folders = [file.parent for file in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))) if folders else None


# ---- the trainer ----


class _StepMeter(TrainerCallback):
    """Seconds per step (waiting for data + forward + backward + update), and peak memory."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        # The averages since the last log are not part of a checkpoint: with a log at each save there is nothing to lose,
        # and a resumed run logs the same numbers as an uninterrupted one.
        if control.should_save:
            control.should_log = True

    def read(self) -> dict[str, float]:
        """Median seconds since the last reading, and peak memory so far in 10^9 bytes (GPU memory if there is one)."""
        seconds, self.seconds = statistics.median(self.seconds), []
        return {"step_seconds": round(seconds, 4), "peak_memory_gb": round(peak_memory() / 1e9, 3)}


def peak_memory() -> int:
    """Most bytes held so far: allocated GPU memory, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class DeemTrainer(Trainer):
    """Trains a `DeemForConditionalGeneration` on batches of `DeemDataCollator`.

    Args:
        args: `DeemTrainingArguments`; `freeze` and `groups` are applied here.
        data_report: filled by the data stream; printed and written to `data_report.json` when training ends, however
            it ends.

    `train()` goes on from the last complete checkpoint in `output_dir` if there is one; pass
    `resume_from_checkpoint=False` to start anew. The output directory also receives `parts.json`: trainable and frozen
    parameters, learning rates and weight decays per part.
    """

    # compute_loss scales every loss for gradient accumulation itself: the text loss by the targets of the whole step,
    # the others by the number of micro-batches.
    loss_is_scaled_for_ga = True

    def __init__(
        self, model: PreTrainedModel, args: DeemTrainingArguments, data_report: DataReport | None = None, **kwargs: Any
    ) -> None:
        freeze_parts(model, args.freeze)
        super().__init__(model=model, args=args, **kwargs)
        # Trainer writes `use_cache = False` into the config. Saved with a checkpoint it would make generation slow.
        vars(model.config).pop("use_cache", None)
        self.data_report = data_report
        self.meter = _StepMeter()
        self.add_callback(self.meter)
        self._sums: dict[str, torch.Tensor] = {}  # [weighted sum, weight] per loss since the last log

    # -- losses --

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The weighted sum of the three losses, scaled so that the micro-batches of one optimiser step add up."""
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)  # a step without text targets
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        overrides = (inputs.get(f"{name}_weight") for name in LOSSES)
        weights = self.accelerator.unwrap_model(model).loss_weights(*overrides)
        total = None
        for name in LOSSES:
            if (loss := getattr(outputs, name)) is None:
                continue
            if name == "text_loss" and num_items_in_batch is not None:
                # a sum over this micro-batch, divided by the targets of all micro-batches (and processes) of the step
                share = (inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch
                scaled = loss * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)
            else:  # a mean over this micro-batch
                share = torch.tensor(1.0)
                scaled = loss / (self.current_gradient_accumulation_steps if model.training else 1)
            total = weights[name] * scaled if total is None else total + weights[name] * scaled
            key = name if model.training else f"eval_{name}"
            self._sums[key] = self._sums.get(key, 0) + torch.stack(
                [loss.detach().float(), share.float().to(loss.device)]
            )
        if total is None:
            raise ValueError(
                f"Nothing to learn in a batch with {', '.join(inputs)} and loss weights {weights}: give labels or target "
                "pictures, and a weight above 0 for one of their losses."
            )
        return (total, outputs) if return_outputs else total

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        # Text that is not trained does not count as text of the step.
        counted = [
            {**batch, "labels": torch.full_like(batch["labels"], -100)}
            if batch.get("text_loss_weight") == 0
            else batch
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to each training or evaluation log the mean of every named loss over where it was computed."""
        prefix = "eval_" if "eval_loss" in logs else ""
        for name in (f"{prefix}{name}" for name in LOSSES):
            pair = self._sums.pop(name, torch.zeros(2, device=self.args.device))
            total, weight = self.accelerator.reduce(pair).tolist()  # every process, or the others would wait for ever
            if weight > 0:
                logs[name] = total / weight
        if self.meter.seconds and not prefix:
            logs.update(self.meter.read())
        super().log(logs, start_time)

    # -- steps and parameter groups --

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Where an optimiser step begins: with waiting for its data."""
        self.meter.started = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser chosen by the arguments over the named groups; prints and saves the table of parts."""
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(model, self.args.groups, self.args.learning_rate, self.args.weight_decay)
            if not groups:
                raise ValueError(
                    f"Every parameter is frozen (freeze: {self.args.freeze}): leave out at least one part."
                )
            if self.is_world_process_zero():
                table = parts_table(model, groups)
                print(format_parts(table))
                Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
                Path(self.args.output_dir, "parts.json").write_text(json.dumps(table, indent=2) + "\n")
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [{key: value for key, value in group.items() if key != "names"} for group in groups], **options
            )
        return self.optimizer

    # -- checkpoints --

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, going on from the last complete checkpoint unless `resume_from_checkpoint` is a path or False.

        A run that has already reached `max_steps` only loads its last checkpoint; its training loss is NaN.
        """
        if resume_from_checkpoint is None or resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            if state.global_step >= self.args.max_steps:  # Trainer would take one step more
                print(
                    f"{resume_from_checkpoint} has reached step {state.global_step} of {self.args.max_steps}: nothing to do."
                )
                self.state = state
                self._load_from_checkpoint(resume_from_checkpoint)
                return TrainOutput(state.global_step, math.nan, {})
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            if self.data_report is not None and self.is_world_process_zero():
                print(self.data_report)
                self.data_report.save(Path(self.args.output_dir, "data_report.json"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The marker is written last. Old checkpoints go only afterwards, so that at every moment one is complete.
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with open(folder / COMPLETE, "w") as marker:
                os.fsync(marker)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
