# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Reading annotation files into samples: a row of another layout becomes a sample with a fault, never a hole."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, printable
from recipes.evaluation.benchmark import Sample

UNUSABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


def read_json(file: Path) -> Any:
    """Return a JSON file's content. Raises ValueError, naming the file, if it is broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file ({error}). Get it again from where it came.") from error


def json_lines(file: Path) -> Iterator[Any]:
    """Yield the rows of a file of JSON lines; a broken one as a ValueError, for `make_samples`."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            yield error


def make_samples(
    rows: Iterable[Any], make: Callable[[int, Any], Sample], name: str, group: str = "", **about: Any
) -> list[Sample]:
    """Return a sample per row; a row that `make` cannot read becomes one with a fault.

    Args:
        make: takes the row's number from 1 and the row.
        name: of the ids of faulty rows, before their number.
        about: of faulty rows, what the benchmark's figures need of any line.
    """
    samples = []
    for number, row in enumerate(rows, start=1):
        try:
            if isinstance(row, Exception):
                raise row
            samples.append(make(number, row))
        except (*UNUSABLE, BadSample) as error:
            cause = printable(f"row {number}: {type(error).__name__}: {error}")[:300]
            identity = f"{name}/{number}" if name else str(number)
            samples.append(Sample(identity, cluster=f"row {identity}", group=group, fault=cause, about=about))
    return samples


def text_of(value: Any) -> str:
    """Return a text without outer white space. Raises TypeError if it is none, ValueError if it is empty."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError("empty text")
    return value.strip()
