# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the training recipes share: options, loading, the data of evaluations, the run itself."""

import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, EarlyStoppingCallback
from transformers.trainer_utils import IntervalStrategy

from modeling_deem import DeemConfig, DeemForConditionalGeneration
from processing import DeemDataCollator, DeemProcessor
from recipes.data.sources import DataArguments, build_dataset
from recipes.evaluation.answers import is_question
from recipes.generation.prompt_form import set_prompt_form
from recipes.original.published import SIZES
from recipes.training.held_out import held_out_samples
from recipes.training.latent_cache import LatentCache, LatentCollator, transform_id, vae_id
from recipes.training.plan import make_plan
from recipes.training.resuming import last_complete_checkpoint, load_sound
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer


@dataclass
class RunArguments:
    """Options of a run that are neither model, data nor optimizer."""

    dry_run: bool = field(
        default=False, metadata={"help": "Print parts, groups, steps and memory, from shapes alone; run nothing."}
    )
    sizes: str | None = field(
        default=None,
        metadata={"help": "Sizes that --dry_run plans with where there is no checkpoint yet.", "choices": [*SIZES]},
    )
    latents: str | None = field(
        default=None,
        metadata={"help": "Folder of recipes/precompute_latents.py to read latents from; no VAE is held then."},
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Held-out sources, as --data; `world` for unseen images of the world. See eval_strategy."},
    )
    eval_samples: int = field(default=64, metadata={"help": "Held-out samples that the losses are computed on."})
    eval_answers: int = field(default=0, metadata={"help": "Questions among them that the model is asked."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Evaluations without a better metric_for_best_model after which to stop."}
    )


def load_for_training(
    folder: str, model_config: dict[str, Any] | None = None, image_size: int | None = None
) -> tuple[DeemForConditionalGeneration, DeemProcessor]:
    """Return model and processor of a DEEM checkpoint.

    Args:
        model_config: fields of `DeemConfig` to change; parts that they add are initialized.
        image_size: side of the encoder's images in pixels, if not the checkpoint's.
    """
    model = load_sound(folder, model_config)
    processor = AutoProcessor.from_pretrained(folder)
    if image_size is not None:
        processor.image_processor.size = {"height": image_size, "width": image_size}
    return model, processor


def save_initial(
    model: DeemForConditionalGeneration, processor: DeemProcessor, folder: Path, anew: bool = False
) -> None:
    """Keep the model as it was before training, for comparison; written whole or not at all.

    A folder that is already there stays if training goes on from a checkpoint; without one it is left from a run that
    wrote none, and is replaced; so it is with `anew`.
    """
    if not anew and folder.exists() and last_complete_checkpoint(folder.parent):
        return
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    os.replace(unfinished, folder)


def planned_config(folder: str | None, sizes: str | None, model_config: dict[str, Any] | None) -> DeemConfig:
    """Return the configuration that a dry run plans with: of the checkpoint if there is one, else of known sizes.

    Raises:
        ValueError: there is neither.
    """
    if folder is not None and Path(folder, "config.json").is_file():
        return AutoConfig.from_pretrained(folder, **(model_config or {}))
    if sizes is None:
        raise ValueError(
            f"A plan needs sizes, and there is no checkpoint at {folder}: give --model a folder with a config.json, or "
            f"--sizes, one of {', '.join(SIZES)}."
        )
    return DeemConfig(**{**SIZES[sizes], **(model_config or {})})


def print_plan(
    config: DeemConfig, run_args: RunArguments, data_args: DataArguments, training_args: DeemTrainingArguments
) -> None:
    """Print what `--dry_run` answers."""
    print(make_plan(config, training_args, data_args.pack_length, without_vae=run_args.latents is not None))


def needs_targets(model: DeemForConditionalGeneration) -> bool:
    """Whether a loss needs target images."""
    weights = model.loss_weights()
    return model.image_decoder is not None and bool(weights["image_loss"] or weights["consistency_loss"])


def held_out(
    run_args: RunArguments,
    data_args: DataArguments,
    processor: DeemProcessor,
    training_args: DeemTrainingArguments,
    caption_forms: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Return the samples that every evaluation uses.

    Raises:
        ValueError: there are held-out data, but no evaluation that would read them.
    """
    if not run_args.eval_data:
        return []
    if training_args.eval_strategy == IntervalStrategy.NO and not training_args.eval_on_start:
        raise ValueError(
            f"--eval_data {' '.join(run_args.eval_data)} would never be evaluated: give --eval_strategy steps and "
            "--eval_steps, or --eval_on_start true."
        )
    arguments = replace(data_args, data=run_args.eval_data)
    return held_out_samples(arguments, processor, run_args.eval_samples, training_args.seed, caption_forms)


def train(
    model: DeemForConditionalGeneration,
    processor: DeemProcessor,
    run_args: RunArguments,
    data_args: DataArguments,
    training_args: DeemTrainingArguments,
    caption_forms: tuple[str, ...] = ("plain",),
    started_from: dict[str, str] | None = None,
) -> RecipeTrainer:
    """Train, going on from the last complete checkpoint, and save model, processor and the trainer's state.

    Args:
        started_from: `{option: folder}` that the model was made of; a checkpoint of another start is refused.
        caption_forms: forms in which caption sources are used, see `build_dataset`.
    """
    dataset, report = build_dataset(
        data_args,
        processor,
        training_args.per_device_train_batch_size,
        training_args.seed,
        caption_forms,
        most_images=model.config.image_attention_max_images - 1,
        most_tokens=getattr(model.config.text_config, "max_position_embeddings", 0),
    )
    set_prompt_form(processor, [source.reader for source in dataset.sources])
    samples = held_out(run_args, data_args, processor, training_args, caption_forms)
    cache = None
    if run_args.latents is not None and needs_targets(model):
        cache = LatentCache(run_args.latents, vae_id(model.image_decoder.vae), transform_id(processor))
    trainer = RecipeTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=samples or None,
        data_collator=(
            DeemDataCollator(processor, return_targets=needs_targets(model))
            if cache is None
            else LatentCollator(processor, cache)
        ),
        processing_class=processor,
        data_report=report,
        without_vae=cache is not None,
        questions=[one for sample in samples for one in sample.get("samples", [sample]) if is_question(one)][
            : run_args.eval_answers
        ],
    )
    trainer.started_from = started_from
    if run_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(run_args.early_stopping_patience))
    trainer.train(training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    return trainer
