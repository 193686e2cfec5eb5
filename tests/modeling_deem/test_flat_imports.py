# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The code that travels with a checkpoint lies flat in one folder: what its imports and file names must look like."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("modeling_deem", "processing")
TRAVELING = sorted(path for package in PACKAGES for path in (ROOT / package).glob("*.py") if path.stem != "__init__")
# transformers looks for neighbors with these patterns, in the plain text of the file: docstrings and comments count.
RELATIVE_IMPORT_TEXT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)


def import_faults(source: str, neighbors: set[str]) -> list[str]:
    """What in a traveling file would break once the file lies alone with its neighbors on the Hub.

    Args:
        source: text of the file.
        neighbors: stems of the other files in its package.

    Returns:
        One line per fault, empty if there is none.
    """
    faults, relative = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = node.module or ""
            relative.append(module)
            if node.level > 1 or not module or "." in module:
                faults.append(f"line {node.lineno}: only `from .name import x` is found by the loader")
            elif module not in neighbors:
                faults.append(f"line {node.lineno}: .{module} is no neighbor")
        else:
            absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            absolute += [node.module] if isinstance(node, ast.ImportFrom) else []
            faults += [f"line {node.lineno}: {name}" for name in absolute if name.split(".")[0] in PACKAGES]
    texts = Counter(match[0] or match[1] for match in RELATIVE_IMPORT_TEXT.findall(source))
    faults += [f"reads like an import but is none: .{name}" for name in texts - Counter(relative)]
    return faults


@pytest.mark.parametrize("path", TRAVELING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_are_flat(path: Path) -> None:
    neighbors = {other.stem for other in path.parent.glob("*.py")} - {path.stem, "__init__"}
    assert import_faults(path.read_text(encoding="utf-8"), neighbors) == []


def test_file_names_are_unique_across_packages() -> None:
    counts = Counter(path.name for path in TRAVELING)
    assert counts and max(counts.values()) == 1, counts


@pytest.mark.parametrize(
    "source",
    [
        "from . import losses_deem",
        "from .. import losses_deem",
        "from .sub.losses_deem import loss",
        "from .stranger import loss",
        "import processing",
        "from modeling_deem.losses_deem import loss",
        '"""Use it so:\n\n    from .losses_deem import loss\n"""',
    ],
)
def test_guard_finds_what_breaks(source: str) -> None:
    assert import_faults(source, {"losses_deem"})


def test_guard_accepts_a_neighbor() -> None:
    assert import_faults("import torch\nfrom .losses_deem import loss\n", {"losses_deem"}) == []
