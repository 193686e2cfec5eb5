# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Chats of rows -> dialogues: turns of text with placeholders or of items, images in the items or beside."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from recipes.data.faults import BadSample
from recipes.data.samples import IMAGE, Piece, around_images, content

# What those who speak are called -> their role.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_ITEMS = ("image", "image_url", "input_image")
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")  # of an item, the first that has a value


def chat_sample(
    key: str,
    row: dict[str, Any],
    image_token: str,
    clean: Callable[[str], str],
    opened: Callable[[Any, str], Image.Image],
) -> dict[str, Any]:
    """Return a row of `messages` or `conversations` as a dialogue.

    Images stand in the items (`{"type": "image", "image": path}`), or beside (`images` or `image`) in the order of their
    places, which are items without an image of their own, or placeholders in content that is one string.

    Args:
        clean: takes special tokens out of a text.
        opened: opens an image of a row, with the name it has if it is unusable.

    Raises:
        BadSample: for what the chat template would not take, an answer that says nothing, or another number of images than
            places.
        KeyError, TypeError, AttributeError: for another layout.
    """
    sources: list[Any] = []  # of the images in their order; None for one that lies beside
    messages = [_message(turn, image_token, clean, sources) for turn in _turns(row)]
    check_turns(messages, key)
    given = next((row[name] for name in ("images", "image") if row.get(name) not in (None, [], "")), [])
    beside = given if isinstance(given, list) else [given]
    if not sources and beside:  # TRL's rule: they stand before what the user says first
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * len(beside) + first["content"]
        sources = [None] * len(beside)
    if sources.count(None) != len(beside):
        raise BadSample("images and their places differ in number", key)
    rest = iter(beside)
    images = [
        opened(next(rest) if source is None else source, f"{key}/{index}") for index, source in enumerate(sources)
    ]
    drawn = any(i["type"] == "image" for m in messages if m["role"] == "assistant" for i in m["content"])
    return {"messages": messages, "images": images, "mode": "interleaved" if drawn else "image_to_text", "id": key}


def _turns(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return who says what, as pairs."""
    if row.get("messages") is not None:
        pairs = [(turn["role"], turn["content"]) for turn in row["messages"]]
    else:
        pairs = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    return [(SPEAKERS.get(role, role), said) for role, said in pairs]


def _message(
    turn: tuple[str, Any], image_token: str, clean: Callable[[str], str], sources: list[Any]
) -> dict[str, Any]:
    role, said = turn
    if isinstance(said, str):
        # the placeholder is a special token too: cleaned first, the text would lose its places
        said = around_images(said, image_token)
    pieces: list[Piece] = []
    for item in said:  # rows of one schema carry every key in every item
        if item["type"] in IMAGE_ITEMS:
            pieces.append(IMAGE)
            own = next((item[name] for name in IMAGE_KEYS if item.get(name) is not None), None)
            sources.append(own["url"] if isinstance(own, dict) and "url" in own else own)
        elif item["type"] not in ("text", "input_text"):
            raise TypeError(f"an item of type {item['type']}")
        elif pieces and pieces[-1] is not IMAGE:  # the chat template joins them, so they are cleaned as one
            pieces[-1] += item["text"]
        else:
            pieces.append(item["text"])
    return {"role": role, "content": content(*(piece if piece is IMAGE else clean(piece) for piece in pieces))}


def check_turns(messages: list[dict[str, Any]], key: str) -> None:
    """Refuse what the chat template would not take, and answers that say nothing."""
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant" or "user" not in roles or set(roles) - {"system", "user", "assistant"}:
        raise BadSample("chat without a user's turn, without an answer at its end, or of other roles", key)
    if "system" in roles[1:]:
        raise BadSample("chat with a system's turn that is not its first", key)
    for message in messages:
        says = any(item["type"] == "image" or item["text"].strip() for item in message["content"])
        if message["role"] == "assistant" and not says:
            raise BadSample("question without answer", key)
