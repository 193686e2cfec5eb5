# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What users write in a chat stays text: control tokens in it are marked before the chat template writes its own.

The marks are those of transformers' `sanitize_control_tokens`: private-use characters around each control token, which
tokenizers take out again. A chat without control tokens holds no marks.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _encode_chat_piece,
    _get_control_token_patterns,
    mark_control_tokens,
)

_MARK = re.compile(f"[{_CONTROL_TOKEN_START}{_CONTROL_TOKEN_END}]")


def check_chat(chat: Any) -> None:
    """Refuse what is no chat.

    Raises:
        ValueError: other than a list of messages, each with a role and with content that is text or a list of items, each
            with a type, a text item with its text.
    """
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(
            f"Got {f'{type(chat).__name__} {chat!r}'[:200]} for a chat. Give a list of messages, at least one: "
            "[{'role': 'user', 'content': 'What is this?'}]."
        )
    for number, message in enumerate(chat):
        items = message.get("content") if isinstance(message, Mapping) else None
        sound = isinstance(items, (str, list, tuple, type(None))) and isinstance(message, Mapping)
        sound = sound and isinstance(message.get("role"), str)
        for item in items if sound and isinstance(items, (list, tuple)) else ():
            sound = sound and isinstance(item, Mapping) and isinstance(item.get("type"), str)
            sound = sound and (item["type"] != "text" or isinstance(item.get("text"), str))
        if not sound:
            raise ValueError(
                f"Message {number} of the chat is {message!r}".replace("\n", " ")[:300]
                + ". Give a role, and for content a "
                "text or a list of items such as {'type': 'text', 'text': 'What is this?'} and {'type': 'image'}."
            )


def check_text(text: str) -> None:
    """Refuse halves of surrogate pairs, which cut JSON leaves: tokenizers take them for no text.

    Raises:
        ValueError: naming the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds half of a surrogate pair at character {error.start}, {text[error.start]!r}, which is no "
            "text. Take it out: text.encode('utf-8', 'ignore').decode()."
        ) from error


def place_images(chat: list[dict[str, Any]], image_token: str, images_beside: bool) -> list[dict[str, Any]]:
    """Make each placeholder in content that is one string an image item.

    Only where images come beside the chat, and no image item has a place for them: else a placeholder is what its writer
    wrote, text, as it always is in text items.
    """
    in_lists = [message["content"] for message in chat if isinstance(message.get("content"), (list, tuple))]
    if not images_beside or any(item["type"] == "image" for items in in_lists for item in items):
        return chat
    placed = []
    for message in chat:
        content = message.get("content")
        if isinstance(content, str) and image_token in content:
            first, *others = [{"type": "text", "text": text} for text in content.split(image_token)]
            items = [first, *(item for text in others for item in ({"type": "image"}, text))]
            message = {**message, "content": [item for item in items if item.get("text") != ""]}
        placed.append(message)
    return placed


def mark_user_text(chat: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return a chat whose texts have their control tokens marked as text; items other than text stay as they are."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern, _ = _get_control_token_patterns(tuple(tokens))

    def marked(name: str, value: Any) -> Any:
        if name == "content" and isinstance(value, (list, tuple)):
            return _mark_items(value, pattern)
        return value if name == "role" else mark_control_tokens(value, pattern)

    return [{name: marked(name, value) for name, value in message.items()} for message in chat]


def _mark_items(items: list[dict[str, Any]], pattern: re.Pattern) -> list[dict[str, Any]]:
    """Items with their texts marked, and kept apart where two that follow each other would join to a control token."""
    marked = [mark_control_tokens(item, pattern) if item["type"] == "text" else item for item in items]
    start = 0
    while start < len(items):
        run = list(itertools.takewhile(lambda item: item["type"] == "text", items[start:]))
        texts = [_MARK.sub("", item["text"]) for item in run]
        ends = list(itertools.accumulate(map(len, texts)))
        for match in pattern.finditer("".join(texts)):
            for place, end in enumerate(ends):
                if match.start() < end < match.end():
                    item = marked[start + place]
                    marked[start + place] = {
                        **item,
                        "text": item["text"].rstrip(_CONTROL_TOKEN_END) + _CONTROL_TOKEN_END,
                    }
        start += len(run) + 1
    return marked


def is_marked(text: str) -> bool:
    """Return whether a rendered chat holds marks."""
    return _MARK.search(text) is not None


def unmarked(token: str) -> str:
    """Return a regular expression for a token that is not marked as text."""
    return f"(?<!{_CONTROL_TOKEN_START}){re.escape(token)}"


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize a rendered chat as a tokenizer does with `sanitize_control_tokens`, with the place of each token.

    Returns: token ids, without any that the tokenizer would add, and (start, end) of each in characters of `text`.

    Raises:
        ValueError: the tokenizer makes a control token of plain text.
    """
    if not is_marked(text):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding.input_ids, encoding.offset_mapping
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for piece, token, start in _pieces(tokenizer, text):
        if piece:
            # behind a newline, so that no space is put in front of what is no beginning
            lead = "\n" if start else ""
            encoding = tokenizer(lead + piece, add_special_tokens=False, return_offsets_mapping=True)
            cut = len(newline) if start else 0
            if start and encoding.input_ids[:cut] != newline:
                lead, cut = "", 0
                encoding = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoding.input_ids[cut:]
            at = start - len(lead)
            places += [(max(first + at, start), last + at) for first, last in encoding.offset_mapping[cut:]]
        if token:
            as_text = _encode_chat_piece(tokenizer, token, True, newline)
            if tokenizer.convert_tokens_to_ids(token) in as_text:
                raise ValueError(
                    f"{token!r} in a message cannot be kept as text: the tokenizer knows it as a control token."
                )
            ids += as_text
            places += [(start + len(piece), start + len(piece) + len(token) + 2)] * len(as_text)
    return ids, places


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[str, str | None, int]]:
    """Text, the marked token behind it, and where the text starts."""
    _, pattern = _get_control_token_patterns(tuple(tokenizer.added_tokens_encoder))
    start = 0
    for match in pattern.finditer(text):
        yield text[start : match.start()], match[1], start
        start = match.end()
    yield text[start:], None, start


__all__ = ["check_chat", "check_text", "encode_marked", "is_marked", "mark_user_text", "place_images", "unmarked"]
