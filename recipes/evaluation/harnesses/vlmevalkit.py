# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Benchmarks of ours as tables of VLMEvalKit: `<name>.tsv` in its folder LMUData.

A name that VLMEvalKit does not know is a set of choices where the table has the columns A and B, else one of free answers.
Columns: `index`, `image` (base64, or the index of an earlier row with the same image), `question`, `answer`, `category`,
and `A`, `B` of choices. VLMEvalKit drops rows without an image; none is written without one.
"""

import base64
import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample
from recipes.evaluation.harnesses.tables import Row
from recipes.whole_files import write_whole

COLUMNS = ("index", "image", "question", "answer", "category")
OPTIONS = ("A", "B")
CHOICE_QUESTION = "What is the main object in this image?"  # of RobustVQA, whose two names are the options


def write_tables(name: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the tables of a benchmark: `<name>.tsv`, and `<name>_choice.tsv` where some of its questions are choices.

    Returns:
        The files.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError(f"No row of {name} to write.")
    choices = [(row, found) for row in rows if (found := _choice(row)) is not None]
    chosen = {id(row) for row, _ in choices}
    free = [row for row in rows if id(row) not in chosen]
    files = []
    if free:
        files.append(_write(folder / f"{name}.tsv", [(row, _free(row)) for row in free]))
    if choices:
        files.append(_write(folder / (f"{name}_choice.tsv" if free else f"{name}.tsv"), choices))
    return files


def _write(file: Path, rows: Sequence[tuple[Row, dict[str, str]]]) -> Path:
    text = io.StringIO()
    columns = [*COLUMNS, *(one for one in OPTIONS if one in rows[0][1])]
    table = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n")
    table.writeheader()
    first: dict[tuple[str, ...], int] = {}  # of an image, the row that holds it
    for index, (row, asked) in enumerate(rows):
        held = first.setdefault(row.names, index)
        image = _images(row) if held == index else str(held)
        table.writerow({"index": index, "image": image, "category": row.columns["group"], **asked})
    write_whole(file, text.getvalue())
    return file


def _images(row: Row) -> str:
    """Return the images in base64, a list of them where there are several."""
    if not row.images:
        raise BadSample("a sample without an image", row.columns["id"])
    read = [base64.b64encode(image).decode() for image in row.images]
    return read[0] if len(read) == 1 else json.dumps(read)


def _free(row: Row) -> dict[str, str]:
    truth = json.loads(row.columns["truth"])
    return {"question": row.columns["question"], "answer": truth if isinstance(truth, str) else json.dumps(truth)}


def _choice(row: Row) -> dict[str, str] | None:
    """Return question, options and the right letter of a choice between two; None for another question."""
    about: dict[str, Any] = json.loads(row.columns["about"])
    truth = json.loads(row.columns["truth"])
    if str(about.get("kind", "")).endswith("first"):  # RobustVQA
        names = [name.replace("_", " ") for name in about["names"]]
        letter = OPTIONS[about["names"].index(truth)]
        return {"question": CHOICE_QUESTION, "answer": letter} | dict(zip(OPTIONS, names, strict=True))
    if truth in OPTIONS and isinstance(about.get("options"), str):  # MMVP: "(a) Open (b) Closed"
        _, first, second = re.split(r"\s*\([ab]\)\s*", about["options"], maxsplit=2)
        question = row.columns["question"].split("\n")[0]
        return {"question": question, "answer": truth, "A": first.strip(), "B": second.strip()}
    return None
