# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The file between generating and scoring: `predictions.jsonl`, one line per sample, and the manifest beside it.

    <out>/<benchmark>/predictions.jsonl      id, prompt, raw, token_ids, parsed, score, seed, images with their SHA-256, ...
    <out>/<benchmark>/manifest.json          what was asked, of which weights, over which data

Several processes write a file each, which are joined at the end, or when the run goes on.
"""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from recipes.evaluation.benchmark import Line
from recipes.whole_files import alone, whole_file, worded, write_whole

PREDICTIONS, MANIFEST = "predictions.jsonl", "manifest.json"
SHARDS = "predictions-*-of-*.jsonl"
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
CONFIG = ("config.json", "generation_config.json", "adapter_config.json")


# ---- lines ----


def read_lines(file: Path) -> list[Line]:
    """Return the lines of a file; a last one that was torn by a kill is left out.

    Raises:
        ValueError: a broken line that is not the last.
    """
    lines: list[Line] = []
    if not file.is_file():
        return lines
    rows = file.read_bytes().split(b"\n")
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            lines.append(json.loads(row))
        except ValueError as error:
            if number < len(rows):
                raise ValueError(
                    f"Line {number} of {file} is broken. Remove it, and its sample is asked again."
                ) from error
    return lines


def write_lines(file: Path, lines: Iterable[Line]) -> None:
    """Replace a file by these lines, at once."""
    with whole_file(file) as new, open(new, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())


class PredictionFile:
    """The predictions of one benchmark, as one process writes them.

    Args:
        rank, world: number of this process, and of how many.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        self.folder = folder
        self.whole = folder / PREDICTIONS
        self.own = self.whole if world == 1 else folder / f"predictions-{rank:05d}-of-{world:05d}.jsonl"

    def alone(self) -> AbstractContextManager[int]:
        """Keep other runs out of the folder. Raises ValueError if one is in it."""
        return alone(self.folder, f"Another evaluation is writing to {self.folder}. Wait for it, or stop it.")

    def join(self, order: Sequence[str] = ()) -> list[Line]:
        """Join the files of all processes to one, each id once; to be called by one process, while none writes.

        Args:
            order: of the ids; those that it does not name, or all without it, stay in the order found.

        Returns:
            the lines. Those with an error are left out of them while the run goes on (no order given).
        """
        shards = sorted(self.folder.glob(SHARDS))
        found = {line["id"]: line for file in (self.whole, *shards) for line in read_lines(file)}
        if order:
            place = {name: number for number, name in enumerate(order)}
            found = dict(sorted(found.items(), key=lambda item: place.get(item[0], len(place))))
        else:
            found = {name: line for name, line in found.items() if not line.get("error")}
        if found or self.whole.is_file():
            write_lines(self.whole, found.values())
        for shard in shards:
            shard.unlink()
        return list(found.values())

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines; they are on the disk when this returns."""
        with worded(self.own), open(self.own, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())


# ---- manifest ----


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    found = sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            found.update(block)
    return found.hexdigest()


def model_digests(name: str | Path) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of a checkpoint's files, of weights, configuration and processor."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(cached_file(str(name), "config.json")).parent
    if (folder / "model_index.json").is_file():  # a pipeline of diffusers, with a folder for each part
        files = [
            path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors", ".bin", ".txt")
        ]
        return {"pipeline": {str(path.relative_to(folder)): digest(path) for path in files}}
    weights = {path for kind in WEIGHTS for path in folder.glob(kind) if path.name != "training_args.bin"}
    config = {folder / kind for kind in CONFIG if (folder / kind).is_file()}
    kinds = ("*processor*.json", "*token*", "*.jinja", "vocab*", "merges.txt", "chat_template.json")
    processor = {path for kind in kinds for path in folder.glob(kind) if path.is_file()}
    groups = (("weights", weights), ("config", config), ("processor", processor - weights - config))
    return {group: {path.name: digest(path) for path in sorted(files)} for group, files in groups}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what a model writes."""
    return {name: version(name) for name in LIBRARIES}


def device_name(model: PreTrainedModel) -> str:
    """Return the kind of device, the same for all processes of a machine."""
    return model.device.type


def differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Return what differs between two manifests, one line each: the entry, what was saved, what is wanted."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        found = []
        for key in sorted({*saved, *wanted}, key=str):
            found += differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if saved == wanted else [f"{name}: {_short(saved)} before, {_short(wanted)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a benchmark's folder. Raises ValueError if there is none."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} holds no evaluation: expected {MANIFEST}, which recipes/evaluate.py writes.")
    return json.loads(file.read_text(encoding="utf-8"))


def check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest, or compare it with that of the run that is there already.

    Raises:
        ValueError: they differ; names what.
    """
    file = folder / MANIFEST
    wanted = json.loads(json.dumps(wanted))
    if not file.is_file():
        write_whole(file, json.dumps(wanted, indent=1))
        return
    saved = read_manifest(folder)
    if found := [line for line in differences(saved, wanted) if not line.startswith("notes:")]:
        raise ValueError(
            f"{folder} holds an evaluation of something else, so that it cannot go on: {'; '.join(found)}. Give another "
            "--out, or remove that folder."
        )
