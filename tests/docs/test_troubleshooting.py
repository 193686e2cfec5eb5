# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Every message of docs/troubleshooting.md stands in the source, word for word."""

import ast
from collections.abc import Iterator
from functools import cache

from pages import ROOT, blocks_of

GAP = "…"  # what differs from case to case


def strings_of(tree: ast.AST) -> Iterator[str]:
    """All strings below a node, adjacent ones joined, each value that an f-string puts in as a gap."""
    if isinstance(tree, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in tree.values)
    elif isinstance(tree, ast.Constant):
        if isinstance(tree.value, str):
            yield tree.value
    else:
        for child in ast.iter_child_nodes(tree):
            yield from strings_of(child)


@cache
def raised() -> frozenset[str]:
    """The messages that the package raises."""
    found: set[str] = set()
    for package in ("modeling_deem", "processing", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    found |= set(strings_of(node.exc))
    return frozenset(found)


def test_every_quoted_message_is_raised_somewhere() -> None:
    quoted = [block.text.strip() for block in blocks_of(ROOT / "docs" / "troubleshooting.md")]
    assert len(quoted) == len(set(quoted)) >= 20
    assert [message for message in quoted if message not in raised()] == []


def test_a_message_that_is_not_there_is_noticed() -> None:
    """The comparison is not one that anything passes."""
    (some,) = [message for message in raised() if message.startswith("A batch has one mode")]
    assert some.count(GAP) == 1 and some.replace("one mode", "two modes") not in raised()
