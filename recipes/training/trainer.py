# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""`RecipeTrainer`: DeemTrainer with named parameter groups, and checkpoints that survive SIGKILL."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints

from modeling_deem.training_deem import DeemTrainer, fill_in_arguments
from recipes.data.faults import DataReport
from recipes.evaluation.answers import share_answered
from recipes.training.adapters import adapted_parts, add_adapters, is_adapted, merge_adapters
from recipes.training.finite import FiniteTrainer
from recipes.training.held_out import micro_batches
from recipes.training.latent_cache import remove_vae
from recipes.training.parameter_groups import format_parts, freeze_parts, parameter_groups, parts_table
from recipes.training.resuming import COMPLETE, ResumingTrainer, checkpoint_to_resume, forget_checkpoints
from recipes.training.step_meter import MeteredTrainer
from recipes.training.stream_trainer import StreamTrainer
from recipes.whole_files import whole_file, write_whole


@dataclass
class DeemTrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's optimizer, and with the parts of the model by name."""

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
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step; the last is logged always."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where logs go."})
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Samples per micro-batch of an evaluation; as in training by default."}
    )
    on_nan: str = field(
        default="stop",
        metadata={
            "help": "What to do with a step whose loss or gradient holds NaN or inf: stop the run, or skip the step.",
            "choices": ["stop", "skip"],
        },
    )
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
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        super().__post_init__()
        fill_in_arguments(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the steps of warm-up; a tenth of a run that would end in its warm-up."""
        steps = super().get_warmup_steps(num_training_steps)
        if self.warmup_steps < 1 or steps < num_training_steps:
            return steps
        shorter = math.ceil(num_training_steps / 10)
        if self.process_index == 0:
            print(f"warmup_steps {steps} would be all of the {num_training_steps} steps: {shorter} are taken.")
        return shorter


def prepare_parts(model: PreTrainedModel, args: DeemTrainingArguments) -> nn.Module:
    """Return the model with the parts frozen, in the precision and with the adapters that the arguments name."""
    freeze_parts(model, [*args.freeze, *adapted_parts(args.lora)])
    if args.frozen_dtype is not None:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and ".vae." not in name:
                parameter.data = parameter.data.to(getattr(torch, args.frozen_dtype))
    return model if args.lora is None else add_adapters(model, args.lora)


# ---- the trainer ----


class RecipeTrainer(FiniteTrainer, ResumingTrainer, DeemTrainer, MeteredTrainer, StreamTrainer):
    """`DeemTrainer` on a stream of data, with parts, questions and checkpoints of a recipe.

    Args:
        args: `DeemTrainingArguments`; `freeze`, `lora` and `groups` are applied here.
        data_report: filled by the data stream; printed and written to `data_report.json` when training ends, however
            it ends.
        eval_dataset: a list of samples is evaluated in micro-batches of one mode each.
        questions: samples that every evaluation asks, see `share_answered`; the result is `eval_answers`.
        without_vae: hold no VAE, because batches bring `target_latents`; checkpoints have it all the same.

    `train()` goes on from the last complete checkpoint in `output_dir` if there is one; pass
    `resume_from_checkpoint=False` to start anew. The output directory also receives `parts.json`: trainable and frozen
    parameters, learning rates and weight decays per part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: DeemTrainingArguments,
        data_report: DataReport | None = None,
        without_vae: bool = False,
        questions: Sequence[dict[str, Any]] = (),
        **kwargs: Any,
    ) -> None:
        if args.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size cannot be used: the order of the data depends on the batch size. Give a smaller "
                "--per_device_train_batch_size, and with it more --gradient_accumulation_steps: the step stays the same."
            )
        prepared = prepare_parts(model, args)
        self._absent_weights = remove_vae(model) if without_vae else {}
        super().__init__(model=prepared, args=args, **kwargs)
        self.data_report = data_report
        self.questions = questions

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the base class; samples in a list are put together by their mode."""
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(samples, list):
            return super().get_eval_dataloader(eval_dataset)
        batches = micro_batches(samples, self.args.eval_batch_size)
        collator = self.data_collator
        return self.accelerator.prepare(DataLoader(batches, batch_size=1, collate_fn=lambda ones: collator(ones[0])))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As the base class; ask the questions."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.questions:
            share = share_answered(self.accelerator.unwrap_model(self.model), self.processing_class, self.questions)
            output.metrics[f"{metric_key_prefix}_answers"] = share
        return output

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer chosen by the arguments over the named groups; print and save the table of parts.

        Raises:
            ValueError: every parameter is frozen.
        """
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
                write_whole(Path(self.args.output_dir, "parts.json"), json.dumps(table, indent=2) + "\n")
                settings = {**self.args.to_dict(), "world_size": self.args.world_size}
                text = json.dumps(settings, indent=2, default=str) + "\n"
                write_whole(Path(self.args.output_dir, "training_args.json"), text)
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
            ValueError: the best checkpoint of such a run is gone, or see `ResumingTrainer.train`.
        """
        if resume_from_checkpoint is False and self.is_world_process_zero():
            forget_checkpoints(self.args.output_dir)
        resume_from_checkpoint = checkpoint_to_resume(self.args.output_dir, resume_from_checkpoint)
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            if state.global_step >= self.args.max_steps:  # Trainer would take one step more
                self.check_same_run(resume_from_checkpoint)
                print(
                    f"{resume_from_checkpoint} has reached step {state.global_step} of {self.args.max_steps}: nothing to do."
                )
                self.state = state
                self._load_from_checkpoint(self._result_of(state, str(resume_from_checkpoint)))
                return TrainOutput(state.global_step, math.nan, {})
        try:
            output = super().train(resume_from_checkpoint, **kwargs)
            self.gather_data_report()
            return output
        finally:
            if self.data_report is not None and self.is_world_process_zero():
                print(self.data_report)
                try:
                    self.data_report.save(Path(self.args.output_dir, "data_report.json"))
                except OSError as error:  # what ended the run, or saving the model, says more
                    print(error)

    def _result_of(self, state: TrainerState, last: str) -> str:
        """Return the checkpoint that a finished run ended with: the best one if it was told so, else the last."""
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
        """Save the trained model and its processor. With `lora` adapters are merged; checkpoints hold adapters only."""
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
            with whole_file(folder / COMPLETE) as unfinished, open(unfinished, "w") as marker:
                os.fsync(marker)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)
