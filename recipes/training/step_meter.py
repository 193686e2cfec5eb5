# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A Trainer that logs the time of a step and peak memory."""

import statistics
import sys
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback


class StepMeter(TrainerCallback):
    """Seconds per step (waiting for data + forward + backward + update), and peak memory."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        # The sums since the last log are not part of a checkpoint. With a log at each save nothing of them is lost, and a
        # resumed run logs the same numbers as an uninterrupted one. The last step is logged too.
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def read(self) -> dict[str, float]:
        """Return median seconds since the last reading, and peak memory so far in 10^9 bytes (of the GPU, if any)."""
        seconds, self.seconds = statistics.median(self.seconds), []
        return {"step_seconds": round(seconds, 4), "peak_memory_gb": round(peak_memory() / 1e9, 3)}


def peak_memory() -> int:
    """Return the most bytes held so far: allocated GPU memory, else resident memory of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class MeteredTrainer(Trainer):
    """A Trainer whose training logs hold `step_seconds` and `peak_memory_gb`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter = StepMeter()
        self.add_callback(self.meter)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor | int | None]:
        """Start the clock: an optimizer step begins with waiting for its data."""
        self.meter.started = time.perf_counter()
        return super().get_batch_samples(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured to each training log."""
        if self.meter.seconds and "eval_loss" not in logs:
            logs.update(self.meter.read())
        super().log(logs, start_time)
