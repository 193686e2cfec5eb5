# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""DEEM's feedback for a vision-language model that is there already: SFT by trl, with the consistency loss added.

    python recipes/add_feedback.py                                           # a small LLaVA on the world, on a CPU
    python recipes/add_feedback.py --model llava-hf/llava-1.5-7b-hf --diffusion stabilityai/stable-diffusion-2-1-base \\
        --data 'chats/*.parquet' --lora '{"r": 64}' --freeze language_model --max_steps 2000 --output_dir runs/llava
    python recipes/add_feedback.py --feedback '{"source": "language", "objective": "contrastive"}' --max_steps 20

The model is any whose forward takes `mm_encoder_outputs` (LLaVA, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM,
PaliGemma, Gemma 3, ...). Without `--diffusion` a small denoiser trains from scratch on pixels. All that `--freeze` does not
name trains; with `--lora` the language model gets adapters instead, merged at the end. What is saved is an ordinary
checkpoint of the model's own class, the feedback beside it in `feedback/`. Logs hold `task_loss` and `consistency_loss`.
"""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_deem import ConsistencyLossMixin, DeemFeedback, adapter_targets
from recipes.training.defaults import default_data, default_parts
from recipes.training.feedback_rows import chat_rows, with_answers_marked
from recipes.training.parameter_groups import format_parts, match_parameters, parts_table
from recipes.training.small_vlm import compose_small_vlm


def mapping(name: str, given: dict | str | None) -> dict[str, Any] | None:
    """Return the option `--name` as a mapping.

    Raises:
        ValueError: it is none.
    """
    try:
        given = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        pass
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"--{name} {given} is no mapping: give JSON such as '{{\"r\": 16}}'.")
    return given


@dataclass
class ScriptArguments:
    """The model, what redraws its images, and the chats to learn."""

    model: str | None = field(default=None, metadata={"help": "Vision-language model; by default a small LLaVA."})
    diffusion: str | None = field(
        default=None,
        metadata={"help": "Diffusers pipeline whose denoiser and VAE redraw; by default one from scratch."},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rows of messages and images, or any format of docs/data.md; chats of the world by default."
        },
    )
    image_folders: list[str] = field(default_factory=list, metadata={"help": "Folders that rows may name images in."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Most rows of a source that is not rows of messages."}
    )
    feedback: dict | str | None = field(
        default=None,
        metadata={
            "help": "Fields of DeemFeedbackConfig (JSON): source, connector, tokens, objective, loss_weight, ..."
        },
    )
    feedback_learning_rate: float | None = field(default=None, metadata={"help": "Of connector and scratch denoiser."})
    connector_steps: int = field(default=0, metadata={"help": "Steps in which the feedback trains without the model."})
    augment: bool = field(default=False, metadata={"help": "Mirror and crop images, for model and targets alike."})
    freeze: list[str] = field(default_factory=list, metadata={"help": "Parts that do not train, by name."})
    lora: dict | str | None = field(
        default=None, metadata={"help": "Adapters in the language model (LoraConfig, JSON)."}
    )

    def __post_init__(self) -> None:
        self.feedback, self.lora = mapping("feedback", self.feedback), mapping("lora", self.lora)


DEFAULTS = ["--max_length", "1024", "--learning_rate", "1e-4", "--logging_steps", "10", "--bf16", "false"]
SMALL = ["--use_cpu", "true", "--max_steps", "200", "--per_device_train_batch_size", "16", "--learning_rate", "5e-4"]
SMALL += ["--warmup_steps", "10", "--activation_checkpointing", "false", "--report_to", "none", "--max_rows", "2000"]


class FeedbackTrainer(ConsistencyLossMixin, SFTTrainer):
    """trl's trainer with the consistency loss."""


def parse(args: list[str]) -> tuple[ScriptArguments, SFTConfig]:
    """Return the options; what the command line says comes last, and so it holds."""
    small = SMALL if "--model" not in args else []
    given = {arg for arg in args if arg.startswith("--")}
    filled: list[str] = []
    for preset in (DEFAULTS, small):
        for name, value in zip(preset[::2], preset[1::2], strict=True):
            if name not in given:
                filled += [name, value]
    if "--output_dir" not in given:
        filled += ["--output_dir", "runs/add_feedback"]
    parser = TrlParser((ScriptArguments, SFTConfig), allow_abbrev=False)
    return parser.parse_args_and_config([*filled, *args])


def load(arguments: ScriptArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    if arguments.model is None:
        return compose_small_vlm(default_parts()[1])
    model = AutoModelForImageTextToText.from_pretrained(arguments.model)
    return model, AutoProcessor.from_pretrained(arguments.model)


def compose_feedback(model: PreTrainedModel, diffusion: str | None, fields: dict[str, Any]) -> DeemFeedback:
    if diffusion is None:
        return DeemFeedback.from_scratch(model, **fields)
    return DeemFeedback.from_diffusion_pretrained(diffusion, model, **fields)


def adapters(model: PreTrainedModel, options: dict[str, Any]) -> LoraConfig:
    """LoRA in the language model; what else trains is trained whole, beside the adapters."""
    paths = {id(module): name for name, module in model.named_modules()}
    language_model = paths[id(model.get_decoder())]
    model.get_submodule(language_model).requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    inner = model.get_submodule(language_model.rpartition(".")[0]) if "." in language_model else model
    prefix = language_model.rpartition(".")[0]
    whole = [
        f"{prefix}.{name}".removeprefix(".")
        for name, module in inner.named_children()
        if any(parameter.requires_grad for parameter in module.parameters())
    ]
    targets = adapter_targets(model, [language_model])
    return LoraConfig(target_modules=targets, modules_to_save=whole or None, **options)


def main(args: list[str] | None = None) -> FeedbackTrainer:
    arguments, training_args = parse(sys.argv[1:] if args is None else args)
    set_seed(training_args.seed)
    model, processor = load(arguments)
    data = arguments.data or default_data("chats")
    rows = chat_rows(data, processor, arguments.image_folders, arguments.max_rows)
    rows, training_args.assistant_only_loss = with_answers_marked(rows, processor)
    feedback = compose_feedback(model, arguments.diffusion, arguments.feedback or {})
    named = dict(model.named_parameters())
    for name in {name for pattern in arguments.freeze for name in match_parameters(pattern, named)}:
        named[name].requires_grad_(False)
    trainer = FeedbackTrainer(
        model,
        training_args,
        train_dataset=rows,
        processing_class=processor,
        peft_config=None if arguments.lora is None else adapters(model, arguments.lora),
        feedback=feedback,
        feedback_learning_rate=arguments.feedback_learning_rate,
        connector_steps=arguments.connector_steps,
        augment=arguments.augment,
    )
    trains = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    groups = [{"names": list(trains), "lr": training_args.learning_rate, "weight_decay": training_args.weight_decay}]
    print(format_parts(parts_table(trainer.model, groups)))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if arguments.lora is not None:
        trainer.model = trainer.model.merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()
