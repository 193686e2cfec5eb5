# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Training on text alone by trl's `SFTTrainer`: rows of chats -> batches -> trainer (recipes/sft_trl.py)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value, concatenate_datasets, load_dataset
from datasets import Image as ImageFeature
from trl import SFTConfig, SFTTrainer
from trl.data_utils import prepare_multimodal_messages

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from modeling_deem.training_deem import refuse_without_effect
from processing import DeemDataCollator, DeemProcessor
from recipes.data.readers.rows import BUILDERS, HUB
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


def load_rows(sources: Sequence[str]) -> Dataset | None:
    """Return the rows of all sources, one source after another; None without sources.

    Raises:
        ValueError: a source does not exist, or has no column `messages`.
    """
    tables = []
    for source in sources:
        if source.startswith(HUB):
            name, configuration, split, *_ = *source.removeprefix(HUB).split(":"), None, None
            table = load_dataset(name, configuration or None, split=split or "train")
        elif Path(source).is_dir():
            table = load_dataset(source, split="train")
        elif (suffix := Path(source).suffix) in BUILDERS:
            table = load_dataset(BUILDERS[suffix], data_files=source, split="train")
        else:
            raise ValueError(
                f"{source} is no folder and no {', '.join(BUILDERS)} file. Other formats: recipes/sft.py."
            )
        if "messages" not in table.column_names:
            raise ValueError(
                f"{source} has the columns {table.column_names}; expected messages, and images or image. Rename them, "
                "or train with recipes/sft.py, which reads more layouts."
            )
        kept = table.select_columns([c for c in table.column_names if c in ("messages", "images", "image")])
        tables.append(_with_images(kept, Path(source) if Path(source).is_dir() else Path(source).parent))
    return concatenate_datasets(tables) if tables else None


def _placed(row: dict[str, Any], name: str, folder: str) -> dict[str, Any]:
    """Put the folder before the paths in a column."""
    paths = row[name] if isinstance(row[name], list) else [row[name]]
    placed = [path if path is None or "://" in path else os.path.join(folder, path) for path in paths]
    return {name: placed if isinstance(row[name], list) else placed[0]}


def _with_images(table: Dataset, folder: Path) -> Dataset:
    """Return rows whose images are opened when read: from bytes, or from paths, which are relative to `folder`."""
    for name, kind in (("images", List(ImageFeature())), ("image", ImageFeature())):
        if name in table.column_names and table.features[name] != kind:
            if table.features[name] in (Value("string"), List(Value("string"))):
                table = table.map(_placed, fn_kwargs={"name": name, "folder": str(folder)})
            table = table.cast_column(name, kind)
    if "image" not in table.column_names and "images" not in table.column_names:  # trl looks for a column of images
        table = table.add_column("images", [[]] * len(table), feature=List(ImageFeature()))
    return table


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
