# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Building dialogues: the one form in which all supervised readers give their samples."""

import re
from typing import Any

from recipes.prompts import RELEASED_MARKERS, RELEASED_SYSTEM

EXAMPLE_LENGTH = 120  # characters
IMAGE = object()  # the place of an image in the content of a message
Piece = Any  # str or IMAGE


def content(*pieces: Piece) -> list[dict[str, Any]]:
    """Return the items of a chat message for texts and images; empty texts are left out."""
    return [
        {"type": "image"} if piece is IMAGE else {"type": "text", "text": piece}
        for piece in pieces
        if piece is IMAGE or piece
    ]


def dialogue(*rounds: tuple[list[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """Return the chat messages of rounds of (what the user says, answer)."""
    messages = []
    for user, answer in rounds:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": content(answer)})
    return messages


def around_images(text: str, placeholder: str) -> list[dict[str, Any]]:
    """Return the items of a chat message for text with placeholders."""
    pieces: list[Piece] = []
    for index, piece in enumerate(re.split(re.escape(placeholder), text)):
        pieces += [IMAGE, piece] if index else [piece]
    return content(*pieces)


def released_dialogue(sample: dict[str, Any], image_token: str, eos_token: str) -> dict[str, Any]:
    """Write a dialogue in the form of the released region stage, with its label rule (section 2.8), instead of the chat
    template.

    Turns are `## user: ...` and `## asistant: ...` (so spelt), each with a newline. The labels cover the words
    `## user`, all that the assistant says with its marker and newline, and the eos at the end.

    Returns:
        the sample with `text` and `trained_spans` (character positions) in place of `messages`.
    """
    text, spans = RELEASED_SYSTEM, []
    for message in sample["messages"]:
        marker = RELEASED_MARKERS["user" if message["role"] == "user" else "assistant"]
        said = message["content"]
        if not isinstance(said, str):
            said = "".join(image_token if item["type"] == "image" else item["text"] for item in said)
        begin = len(text)
        text += f"{marker}: {said.strip()}\n"
        spans.append((begin, begin + len(marker) if message["role"] == "user" else len(text)))
    spans.append((len(text), len(text) + len(eos_token)))
    rest = {key: value for key, value in sample.items() if key != "messages"}
    return {**rest, "text": text + eos_token, "trained_spans": spans}


def example_of(sample: dict[str, Any], image_token: str = "<image>") -> dict[str, str]:
    """Return `{"question": text}` of a dialogue or `{"caption": text}` of text with an image; {} where it is no short line.

    A dialogue that draws has a caption: what the user asks to be drawn.
    """
    if "messages" in sample:
        asked = next((message["content"] for message in sample["messages"] if message["role"] == "user"), "")
        if not isinstance(asked, str):
            asked = " ".join(item["text"] for item in asked if item["type"] == "text")
        kind = "caption" if sample.get("mode") == "text_to_image" else "question"
    else:
        asked, kind = sample.get("text") or "", "caption"
    text = " ".join(asked.replace(image_token, " ").split())
    return {kind: text} if text.isprintable() and 0 < len(text) <= EXAMPLE_LENGTH else {}
