# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""transformers' Trainer that goes on in a `MixedDataset` exactly where a checkpoint left it, without replaying data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from recipes.data.stream.dataset import POSITION, MixedDataset, PositionCollator

POSITION_FILE = "data_position_{rank}.pt"
SAMPLE_IDS = "sample_ids"  # key of a batch under which the ids of its samples travel


class NamingCollator:
    """A collator that leaves the ids of the samples in the batch, under `SAMPLE_IDS`."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collator(samples), SAMPLE_IDS: [str(sample["id"]) for sample in samples]}


class _EndlessEpoch(TrainerCallback):
    """Count the epoch by steps: where batches are not replayed, Trainer counts it from where a run was resumed."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        state.epoch = state.global_step / state.max_steps


class StreamTrainer(Trainer):
    """A Trainer that knows `MixedDataset`; with other datasets it is transformers' own.

    Each process reads its own share of the data, and so does each data worker. A checkpoint receives the position of
    every process in `data_position_<rank>.pt`.

    Attributes:
        sample_ids: ids of the samples of each micro-batch of the current step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_from: str | None = None
        self.sample_ids: list[list[str]] = []
        if self._stream is not None:
            self._stream.set_process(self.args.process_index, self.args.world_size)
            self.add_callback(_EndlessEpoch)

    @property
    def _stream(self) -> MixedDataset | None:
        return self.train_dataset if isinstance(self.train_dataset, MixedDataset) else None

    def get_train_dataloader(self) -> DataLoader:
        """As the base class; for a `MixedDataset`, which reads the share of this process only, without accelerate, which
        would split it again and read a batch ahead of the position."""
        if self._stream is None:
            return super().get_train_dataloader()
        return DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=PositionCollator(NamingCollator(self.data_collator)),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the micro-batches of one optimizer step; note how far the data has been consumed."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            if (position := batch.pop(POSITION, None)) is not None:
                self._stream.note(position)
        self.sample_ids = [batch.pop(SAMPLE_IDS, []) for batch in batches]
        if self._resumed_from is not None:  # starting the DataLoader has drawn a random number
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        return batches, num_items

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As the base class; the data goes on from the checkpoint's position.

        Raises:
            ValueError: the checkpoint holds no data position.
        """
        if resume_from_checkpoint and self._stream is not None:
            file = Path(resume_from_checkpoint, POSITION_FILE.format(rank=self.args.process_index))
            if not file.is_file():
                raise ValueError(
                    f"{file.parent} holds no data position {file.name}: it was written with fewer processes or by an "
                    "older version. Start anew in another output_dir, or with --resume_from_checkpoint false."
                )
            self._stream.load_state_dict(torch.load(file, weights_only=True))
            self.args.ignore_data_skip = True
            self._resumed_from = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._stream is not None:
            folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            state = self._stream.state_dict(self.args.dataloader_num_workers)
            torch.save(state, folder / POSITION_FILE.format(rank=self.args.process_index))

    def gather_data_report(self) -> None:
        """Collect on the first process what all have read and skipped. Every process must call this."""
        if self._stream is not None and self.args.world_size > 1:
            own = self._stream.report.state_dict()
            for rank, state in enumerate(gather_object([own])):
                if self.args.process_index == 0 and rank != 0:
                    self._stream.report.add_state(state)
