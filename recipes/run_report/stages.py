# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the training stages of a run left in its folders."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class StageLog:
    """What a training stage left behind: its name, log entries, parameters per part and samples per source."""

    name: str
    history: list[dict[str, float]]
    parts: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]]

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Return steps and finite values of one logged quantity."""
        points = [(entry["step"], entry[key]) for entry in self.history if math.isfinite(entry.get(key, math.nan))]
        return [step for step, _ in points], [value for _, value in points]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or an empty dict where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def trainer_state(folder: Path) -> Path | None:
    """Return the newest trainer_state.json of a training run's folder: its own, or that of the last checkpoint."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    states = [path / "trainer_state.json" for path in (folder, *reversed(checkpoints))]
    return next((path for path in states if path.is_file()), None)


def find_stages(run: Path) -> list[StageLog]:
    """Return the training stages of a run in the order in which they ended: the folder itself, or the folders in it."""
    folders = [run] if trainer_state(run) else [path for path in run.iterdir() if path.is_dir()]
    states = {folder: state for folder in folders if (state := trainer_state(folder))}
    return [
        StageLog(
            folder.name,
            read_json(states[folder])["log_history"],
            read_json(folder / "parts.json"),
            read_json(folder / "data_report.json"),
        )
        for folder in sorted(states, key=lambda folder: states[folder].stat().st_mtime)
    ]
