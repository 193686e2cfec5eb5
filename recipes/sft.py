# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Stages 2 and 3: a pretrained DEEM learns to answer questions about images and regions, without forgetting to draw.

    python recipes/sft.py                                                    # after recipes/pretrain.py, on a CPU
    python recipes/sft.py --model runs/pretrain --data vqa/ 'captions/*.tar' --data_probs 3 1
    python recipes/sft.py --config recipes/configs/sft_vqa.yaml --dry_run    # what that would do; runs nothing

Without `--config`, recipes/configs/sft_vqa_cpu.yaml holds; flags override it. Caption tars are used in three
ways equally often, unless `caption_forms` says otherwise: as dialogues that ask for a description, as dialogues that ask
for an image, and as in pretraining. Resuming and the files written are those of recipes/pretrain.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from modeling_deem import DeemForConditionalGeneration
from processing import DeemProcessor
from recipes.data.readers.captions import FORMS
from recipes.data.sources import DataArguments
from recipes.training.defaults import FOLDERS, default_data, model_fields, parse_recipe
from recipes.training.run import RunArguments, load_for_training, planned_config, print_plan, train
from recipes.training.trainer import DeemTrainingArguments

CONFIG = Path(__file__).parent / "configs" / "sft_vqa_cpu.yaml"


@dataclass
class ModelArguments:
    """What to start from."""

    model: str = field(default="runs/pretrain", metadata={"help": "Pretrained DEEM checkpoint, model and processor."})
    model_config: dict | str | None = field(
        default=None, metadata={"help": "Fields of DeemConfig that differ (a mapping; JSON as a flag)."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the encoder's images in pixels; the checkpoint's by default."}
    )
    world: list[str] = field(
        default_factory=lambda: ["vqa", "captions"],
        metadata={
            "help": "Formats of the synthetic world to train on where no --data is given.",
            "choices": [*FOLDERS],
        },
    )
    world_probs: list[float] | None = field(
        default=None, metadata={"help": "How often each of --world is drawn; equally often by default."}
    )
    caption_forms: list[str] = field(
        default_factory=lambda: list(FORMS),
        metadata={"help": f"How caption sources are used: {', '.join(FORMS)}.", "choices": [*FORMS]},
    )

    def __post_init__(self) -> None:
        self.model_config = model_fields(self.model_config)


ARGUMENTS = (ModelArguments, RunArguments, DataArguments, DeemTrainingArguments)


def load(
    model_args: ModelArguments, run_args: RunArguments, data_args: DataArguments, seed: int
) -> tuple[DeemForConditionalGeneration, DeemProcessor]:
    """Return model and processor to start from; fill in the default data.

    Raises:
        ValueError: there is no checkpoint yet.
    """
    if not Path(model_args.model).is_dir() and Path(model_args.model).parts[0] == "runs":
        raise ValueError(
            f"No checkpoint at {model_args.model}: run the recipe that writes it first (recipes/pretrain.py writes "
            "runs/pretrain, recipes/sft.py runs/sft), or name one by --model."
        )
    set_seed(seed)
    model, processor = load_for_training(model_args.model, model_args.model_config, model_args.image_size)
    if not data_args.data:
        data_args.data = default_data(*model_args.world)
        data_args.data_probs = data_args.data_probs or model_args.world_probs
    if run_args.eval_data == ["world"]:
        run_args.eval_data = default_data(*model_args.world, held_out=True)
    return model, processor


def main() -> None:
    model_args, run_args, data_args, training_args = parse_recipe(ARGUMENTS, CONFIG)
    if run_args.dry_run:
        config = planned_config(model_args.model, run_args.sizes, model_args.model_config)
        print_plan(config, run_args, data_args, training_args)
        return
    model, processor = load(model_args, run_args, data_args, training_args.seed)
    forms, start = tuple(model_args.caption_forms), {"model": model_args.model}
    train(model, processor, run_args, data_args, training_args, forms, start)


if __name__ == "__main__":
    main()
