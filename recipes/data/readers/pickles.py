# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Pickles of plain data, read without running what they ask for, and their conversion to JSON.

python recipes/data/readers/pickles.py 'refcoco/refs(unc).p' ...        # writes refs(unc).json beside each
"""

import argparse
import json
import pickle
from pathlib import Path
from typing import Any, NoReturn


class _PlainUnpickler(pickle.Unpickler):
    """Allows what needs no class: None, bool, int, float, text, list, tuple, dict and set."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which could run any code. Only plain data is read: lists, dicts, text, numbers"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


def load_pickle(file: Path) -> Any:
    """Read a pickle of plain data; text of Python 2 is taken as latin-1.

    Raises:
        ValueError: if it holds anything else, or is broken.
    """
    try:
        with open(file, "rb") as stream:
            return _PlainUnpickler(stream, encoding="latin1").load()
    # a broken pickle raises whatever its bytes lead to
    except (pickle.UnpicklingError, EOFError, MemoryError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"The pickle {file} is not read: {error or type(error).__name__}.") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"The pickle {file} is not read: {error}.") from error


def convert(file: Path) -> Path:
    """Write a pickle's content as JSON beside it; returns the new file."""
    target = file.with_suffix(".json")
    target.write_text(json.dumps(load_pickle(file)), encoding="utf-8")
    return target


def main() -> None:
    """Convert the given files."""
    parser = argparse.ArgumentParser(description="Converts pickles of plain data to JSON, without running them.")
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args().files:
        try:
            print(f"Wrote {convert(file)}")
        except (ValueError, OSError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
