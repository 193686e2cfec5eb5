# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Answers kept on the disk batch by batch, for harnesses that keep none before all are there."""

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from recipes.evaluation.predictions import read_lines, write_lines
from recipes.whole_files import worded


def key_of(*parts: Any) -> str:
    """Return the SHA-256 of what decides an answer, in JSON's types."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class KeptAnswers:
    """A file of answers per model and process; those of all processes are read.

    Args:
        folder: of the files.
        model: what is known of the model, as the SHA-256 of its weights: another one has other files.
        process: number of the process that writes.
    """

    def __init__(self, folder: Path, model: Any, process: int = 0) -> None:
        name = key_of(model)[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}.{process}.jsonl"
        if self.file.is_file():
            write_lines(self.file, read_lines(self.file))  # without a last line that a kill has torn
        lines = [line for file in sorted(folder.glob(f"{name}.*.jsonl")) for line in read_lines(file)]
        self.known: dict[str, str] = {line["key"]: line["text"] for line in lines}

    def append(self, keys: Sequence[str], texts: Sequence[str], about: Sequence[Mapping[str, Any]]) -> None:
        """Keep answers; they are on the disk when this returns.

        Args:
            about: what else a reader of the file may want to know, in JSON's types.
        """
        lines = [{"key": key, "text": text, **more} for key, text, more in zip(keys, texts, about, strict=True)]
        with worded(self.file), open(self.file, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
        self.known |= dict(zip(keys, texts, strict=True))
