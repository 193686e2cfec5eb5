# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Stage 1: a DEEM composed of three pretrained parts learns to read and draw from documents and captions.

    python recipes/pretrain.py                                               # the built-in default, on a CPU
    python recipes/pretrain.py --data 'photos/*.tar' --max_steps 20          # the same on your own captioned images
    python recipes/pretrain.py --config recipes/configs/pretrain.yaml \\
        --vision V --text T --diffusion D --data mmc4/mmc4_annts 'laion/*.tar'   # the paper's settings
    python recipes/pretrain.py --config recipes/configs/pretrain.yaml --dry_run  # what that would do; runs nothing

Without `--config`, recipes/configs/pretrain_cpu.yaml holds, with parts of your own pretrain_own_cpu.yaml, which freezes
what the paper freezes; flags override it. The same command started again goes on
from the last complete checkpoint. Writes into `--output_dir`: `initial/` (the composed model before training),
`checkpoint-<step>/`, the trained model and processor, `parts.json`, `data_report.json`, `trainer_state.json`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from modeling_deem import DeemConfig, DeemForConditionalGeneration, drawn_size
from processing import DeemProcessor
from recipes.data.sources import DataArguments, find_files
from recipes.training.defaults import default_data, default_parts, merge, model_fields, parse_recipe
from recipes.training.run import RunArguments, load_for_training, planned_config, print_plan, save_initial, train
from recipes.training.trainer import DeemTrainingArguments

CONFIG = Path(__file__).parent / "configs" / "pretrain_cpu.yaml"
OWN_PARTS_CONFIG = CONFIG.with_name("pretrain_own_cpu.yaml")


@dataclass
class ModelArguments:
    """What to start from: a DEEM checkpoint, or three parts. Without either, small parts are trained on the world."""

    model: str | None = field(default=None, metadata={"help": "DEEM checkpoint to go on with."})
    vision: str | None = field(default=None, metadata={"help": "Vision encoder with image processor."})
    text: str | None = field(default=None, metadata={"help": "Causal language model with tokenizer."})
    diffusion: str | None = field(default=None, metadata={"help": "Folder laid out as a diffusers pipeline."})
    num_image_tokens: int = field(default=77, metadata={"help": "Image tokens per image, when composing."})
    model_config: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of DeemConfig that differ (a mapping; JSON as a flag, merged into the file's)."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the encoder's images in pixels; the encoder's own by default."}
    )
    do_center_crop: bool = field(default=False, metadata={"help": "Crop images to a square; else squash them."})

    def __post_init__(self) -> None:
        self.model_config = model_fields(self.model_config)
        parts = {"vision": self.vision, "text": self.text, "diffusion": self.diffusion}
        missing = [name for name, part in parts.items() if part is None]
        if self.model and len(missing) < 3:
            raise ValueError(f"--model {self.model} and parts were given: give a DEEM checkpoint or its three parts.")
        if 0 < len(missing) < 3:
            raise ValueError(f"--{' and --'.join(missing)} missing: a DEEM is composed of all three of {list(parts)}.")


ARGUMENTS = (ModelArguments, RunArguments, DataArguments, DeemTrainingArguments)


def default_config(args: Sequence[str]) -> Path:
    """Return the configuration that holds without `--config`: for parts of one's own, what the paper freezes is frozen.

    Args:
        args: the command line; parts that recipes/parts.py made are those of the small default.
    """
    flags = [piece for arg in args for piece in arg.split("=", 1)]
    parts = [flags[at + 1] for at, flag in enumerate(flags[:-1]) if flag in ("--vision", "--text", "--diffusion")]
    return OWN_PARTS_CONFIG if any(not Path(part, "training.json").is_file() for part in parts) else CONFIG


def load_or_compose(arguments: ModelArguments) -> tuple[DeemForConditionalGeneration, DeemProcessor]:
    """Return model and processor to start from."""
    if arguments.model:
        return load_for_training(arguments.model, arguments.model_config, arguments.image_size)
    if not arguments.vision:
        arguments.vision, arguments.text, arguments.diffusion = default_parts()
    processor = DeemProcessor.from_parts(
        AutoImageProcessor.from_pretrained(arguments.vision),
        AutoTokenizer.from_pretrained(arguments.text),
        num_image_tokens=arguments.num_image_tokens,
        target_size=drawn_size(arguments.diffusion),
        do_center_crop=arguments.do_center_crop,
        grounding_tokens=True,
    )
    if arguments.image_size is not None:
        processor.image_processor.size = {"height": arguments.image_size, "width": arguments.image_size}
    model = DeemForConditionalGeneration.from_vision_text_diffusion_pretrained(
        arguments.vision,
        arguments.text,
        arguments.diffusion,
        num_image_tokens=arguments.num_image_tokens,
        tokenizer=processor.tokenizer,
        image_size=arguments.image_size,
        freeze=(),  # the recipe says what trains
        **(arguments.model_config or {}),
    )
    return model, processor


def compose_small(vision: str, text: str, diffusion: str) -> tuple[DeemForConditionalGeneration, DeemProcessor]:
    """Return model and processor of parts of recipes/parts.py, joined as the default configuration says, untrained."""
    joints = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    fields = {name: joints[name] for name in ("num_image_tokens", "model_config")}
    return load_or_compose(ModelArguments(vision=vision, text=text, diffusion=diffusion, **fields))


def planned_model(arguments: ModelArguments, run_args: RunArguments) -> DeemConfig:
    """Return the configuration that a dry run plans with; parts are loaded to learn their sizes."""
    if arguments.vision:
        return load_or_compose(arguments)[0].config
    composed = {"perceiver_config": {"num_queries": arguments.num_image_tokens}}
    changes = merge({} if arguments.model else composed, arguments.model_config or {})
    return planned_config(arguments.model, run_args.sizes, changes)


def load(
    model_args: ModelArguments, run_args: RunArguments, data_args: DataArguments, seed: int
) -> tuple[DeemForConditionalGeneration, DeemProcessor]:
    """Return model and processor to start from; fill in the default data."""
    data_args.data = data_args.data or default_data("mmc4", "captions")
    if run_args.eval_data == ["world"]:
        run_args.eval_data = default_data("mmc4", "captions", held_out=True)
    for data in data_args.data:
        find_files(data)  # a wrong path shows now, not after minutes of making parts
    set_seed(seed)
    return load_or_compose(model_args)


def main() -> None:
    model_args, run_args, data_args, training_args = parse_recipe(ARGUMENTS, default_config(sys.argv[1:]))
    if run_args.dry_run:
        print_plan(planned_model(model_args, run_args), run_args, data_args, training_args)
        return
    model, processor = load(model_args, run_args, data_args, training_args.seed)
    initial = Path(training_args.output_dir, "initial")
    with training_args.main_process_first(local=False, desc="saving the initial model"):  # the others find it there
        save_initial(model, processor, initial, anew=training_args.resume_from_checkpoint is False)
    if training_args.lora is not None:  # adapters are saved with the name of what they adapt
        model, processor = load_for_training(str(initial))
    start = {name: getattr(model_args, name) for name in ("model", "vision", "text", "diffusion")}
    start = {name: folder for name, folder in start.items() if folder}
    train(model, processor, run_args, data_args, training_args, started_from=start)


if __name__ == "__main__":
    main()
