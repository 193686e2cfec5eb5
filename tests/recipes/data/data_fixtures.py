# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What tests of data share: reading a source as training does, and what its samples say."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from recipes.data.faults import DataReport
from recipes.data.sources import make_reader
from recipes.data.stream.shuffle import ReaderPass
from recipes.synthetic.scenes import World
from recipes.synthetic.writers import write_formats

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


SPOILT = {  # format of the synthetic world -> its annotation files, and the keys of their texts
    "mmc4": ("mmc4_annts/*.jsonl", ("text_list",)),
    "okvqa": ("okvqa/*.json", ("question", "multiple_choice_answer")),
    "textvqa": ("textvqa/*.json", ("question", "answers")),
    "gqa": ("gqa/*.json", ("question", "answer")),
    "ocrvqa": ("ocrvqa/*.json", ("questions", "answers")),
    "llava": ("llava/*.json", ("value",)),
    "karpathy": ("karpathy/annotations/coco_karpathy_train.json", ("caption",)),
    "narratives": ("narratives/*.jsonl", ("caption",)),
    "paragraphs": ("paragraphs/paragraphs_coco.json", ("caption",)),
    "vg": ("vg/region_descriptions.json", ("phrase",)),
    "coco": ("coco/annotations/*.json", ("name",)),
    "partimagenet": ("partimagenet/*.json", ("name",)),
    "refcoco_masks": ("refcoco_masks/*.json", ("caption",)),
    "vcr": ("vcr/*.jsonl", ("objects",)),
    "osprey": ("osprey/osprey_detail_description.json", ("description",)),
}


def spoil_format(folder: Path, name: str, value: Any) -> Path:
    """Write three images of a format with this value in place of every text; returns the data."""
    write_formats(folder, World(size=48), 3, formats=[name])
    pattern, keys = SPOILT[name]
    files = sorted(folder.glob(pattern))
    for file in files:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
        file.write_text("".join(json.dumps(_spoil(json.loads(line), keys, value)) + "\n" for line in lines))
    return files[0] if len(files) == 1 else files[0].parent


def _spoil(given: Any, keys: tuple[str, ...], value: Any) -> Any:
    if isinstance(given, list):
        return [_spoil(one, keys, value) for one in given]
    if not isinstance(given, dict):
        return given
    return {
        key: _spoil(one, keys, value)
        if key not in keys or not _is_text(one)
        else [value] * len(one)
        if isinstance(one, list)
        else value
        for key, one in given.items()
    }


def _is_text(given: Any) -> bool:
    several = isinstance(given, list) and given and all(isinstance(one, str) for one in given)
    return isinstance(given, str) or bool(several)
