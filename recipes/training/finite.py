# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""NaN and inf in losses and gradients: named, and kept out of the weights."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from modeling_deem.training_deem import LOSSES, DeemTrainer
from recipes.whole_files import write_whole

REPORT = "not_finite.json"


class FiniteTrainer(Trainer):
    """A Trainer that makes no step of a loss or gradient with NaN or inf.

    `args.on_nan` says whether such a step stops the run or is skipped: weights and optimizer stay as they are, the
    schedule goes on. Skipped steps are listed in `not_finite.json` in the output folder.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.on_nan == "skip" and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("on_nan skip cannot be used with DeepSpeed, which makes its step itself: give stop.")
        self._seen: list[str] = []  # ids of the samples of this step that were computed
        self._faults: dict[str, list[str]] = {}  # loss -> ids of the micro-batches in which it was not finite

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """As the base class; a step begins."""
        self._seen, self._faults = [], {}
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As the base class; in training look at each loss, and keep what is not finite out of the logs."""
        sums = dict(getattr(self, "_sums", {}))
        # trl would compute its outputs by another pass
        with_outputs = return_outputs or isinstance(self, DeemTrainer)
        result = super().compute_loss(model, inputs, return_outputs=with_outputs, **kwargs)
        loss, outputs = result if with_outputs else (result, None)
        if model.training:
            ids = self.sample_ids.pop(0) if getattr(self, "sample_ids", None) else []
            self._seen += ids
            losses = {name: getattr(outputs, name, None) for name in LOSSES}
            losses = {name: one for name, one in losses.items() if one is not None} or {"text_loss": loss}
            if faults := [name for name, one in losses.items() if not torch.isfinite(one)]:
                for name in faults:
                    self._faults.setdefault(name, []).extend(ids)
                self._sums = sums
                if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                    self._refuse(self._faults)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        faults = dict(self._faults)
        # with fp16 the scaler itself looks for inf, which it provokes, and makes no step of it
        if not faults and self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            faults = {"gradient": list(self._seen)}
        if self.accelerator.num_processes > 1:  # all or none skip
            flag = torch.tensor([float(bool(faults))], device=self.args.device)
            if self.accelerator.reduce(flag).item():
                every, faults = gather_object([faults]), {}
                for one in every:
                    for name, ids in one.items():
                        faults[name] = faults.get(name, []) + ids
        if not faults:
            return norm
        if self.args.on_nan == "stop":
            self._refuse(faults)
        if self.accelerator.scaler is None:  # which makes no step itself
            model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
        if self.is_world_process_zero():
            print(f"Step {self.state.global_step + 1} is skipped: {_described(faults)}.")
            self._report({**self._reported(), str(self.state.global_step + 1): faults})
        return None

    def _refuse(self, faults: dict[str, list[str]]) -> None:
        raise ValueError(
            f"{_described(faults)}, in step {self.state.global_step + 1}. No step was made of it, the weights are those of "
            "the step before. Look at the samples, lower --learning_rate, or pass over such steps by --on_nan skip."
        )

    def _reported(self) -> dict[str, dict[str, list[str]]]:
        file = Path(self.args.output_dir, REPORT)
        return json.loads(file.read_text())["skipped_steps"] if file.is_file() else {}

    def _report(self, steps: dict[str, dict[str, list[str]]]) -> None:
        report = {"count": len(steps), "skipped_steps": steps}
        write_whole(Path(self.args.output_dir, REPORT), json.dumps(report, indent=2) + "\n")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As the base class; the report keeps what lies before the checkpoint."""
        if self.is_world_process_zero() and (steps := self._reported()):
            last = int(Path(resume_from_checkpoint).name.rpartition("-")[2]) if resume_from_checkpoint else 0
            self._report({step: faults for step, faults in steps.items() if int(step) <= last})
        return super().train(resume_from_checkpoint, **kwargs)


def _described(faults: dict[str, list[str]]) -> str:
    """Return what was not finite, and for which samples."""
    return "; ".join(
        f"NaN or inf in {'the gradient, all losses finite' if name not in LOSSES else name} of "
        f"{', '.join(dict.fromkeys(ids)) or 'samples without ids'}"
        for name, ids in faults.items()
    )
