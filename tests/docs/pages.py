# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""The code of a Markdown page, run from top to bottom, as a reader would type it.

`python` and `bash` blocks run; `console` and `text` blocks are for reading. Commands `python recipes/NAME.py` run in this
process, since starting one per command would cost seconds of imports each; every other command is a process of its own.
"""

import ast
import glob
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Block:
    """A block of code: its page, its first line's number, its language ("" where none is named) and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    fences = [token for token in tokens if token.type == "fence"]
    return [Block(page, token.map[0] + 2, token.info.strip(), token.content) for token in fences]


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as words: continued lines joined, comments left out, variables put in."""
    values: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if len(words) == 1 and words[0].partition("=")[0].isidentifier() and "=" in words[0]:
            name, _, value = words[0].partition("=")
            values[name] = value
        elif words:
            for name, value in values.items():
                words = [word.replace(f"${name}", value) for word in words]
            yield words


def run_command(words: list[str], folder: Path) -> None:
    """Run one command in `folder`, the paths of the clone (`recipes/...`) being taken from the clone."""
    words = [found for word in words for found in (sorted(glob.glob(word, root_dir=folder)) or [word])]
    of_clone = ("recipes/", "tests/", "hub_upload.py")
    words = [str(ROOT / word) if word.startswith(of_clone) and (ROOT / word).exists() else word for word in words]
    if words[0] == "python" and words[1].endswith(".py") and words[1].startswith(str(ROOT)):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", words[1:])
            try:
                runpy.run_path(words[1], run_name="__main__")
            except SystemExit as end:
                assert not end.code, f"{' '.join(words)} ended with {end.code}"
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run a page in a folder; return the names that its Python blocks leave.

    Raises:
        AssertionError: a command failed.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        elif block.language == "bash":
            for words in commands_of(block.text):
                run_command(words, folder)
    return names


def definitions_of(page: Path, name: str) -> dict[str, Any]:
    """The function or class `name` that a Python block of a page defines, and nothing else of the page."""
    names: dict[str, Any] = {}
    for block in blocks_of(page):
        if block.language == "python":
            found = [node for node in ast.parse(block.text).body if getattr(node, "name", None) == name]
            exec(compile(ast.Module(found, []), str(page), "exec"), names)
    return names
