# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Training on text alone by trl's `SFTTrainer`: rows of chats -> batches -> trainer (recipes/sft_trl.py)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.data_utils import prepare_multimodal_messages

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from modeling_deem.training_deem import refuse_without_effect
from processing import DeemDataCollator, DeemProcessor
from recipes.generation.prompt_form import use_chat_form
from recipes.training.finite import FiniteTrainer
from recipes.training.parameter_groups import new_rows
from recipes.training.resuming import ResumingTrainer
from recipes.training.step_meter import MeteredTrainer
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer, prepare_parts


@dataclass
class TextTrainingArguments(DeemTrainingArguments, SFTConfig):
    """SFTConfig with the names of parts, rates and adapters of the other recipes, and their defaults."""

    # trl has these defaults under older names
    activation_checkpointing: bool | None = field(
        default=True, metadata={"help": "Compute activations again in the backward pass instead of keeping them."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of a chat. A longer one is an error: no image is cut through."}
    )


class TextTrainer(FiniteTrainer, ResumingTrainer, MeteredTrainer, SFTTrainer):
    """trl's trainer with `groups`, `on_nan`, checks of what it goes on from, and the table of parts in parts.json."""

    create_optimizer = RecipeTrainer.create_optimizer


class ChatCollator:
    """Turns rows of `messages` and `images` into the batch of `DeemDataCollator`, labels included, nothing to draw.

    Args:
        max_length: most tokens of a chat; a longer one raises ValueError.
    """

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


def freeze_image_decoder(config: DeemConfig, args: TextTrainingArguments) -> None:
    """Add the image decoder, which gets no gradient from text, to `freeze`, so that no table says it trains."""
    if config.image_decoder_config is not None and "image_decoder" not in args.freeze:
        args.freeze = [*args.freeze, "image_decoder"]


def make_trainer(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    args: TextTrainingArguments,
    rows: Dataset,
    eval_rows: Dataset | None = None,
) -> TextTrainer:
    """Return the trainer of a model whose parts are frozen and adapted as the arguments say.

    Raises:
        ValueError: only the new rows of the head were to train, or an argument has no effect.
    """
    refuse_without_effect(args)
    use_chat_form(processor)
    freeze_image_decoder(model.config, args)
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
