# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Seven training steps on the tiny model, as one process or as one of several; started by test_scaling.py.

python -m torch.distributed.run --nproc-per-node 2 tests/recipes/training/scaling_run.py FOLDER
accelerate launch --config_file recipes/configs/accelerate/zero3.yaml --num_processes 2 --mixed_precision no \\
    tests/recipes/training/scaling_run.py FOLDER zero3
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from deem_fixtures import IMAGE, Q, tiny_batch, tiny_draws, tiny_model
from torch.utils.data import IterableDataset
from transformers import AutoModel, TrainerCallback, set_seed

from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer

FROZEN = ["model.language_model", "image_decoder.denoiser", "image_decoder.vae"]
# Pairs of micro-batches: what one step holds. Unequal in text, in images and in images that can be drawn.
STEPS = [
    (["bttttttite", "bttie"], ["btite"]),
    (["bttte", "bte"], ["bttitttite"]),  # the first has no image
    (["bttitie"], ["bttttttttttte"]),  # the second has none
    (["bttte"], ["btttttttte", "btte"]),  # neither has
    (["bitte"], ["bttttie", "bttitttie", "btte"]),  # the first has an image that cannot be drawn
]
MODES = [{}, {}, {}, {}, {"image_loss_weight": 0.0}]
NUM_STEPS = len(STEPS)
MIXED = 2  # further steps whose two micro-batches differ in what is learned: no single batch can be like them


def zero_steps() -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Steps in which every part has a gradient. ZeRO gives parts without one a gradient of zero, and AdamW then moves them
    on by its momentum, while all else leaves them as they are."""
    whole = [step for step in range(2 * NUM_STEPS) if step % len(STEPS) < 3]
    return [micro_batches(step, MIXED * NUM_STEPS) for step in whole[:NUM_STEPS]]


class NotAfterTheLastStep(TrainerCallback):
    """Saves where a run goes on later: a Trainer also saves after the last step, which nobody reads here."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save and state.global_step < state.max_steps


class Batches(IterableDataset):
    """Ready-made micro-batches; the collator takes the only one of each."""

    def __init__(self, batches: list[dict[str, Any]]):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def micro_batches(step: int, first_mixed: int = NUM_STEPS) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A step as one batch, and as its two micro-batches, with the same images and the same noise."""
    first, second = STEPS[step % len(STEPS)]
    whole = tiny_batch(*first, *second, seed=step)
    images = [word.count("i") for word in first + second]
    if sum(images):
        whole["consistency_draws"] = tiny_draws(sum(images), seed=step)
        whole["image_draws"] = tiny_draws(sum(images), seed=step + 100, image=True)
    whole |= MODES[step % len(STEPS)]
    halves = []
    for rows in (slice(0, len(first)), slice(len(first), len(first) + len(second))):
        length = int(whole["attention_mask"][rows].sum(1).max())
        before, count = sum(images[: rows.start]), sum(images[rows])
        half = {key: whole[key][rows, :length] for key in ("input_ids", "attention_mask", "labels")}
        assert int((half["input_ids"] == IMAGE).sum()) == count * Q
        for key in ("pixel_values", "target_pixel_values") if count else ():
            half[key] = whole[key][before : before + count]
        for key in ("consistency_draws", "image_draws") if count else ():
            half[key] = {name: value[before : before + count] for name, value in whole[key].items()}
        halves.append(half | MODES[step % len(STEPS)])
    if step >= first_mixed:
        halves[0]["image_loss_weight"], halves[1]["text_loss_weight"] = 0.0, 0.0
    return whole, halves


def train(
    output_dir: Path, batches: list[dict[str, Any]], checkpoint: Path | None = None, **options: Any
) -> RecipeTrainer:
    """All steps over ready-made micro-batches, from a checkpoint or from the tiny model."""
    set_seed(0)
    args = DeemTrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        freeze=FROZEN,
        **{"max_steps": NUM_STEPS + MIXED, "save_strategy": "no", **options},
    )
    if args.fsdp:  # accelerate offers it on accelerators only, but the same code runs on CPU processes
        PartialState().distributed_type = DistributedType.MULTI_GPU
    model = tiny_model(lm_head_bias=True) if checkpoint is None else AutoModel.from_pretrained(checkpoint)
    trainer = RecipeTrainer(
        model=model,
        args=args,
        train_dataset=Batches(batches),
        data_collator=lambda rows: rows[0],
        callbacks=[NotAfterTheLastStep()],
    )
    trainer.train()
    return trainer


def history(trainer: RecipeTrainer) -> list[dict[str, float]]:
    """The losses of every step, by name."""
    return [
        {key: log[key] for key in log if key.endswith("loss")} for log in trainer.state.log_history if "loss" in log
    ]


def main(folder: Path) -> None:
    """DDP, then FSDP2 in the same two processes; writes the losses of each and the trained weights."""
    torch.set_num_threads(1)
    halves = [half for step in range(NUM_STEPS + MIXED) for half in micro_batches(step)[1]]
    curves = {}
    for name in ("ddp", "fsdp2"):
        options: dict[str, Any] = {}
        if name == "fsdp2":
            options |= {"save_strategy": "steps", "save_steps": 4}
            options |= {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}}
        trainer = train(folder / name, halves, **options)
        curves[name] = history(trainer)
        assert trainer.accelerator.distributed_type.value == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[name]
        trainer.save_model()
    assert [path.name for path in (folder / "fsdp2").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = train(folder / "fsdp2", halves, **options)
    curves["fsdp2 resumed"] = history(resumed)
    draws = gather_object([torch.rand(4).tolist()])  # what the next noise would be
    if int(os.environ["RANK"]) == 0:
        (folder / "curves.json").write_text(json.dumps(curves))
        (folder / "draws.json").write_text(json.dumps(draws))
    torch.distributed.destroy_process_group()


def main_zero(folder: Path, name: str) -> None:
    """One of DeepSpeed's stages, on the steps of `zero_steps`; writes its losses and the trained weights."""
    torch.set_num_threads(1)
    halves = [half for _, halves in zero_steps() for half in halves]
    trainer = train(folder / name, halves, folder / "initial", max_steps=NUM_STEPS)
    assert f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}" == name
    trainer.save_model()
    if int(os.environ["RANK"]) == 0:
        (folder / f"{name}.json").write_text(json.dumps(history(trainer)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else main_zero(Path(sys.argv[1]), sys.argv[2])
