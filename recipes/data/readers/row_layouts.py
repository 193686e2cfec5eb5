# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Which columns a row has, and what it becomes by them.

| columns | as in | becomes |
|---|---|---|
| `images`, `texts` (lists of equal length, each place one or the other) | OBELICS | a document |
| `images`, `texts` (dicts of user and assistant) | The Cauldron | a dialogue |
| `messages` (role, content) or `conversations` (from, value), with `images` or `image` | TRL, LLaVA | a dialogue |
| `question`, an image column, an answer column | lmms-lab's VQA sets | a dialogue |
| an image column, a caption column | imagefolder, tables of captions | a caption |
"""

from collections.abc import Mapping
from typing import Any

# The first that a row has.
IMAGE_COLUMNS = ("image", "file_name", "image_path", "image_file", "filename", "filepath", "path", "jpg", "png")
CAPTION_COLUMNS = ("caption", "text", "captions", "description", "label")
CHAT_COLUMNS = ("messages", "conversations")
ANSWER_COLUMNS = ("multiple_choice_answer", "answer", "answers", "direct_answers")
EXPECTED = (
    f"messages or conversations with images or image; images and texts; question with an image and an answer; or an image "
    f"({', '.join(IMAGE_COLUMNS)}) and a caption ({', '.join(CAPTION_COLUMNS)})"
)


def layout_of(row: Mapping[str, Any]) -> str | None:
    """Return "chat", "document", "rounds", "question" or "caption"; "texts" if it has texts, but none that tells which of the
    two it is; None for unknown columns."""
    if any(name in row for name in CHAT_COLUMNS):
        return "chat"
    if "texts" in row and "images" in row:
        texts = row["texts"] if isinstance(row["texts"], list) else ()
        said = [one for one in texts if one is not None]
        return "texts" if not said else "rounds" if isinstance(said[0], dict) else "document"
    if first_of(row, IMAGE_COLUMNS) is None:
        return None
    if "question" in row:
        return "question"
    # a question's number: answers to rate, not captions (POPE has them in `text` and `label`)
    return "caption" if first_of(row, CAPTION_COLUMNS) is not None and "question_id" not in row else None


def kind_of(layout: str) -> str:
    """Return the kind of a reader (see `Reader`) of rows of a layout."""
    return {"document": "document", "texts": "document", "caption": "caption"}.get(layout, "dialogue")


def first_of(row: Mapping[str, Any], columns: tuple[str, ...]) -> str | None:
    """Return the first of the columns that a row has, by preference one with a value."""
    given = [name for name in columns if name in row]
    return next((name for name in given if row[name] is not None), given[0] if given else None)
