# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Text alone, by trl's `SFTTrainer`: a pretrained DEEM learns from chats about pictures, in the form trl users have them.

    python recipes/sft_trl.py                                                # after recipes/pretrain.py, on a CPU
    python recipes/sft_trl.py --data 'chats/*.parquet' hub:HuggingFaceH4/llava-instruct-mix-vsft
    python recipes/sft_trl.py --config recipes/configs/sft_trl.yaml --dry_run      # what that would do; runs nothing

Without `--config`, recipes/configs/sft_trl_cpu.yaml holds; flags override it. Data are rows of `messages` and `images`
(or one `image`). SFTTrainer never calls the image decoder: the feedback, and drawing, need recipes/sft.py. Training
goes on from a checkpoint only where `--resume_from_checkpoint` names one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer
from trl.data_utils import prepare_multimodal_messages

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from processing import DeemDataCollator, DeemProcessor
from recipes.data.readers.rows import BUILDERS, HUB
from recipes.original.published import SIZES
from recipes.training.adapters import is_adapted, merge_adapters
from recipes.training.defaults import default_data, parse_recipe
from recipes.training.parameter_groups import new_rows
from recipes.training.plan import make_plan
from recipes.training.run import load_checkpoint, planned_config
from recipes.training.trainer import DeemTrainer, DeemTrainingArguments, prepare_parts

CONFIG = Path(__file__).parent / "configs" / "sft_trl_cpu.yaml"
TEXT_ALONE = {"image_loss_weight": 0.0, "consistency_loss_weight": 0.0}


@dataclass
class ScriptArguments:
    """What to start from, and the chats to learn."""

    model: str = field(default="runs/pretrain", metadata={"help": "Pretrained DEEM checkpoint, model and processor."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of DeemConfig that differ (a mapping; JSON as a flag)."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the encoder's pictures in pixels; the checkpoint's by default."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rows of messages and images: folders, parquet, arrow or jsonl files, or "
            "hub:<owner>/<name>[:<configuration>[:<split>]]; chats of the synthetic world by default."
        },
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out rows, as --data; `world` for unseen pictures of the world. See eval_strategy."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print parts, groups, steps and memory, from shapes alone; run nothing."}
    )
    sizes: str | None = field(
        default=None,
        metadata={"help": "Sizes that --dry_run plans with where there is no checkpoint yet.", "choices": [*SIZES]},
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_config, str):
            self.model_config = json.loads(self.model_config)


@dataclass
class TextTrainingArguments(DeemTrainingArguments, SFTConfig):
    """SFTConfig with the names of parts, rates and adapters of the other recipes, and their defaults."""

    # trl's own defaults under the names of today
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Compute activations again in the backward pass instead of keeping them."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of a chat. A longer one is an error: no picture is cut through."}
    )


ARGUMENTS = (ScriptArguments, TextTrainingArguments)


class TextTrainer(SFTTrainer):
    """trl's trainer with `groups`, and with the table of parts in parts.json."""

    create_optimizer = DeemTrainer.create_optimizer


class ChatCollator:
    """Rows of `messages` and `images` -> the batch of `DeemDataCollator`, labels included, without anything to draw."""

    def __init__(self, processor: DeemProcessor, max_length: int | None = None) -> None:
        self.collator = DeemDataCollator(processor, return_targets=False, max_length=max_length)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples = []
        for row in rows:
            images = [row["image"]] if row.get("image") is not None else row.get("images") or []
            samples.append({"messages": prepare_multimodal_messages(row["messages"], images)})
        batch = self.collator(samples)
        batch.pop("document_starts", None)  # only drawing asks where a document starts
        return batch


def load_rows(sources: Sequence[str]) -> Dataset | None:
    """The rows of all sources, one source after another; None without sources.

    Raises:
        ValueError: a source that is not there, or has no column `messages`.
    """
    parts = []
    for source in sources:
        if source.startswith(HUB):
            name, configuration, split, *_ = *source.removeprefix(HUB).split(":"), None, None
            part = load_dataset(name, configuration or None, split=split or "train")
        elif Path(source).is_dir():
            part = load_dataset(source, split="train")
        elif (suffix := Path(source).suffix) in BUILDERS:
            part = load_dataset(BUILDERS[suffix], data_files=source, split="train")
        else:
            raise ValueError(
                f"{source} is no folder and no {', '.join(BUILDERS)} file. Other formats: recipes/sft.py."
            )
        if "messages" not in part.column_names:
            raise ValueError(
                f"{source} has the columns {part.column_names}; expected messages, and images or image. Rename them, or "
                "train with recipes/sft.py, which reads more layouts."
            )
        parts.append(part.select_columns([c for c in part.column_names if c in ("messages", "images", "image")]))
    return concatenate_datasets(parts) if parts else None


def text_side(config: DeemConfig, args: TextTrainingArguments) -> None:
    """Freezes the image decoder, which gets no gradient from text, so that no table says it trains."""
    if config.image_decoder_config is not None and "image_decoder" not in args.freeze:
        args.freeze = [*args.freeze, "image_decoder"]


def make_trainer(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    args: TextTrainingArguments,
    rows: Dataset,
    eval_rows: Dataset | None = None,
) -> TextTrainer:
    """The trainer, with parts frozen and adapted as the arguments say.

    Raises:
        ValueError: if only the new rows of the head were to train.
    """
    text_side(model.config, args)
    prepared = prepare_parts(model, args)
    if new_rows(prepared):
        raise ValueError(
            "SFTTrainer multiplies by the head's weight itself, so its old rows cannot be held: add lm_head to freeze, or "
            "train head and language model whole (no lm_head.old_rows, no frozen language model)."
        )
    trainer = TextTrainer(
        model=prepared,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=ChatCollator(processor, args.max_length),
        processing_class=processor,
    )
    vars(model.config).pop("use_cache", None)  # Trainer writes False; saved, it would make generation slow
    return trainer


def main() -> None:
    script_args, training_args = parse_recipe(ARGUMENTS, CONFIG)
    if script_args.dry_run:
        changes = {**(script_args.model_config or {}), **TEXT_ALONE}
        config = planned_config(script_args.model, script_args.sizes, changes)
        text_side(config, training_args)
        print(make_plan(config, training_args, pack_length=0))
        return
    set_seed(training_args.seed)
    model, processor = load_checkpoint(script_args.model, script_args.model_config, script_args.image_size)
    data = script_args.data or default_data("chats")
    held_out = script_args.eval_data
    held_out = default_data("chats", held_out=True) if held_out == ["world"] else held_out
    trainer = make_trainer(model, processor, training_args, load_rows(data), load_rows(held_out))
    trainer.train(training_args.resume_from_checkpoint)
    if is_adapted(trainer.model):
        trainer.model = merge_adapters(trainer.model)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
