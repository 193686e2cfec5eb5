# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What tests of data share: reading a source as training does, and what its samples say."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from recipes.data.faults import DataReport
from recipes.data.sources import make_reader
from recipes.data.stream.shuffle import ReaderPass

FAULTS = Path(__file__).resolve().parents[3] / "../shared/faults"


def fault(name: str) -> Path:
    """One of the given faulty inputs; skips the test where they are absent."""
    if not FAULTS.is_dir():
        pytest.skip("the faulty inputs ../shared/faults are not here")
    return FAULTS / name


def read_source(data: Path, processor: Any, caption_form: str = "plain", epoch: int = 0) -> tuple[list[dict], dict]:
    """All samples of a source, with the special tokens of a real processor, and how often each reason was given."""
    _, reader = make_reader(str(data), processor, caption_form)
    report = DataReport()
    samples = [sample for _, sample in ReaderPass(reader, report, seed=0, epoch=epoch)]
    skipped = report.to_dict().get(reader.name, {"skipped": {}})["skipped"]
    return samples, {reason: fault["count"] for reason, fault in skipped.items()}


def texts(sample: dict) -> list[str]:
    """What is said, turn by turn, with <image> for images."""
    return [
        "".join("<image>" if item["type"] == "image" else item["text"] for item in message["content"])
        for message in sample["messages"]
    ]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of members in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
