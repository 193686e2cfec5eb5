# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Program for test_resuming.py: trains a tiny model in child processes that kill themselves where they are told to.

    python tests/resuming_driver.py '{"world": DIR, "processor": DIR, "runs": [{"out": DIR, "kill": ["step", 3]}, ...]}'

Prints the exit status of each run. A run appends `{"step", "ids"}` to `ids.jsonl` for each optimizer step it begins.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from deem_fixtures import tiny_model
from transformers import AutoProcessor

from processing import DeemDataCollator
from recipes.data.sources import DataArguments, build_dataset
from recipes.training.trainer import DeemTrainingArguments, RecipeTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class NamingCollator(DeemDataCollator):
    """Leaves the names of the samples in the batch."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().__call__(samples), "ids": [sample["id"] for sample in samples]}


class DyingTrainer(RecipeTrainer):
    """Writes down what it trains on, and is killed in the middle of a step or of a save."""

    def __init__(self, *args: Any, kill: tuple[str, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kill = kill

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        row = {"step": self.state.global_step, "ids": [batch.pop("ids") for batch in batches]}
        with open(Path(self.args.output_dir, "ids.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\n")
        return batches, num_items

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.kill == ("step", self.state.global_step):
            die()
        return super().compute_loss(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:  # the model is on disk, the rest of the checkpoint is not
        if self.kill == ("save", self.state.global_step):
            die()
        super()._save_rng_state(output_dir)


def train(world: Path, processor_folder: str, out: str, kill: tuple[str, int], workers: int) -> None:
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(processor_folder)
    args = DeemTrainingArguments(
        output_dir=out,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=7,
        save_steps=2,
        save_total_limit=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        dataloader_num_workers=workers,
        freeze=["model.language_model", "image_decoder.denoiser", "image_decoder.vae"],
        learning_rate=1e-3,
    )
    sources = [str(world / "mmc4_annts"), str(world / "captions")]
    data = DataArguments(data=sources, shuffle_buffer=8, pack_length=100, max_images=4)
    dataset, report = build_dataset(data, processor, 2, args.seed)
    trainer = DyingTrainer(
        kill=tuple(kill),
        model=tiny_model(),
        args=args,
        train_dataset=dataset,
        data_collator=NamingCollator(processor),
        processing_class=processor,
        data_report=report,
    )
    trainer.train()
    trainer.save_state()


def main() -> None:
    settings = json.loads(sys.argv[1])
    for run in settings["runs"]:
        child = os.fork()  # before anything is trained here, so that a child inherits no threads
        if child == 0:
            train(
                Path(settings["world"]), settings["processor"], run["out"], run.get("kill", ("", -1)), run["workers"]
            )
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
