# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Pieces of HTML: sections, cards, tables, and images that need no other file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


def inline(path: Path, alternative: str) -> str:
    """Return an `<img>` that carries its PNG in itself."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def section(title: str, note: str, *blocks: str) -> str:
    """Return a headed section, or nothing if none of its blocks has content."""
    if not any(blocks):
        return ""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{"".join(blocks)}</section>'


def cards(kind: str, contents: Iterable[str], card: str = "") -> str:
    """Return a grid of cards, or nothing if there is none."""
    made = "".join(f'<div class="card {card}">{content}</div>' for content in contents)
    return f'<div class="grid {kind}">{made}</div>' if made else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], last_is_total: bool = False) -> str:
    """Return a table that scrolls sideways on narrow screens, or nothing if there are no rows; cells are HTML."""
    rows = list(rows)
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if rows else []
    for number, row in enumerate(rows, 1):
        kind = ' class="total"' if last_is_total and number == len(rows) else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f'<div class="card scroll"><table>{"".join(lines)}</table></div>' if rows else ""
