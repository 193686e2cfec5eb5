# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files of rows -> entries that can be found again: JSON lines (also zipped) and whole JSON files."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from recipes.data.reading import BadSample, Entry


def read_lines(file: Path, number: int = 0, offset: int = 0) -> Iterator[Entry]:
    """The lines of a `*.jsonl` or `*.jsonl.zip` as bytes, blank ones left out.

    Lines are parsed afterwards, one by one: `datasets`' JSON reader ends the whole stream at the first broken one.

    Args:
        file: a zip may hold several files, which follow each other by name.
        number: of the line to begin with, from 0.
        offset: where it begins, in bytes of the (unzipped) text.

    Yields:
        entries keyed `<file name>:<line number from 1>`.

    Raises:
        BadSample: "unreadable annotation file".
    """
    try:
        if file.suffix != ".zip":
            with open(file, "rb") as lines:
                yield from _numbered(lines, file.name, number, offset, 0)
            return
        with zipfile.ZipFile(file) as archive:
            begin = 0
            for member in sorted(archive.infolist(), key=lambda info: info.filename):
                if begin + member.file_size > offset:
                    with archive.open(member) as lines:
                        for entry in _numbered(lines, file.name, number, max(offset - begin, 0), begin):
                            number = entry.number + 1
                            yield entry
                begin += member.file_size
    except (OSError, EOFError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise BadSample("unreadable annotation file", file.name) from error


def _numbered(lines: BinaryIO, name: str, number: int, offset: int, begin: int) -> Iterator[Entry]:
    lines.seek(offset)
    for count, line in enumerate(lines, start=number):
        if line.strip():
            yield Entry(count, begin + offset, f"{name}:{count + 1}", line)
        offset += len(line)
