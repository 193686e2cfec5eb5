# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A vision encoder alone, refined by the feedback on unlabelled images (DIVA, GenHancer, DCR: see docs/feedback.md).

    python recipes/refine_encoder.py --encoder openai/clip-vit-large-patch14 \\
        --diffusion stabilityai/stable-diffusion-2-1-base --data 'photos/*.tar' --output_dir runs/clip
    python recipes/refine_encoder.py --encoder CKPT --data photos/ --max_steps 100        # a denoiser from scratch
    python recipes/refine_encoder.py --encoder CKPT --data photos/ \\
        --feedback '{"objective": "contrastive", "tokens": "global"}' --keep 1

First the connector (and a denoiser from scratch) learns with the encoder frozen, `--connector_steps`; then the encoder
trains for `--max_steps` with the rest frozen, unless `--train_all`. Data are tars, folders of images, or parquet files. What
is saved loads by `AutoModel`: a CLIP or SigLIP with its text tower, any other encoder itself. Of the former two the drift is
measured: whether `--class_names`, or the labels of the data, are still given to the same images. `report.json` has it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import TrlParser

from modeling_deem import DeemFeedback
from recipes.add_feedback import compose_feedback, mapping
from recipes.training.defaults import default_data, default_parts
from recipes.training.refining import Collator, Images, Refining, drift, load_towers, zero_shot


@dataclass
class ScriptArguments:
    """The encoder, what redraws its images, and the images."""

    encoder: str | None = field(
        default=None, metadata={"help": "Encoder with image processor; by default the small one."}
    )
    diffusion: str | None = field(
        default=None, metadata={"help": "Diffusers pipeline; by default a denoiser from scratch."}
    )
    data: list[str] = field(default_factory=list, metadata={"help": "Tars, folders of images or parquet files."})
    feedback: dict | str | None = field(default=None, metadata={"help": "Fields of DeemFeedbackConfig (JSON)."})
    connector_steps: int = field(default=100, metadata={"help": "Steps before the encoder trains."})
    connector_learning_rate: float = field(default=1e-4, metadata={"help": "In these steps (DCR: 1e-4)."})
    train_all: bool = field(default=False, metadata={"help": "Go on training the connector with the encoder."})
    keep: float = field(
        default=0.0, metadata={"help": "Weight of the distance of pooled features to those at the start."}
    )
    class_names: str | None = field(
        default=None, metadata={"help": "Text file of class names, one a line, for the drift."}
    )
    drift_images: int = field(
        default=200, metadata={"help": "Images that the drift is measured on, the last of the data."}
    )

    def __post_init__(self) -> None:
        self.feedback = mapping("feedback", self.feedback) or {}


DEFAULTS = {"max_steps": "100", "learning_rate": "1e-5", "per_device_train_batch_size": "16", "logging_steps": "10"}
DEFAULTS |= {"output_dir": "runs/refine_encoder", "report_to": "none", "lr_scheduler_type": "constant"}


class RefiningTrainer(Trainer):
    """Logs the losses of `Refining` by name."""

    loss_is_scaled_for_ga = False  # means over a micro-batch

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = model(**inputs)
        sums = self.__dict__.setdefault("_sums", {})
        for name, loss in losses.items():
            sums.setdefault(name, []).append(float(loss.detach()))
        return losses["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            named = {name: sum(values) / len(values) for name, values in self.__dict__.pop("_sums", {}).items()}
            logs |= {name: value for name, value in named.items() if name != "loss"}
        super().log(logs, *args, **kwargs)


def parse(args: list[str]) -> tuple[ScriptArguments, TrainingArguments]:
    given = {arg.split("=")[0] for arg in args}
    filled = [piece for name, value in DEFAULTS.items() if f"--{name}" not in given for piece in (f"--{name}", value)]
    arguments, training_args = TrlParser(
        (ScriptArguments, TrainingArguments), allow_abbrev=False
    ).parse_args_and_config([*filled, *args])
    training_args.remove_unused_columns, training_args.save_strategy = False, "no"
    return arguments, training_args


def run_stage(
    refining: Refining, args: TrainingArguments, collator: Callable, images: Images
) -> list[dict[str, float]]:
    """Train what has gradients; return the log."""
    if args.max_steps < 1:
        return []
    trainer = RefiningTrainer(refining, args, collator, train_dataset=images)
    trainer.train()
    return trainer.state.log_history


def refine(
    refining: Refining, arguments: ScriptArguments, args: TrainingArguments, collator: Callable, images: Images
) -> dict[str, list[dict[str, float]]]:
    """The connector first, with the encoder frozen; then the encoder."""
    encoder, feedback, log = refining.encoder, refining.feedback, {}
    learns = [parameter for parameter in feedback.parameters() if parameter.requires_grad]
    encoder.requires_grad_(False)
    first = replace(args, max_steps=arguments.connector_steps, learning_rate=arguments.connector_learning_rate)
    log["connector"] = run_stage(refining, first, collator, images)
    encoder.requires_grad_(True)
    for parameter in learns:
        parameter.requires_grad_(arguments.train_all)
    log["encoder"] = run_stage(refining, args, collator, images)
    return log


def main(args: list[str] | None = None) -> dict[str, Any]:
    arguments, training_args = parse(sys.argv[1:] if args is None else args)
    set_seed(training_args.seed)
    folder = arguments.encoder or default_parts()[0]
    whole, vision = load_towers(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    images = Images(arguments.data or default_data("captions"))
    fields = {"source": "encoder", **arguments.feedback}
    feedback: DeemFeedback = compose_feedback(vision, arguments.diffusion, fields)
    collator = Collator(processor, feedback, views=feedback.config.objective == "contrastive")

    held_out = Images(arguments.data or default_data("captions"))
    first = max(0, len(images) - arguments.drift_images)
    held_out.table = held_out.table.select(range(first, len(images)))
    labels = held_out.table["label"]
    names = sorted({label for label in images.table["label"] if label})
    if arguments.class_names:
        names = [line for line in Path(arguments.class_names).read_text(encoding="utf-8").splitlines() if line.strip()]
    measured = whole is not vision and len(names) > 1
    if measured and first >= arguments.drift_images:  # else there are too few to keep some apart
        images.table = images.table.select(range(first))
    before = zero_shot(whole, folder, processor, held_out, names) if measured else None
    report: dict[str, Any] = {
        "log": refine(Refining(vision, feedback, arguments.keep), arguments, training_args, collator, images)
    }
    if measured:
        whole.to("cpu")
        report["drift"] = drift(before, zero_shot(whole, folder, processor, held_out, names), list(labels), names)
        print(" ".join(f"{name} {value:.3f}" for name, value in report["drift"].items()))
    report["skipped"] = dict(images.skipped)

    out = Path(training_args.output_dir)
    whole.save_pretrained(out)
    processor.save_pretrained(out)
    if whole is not vision:
        AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    feedback.save_pretrained(out / "feedback")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
