# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Files that are written whole or not at all, and words for a disk that takes none."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

LOCK = ".lock"
AGAIN = "Make room or write access, or name another folder, and start the same command again."


@contextmanager
def worded(path: str | Path) -> Iterator[None]:
    """Give an error in writing a file the words that say what to do; it stays an OSError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({type(error).__name__}: {error}). {AGAIN}") from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` at the end: half a file never does.

    Raises:
        OSError: it could not be written, and what to do. What was there before is still there.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with worded(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            unfinished.replace(path)
    except OSError:
        with suppress(OSError):  # what is wrong is said already
            unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file as UTF-8, see `whole_file`."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def alone(folder: str | Path, busy: str) -> Iterator[int]:
    """Hold a folder for this process and those that inherit the descriptor that this gives, until all of them end.

    Raises:
        ValueError: others hold it; `busy` says so.
    """
    with open(Path(folder) / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(busy) from error
        yield lock.fileno()


def check_writable(folder: str | Path) -> None:
    """Make a folder where there is none; raise OSError, before anything is computed, if no file can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"one byte")
    except OSError as error:
        raise OSError(f"Nothing can be written to {folder} ({type(error).__name__}: {error}). {AGAIN}") from error
