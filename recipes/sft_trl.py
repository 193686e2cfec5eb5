# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Text alone, by trl's `SFTTrainer`: a pretrained DEEM learns from chats about images, in the form trl users have them.

    python recipes/sft_trl.py                                                # after recipes/pretrain.py, on a CPU
    python recipes/sft_trl.py --data 'chats/*.parquet' hub:HuggingFaceH4/llava-instruct-mix-vsft
    python recipes/sft_trl.py --config recipes/configs/sft_trl.yaml --dry_run      # what that would do; runs nothing

Without `--config`, recipes/configs/sft_trl_cpu.yaml holds; flags override it. Data are rows of `messages` and `images`
(or one `image`). SFTTrainer never calls the image decoder: the feedback, and drawing, need recipes/sft.py. Training
goes on from a checkpoint only where `--resume_from_checkpoint` names one.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from recipes.original.published import SIZES
from recipes.training.adapters import is_adapted, merge_adapters
from recipes.training.defaults import default_data, model_fields, parse_recipe
from recipes.training.plan import make_plan
from recipes.training.run import load_for_training, planned_config
from recipes.training.text_rows import load_rows
from recipes.training.text_trainer import TextTrainingArguments, freeze_image_decoder, make_trainer

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
        default=None, metadata={"help": "Side of the encoder's images in pixels; the checkpoint's by default."}
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
        metadata={"help": "Held-out rows, as --data; `world` for unseen images of the world. See eval_strategy."},
    )
    image_folders: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders that rows may name images in, besides those of the data itself; rows that name others are "
            "left out and counted."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print parts, groups, steps and memory, from shapes alone; run nothing."}
    )
    sizes: str | None = field(
        default=None,
        metadata={"help": "Sizes that --dry_run plans with where there is no checkpoint yet.", "choices": [*SIZES]},
    )

    def __post_init__(self) -> None:
        self.model_config = model_fields(self.model_config)


ARGUMENTS = (ScriptArguments, TextTrainingArguments)


def main() -> None:
    script_args, training_args = parse_recipe(ARGUMENTS, CONFIG)
    if script_args.dry_run:
        changes = {**(script_args.model_config or {}), **TEXT_ALONE}
        config = planned_config(script_args.model, script_args.sizes, changes)
        freeze_image_decoder(config, training_args)
        print(make_plan(config, training_args, pack_length=0))
        return
    set_seed(training_args.seed)
    model, processor = load_for_training(script_args.model, script_args.model_config, script_args.image_size)
    data = script_args.data or default_data("chats")
    held_out = script_args.eval_data
    held_out = default_data("chats", held_out=True) if held_out == ["world"] else held_out
    rows, held_out_rows = (load_rows(sources, script_args.image_folders) for sources in (data, held_out))
    trainer = make_trainer(model, processor, training_args, rows, held_out_rows)
    trainer.started_from = {"model": script_args.model}
    trainer.train(training_args.resume_from_checkpoint)
    if is_adapted(trainer.model):
        trainer.model = merge_adapters(trainer.model)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
