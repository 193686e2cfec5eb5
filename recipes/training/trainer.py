# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`DeemTrainer`: transformers' Trainer with named losses, named parameter groups, and checkpoints that survive SIGKILL."""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from recipes.data.faults import DataReport
from recipes.evaluation.answers import share_answered
from recipes.training.adapters import adapted_parts, add_adapters, is_adapted, merge_adapters
from recipes.training.latent_cache import remove_vae
from recipes.training.losses import LOSSES, loss_counts, same_way
from recipes.training.parameter_groups import format_parts, freeze_parts, parameter_groups, parts_table
from recipes.training.stream_trainer import StreamTrainer

COMPLETE = "complete"  # the file that says: everything of this checkpoint is on disk


@dataclass
class DeemTrainingArguments(TrainingArguments):
    """TrainingArguments with what DEEM's batches and streams need, the paper's optimizer, and the two name lists."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Checkpoints, logs and the final model."})
    max_steps: int = field(
        default=10_000, metadata={"help": "Optimizer steps; the data stream has no end of its own."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Rate of every parameter that no group names."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay; never on biases and norm weights."})
    adam_beta2: float = field(default=0.995, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "AdamW epsilon."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    seed: int = field(default=32, metadata={"help": "Seed of initialization, noise, data order and choices."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Samples are records, not columns."})
    # Batches hold floats and a varying number of images: each process reads its own instead of being sent slices.
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False}, metadata={"help": "Options of accelerate."}
    )
    # Batches of words alone leave the parts for pictures unused.
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "Let DDP look for parameters without gradient in every step."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Keys of a batch that are learned from."}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluations keep losses, not logits."})
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

    frozen_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of frozen parts, the VAE apart; use together with bf16. None leaves it as loaded.",
            "choices": ["bfloat16", "float16"],
        },
    )
    lora: dict | str | None = field(
        default=None,
        metadata={
            "help": "Adapters in the language model, in the encoder too with `vision: true`; else fields of "
            "peft.LoraConfig (a mapping; JSON as a flag). See recipes/training/adapters.py."
        },
    )

    def __post_init__(self) -> None:
        for name in ("groups", "lora"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, json.loads(value))
        if isinstance(self.resume_from_checkpoint, str) and self.resume_from_checkpoint.lower() in ("true", "false"):
            self.resume_from_checkpoint = self.resume_from_checkpoint.lower() == "true"
        super().__post_init__()


def prepare_parts(model: PreTrainedModel, args: DeemTrainingArguments) -> nn.Module:
    """The model with all parts frozen that the arguments name, in the precision and with the adapters that they name."""
    freeze_parts(model, [*args.freeze, *adapted_parts(args.lora)])
    if args.frozen_dtype is not None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and ".vae." not in name:
                parameter.data = parameter.data.to(getattr(torch, args.frozen_dtype))
    return model if args.lora is None else add_adapters(model, args.lora)


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


class DeemTrainer(StreamTrainer):
    """Trains a `DeemForConditionalGeneration` on batches of `DeemDataCollator`.

    Args:
        args: `DeemTrainingArguments`; `freeze`, `lora` and `groups` are applied here.
        data_report: filled by the data stream; printed and written to `data_report.json` when training ends, however
            it ends.
        questions: samples that every evaluation asks, see `share_answered`; the result is `eval_answers`.
        without_vae: hold no VAE, because batches bring `target_latents`; checkpoints have it all the same.

    `train()` goes on from the last complete checkpoint in `output_dir` if there is one; pass
    `resume_from_checkpoint=False` to start anew. The output directory also receives `parts.json`: trainable and frozen
    parameters, learning rates and weight decays per part.
    """

    # compute_loss scales every loss itself, by what it is a mean over in this micro-batch and in the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: DeemTrainingArguments,
        data_report: DataReport | None = None,
        without_vae: bool = False,
        questions: Sequence[dict[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        prepared = prepare_parts(model, args)
        self._absent_weights = remove_vae(model) if without_vae else {}
        super().__init__(model=prepared, args=args, **kwargs)
        # Trainer writes `use_cache = False` into the config. Saved with a checkpoint it would make generation slow.
        vars(model.config).pop("use_cache", None)
        self.data_report = data_report
        self.questions = questions
        self.meter = _StepMeter()
        self.add_callback(self.meter)
        self._sums: dict[str, torch.Tensor] = {}  # [weighted sum, weight] per loss since the last log
        self._counts: dict[str, float] = {}  # what each loss of the current step is a mean over

    # -- losses --

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The weighted sum of the three losses, scaled so that the micro-batches of one optimizer step add up."""
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)  # a step without text targets
        plain = self.accelerator.unwrap_model(model)
        weights = plain.loss_weights(*(inputs.get(f"{name}_weight") for name in LOSSES))
        counts = loss_counts(inputs, plain.config, weights)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            inputs = same_way(inputs, plain.config, weights, self.accelerator.gather)
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
        if total is None:
            raise ValueError(
                f"Nothing to learn in a batch with {', '.join(inputs)} and loss weights {weights}: give labels or target "
                "pictures, and a weight above 0 for one of their losses."
            )
        return (total, outputs) if return_outputs else total

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Text targets of the whole step, over all its micro-batches and processes; keeps the other losses' counts."""
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

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the base class, with the same noise in every evaluation and none taken from training; asks the questions."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.questions:
            share = share_answered(self.accelerator.unwrap_model(self.model), self.processing_class, self.questions)
            output.metrics[f"{metric_key_prefix}_answers"] = share
        return output

    # -- steps and parameter groups --

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Where an optimizer step begins: with waiting for its data."""
        self.meter.started = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer chosen by the arguments over the named groups; prints and saves the table of parts."""
        if self.optimizer is None:
            model = self.model if model is None else model
            if is_adapted(model):  # loading adapters lets all their tensors train
                model.freeze_fixed_parts()
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

        A run that has already reached `max_steps` only loads its last checkpoint, or the best one where the run ended
        with that; its training loss is NaN.

        Raises:
            ValueError: the best checkpoint of such a run is gone.
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
                self._load_from_checkpoint(self._result_of(state, str(resume_from_checkpoint)))
                return TrainOutput(state.global_step, math.nan, {})
        elif self.args.world_size > 1:
            # Until here all processes drew alike, as the model's start needs it. Noise must differ between them.
            set_seed(self.args.seed + self.args.process_index)
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
            self.gather_data_report()
            return output
        finally:
            if self.data_report is not None and self.is_world_process_zero():
                print(self.data_report)
                self.data_report.save(Path(self.args.output_dir, "data_report.json"))

    def _result_of(self, state: TrainerState, last: str) -> str:
        """The checkpoint that a finished run ended with: the best one if it was told so, else the last."""
        best = state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None or Path(best) == Path(last):
            return last
        if not Path(best).is_dir():
            raise ValueError(
                f"This run ended with its best checkpoint, {best}, which is gone; the model in {self.args.output_dir} is "
                "left as it is. Restore it, or give another output_dir."
            )
        return best

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained model and its processor. With `lora` whole, adapters merged; checkpoints hold adapters only."""
        if is_adapted(self.model) and not _internal_call:
            self.model = merge_adapters(self.model)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self._absent_weights and not is_adapted(self.model):
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {**state_dict, **self._absent_weights}
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        unexpected = [name for name in load_result.unexpected_keys if name not in self._absent_weights]
        super()._issue_warnings_after_load(load_result._replace(unexpected_keys=unexpected))

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
