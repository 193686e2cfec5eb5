# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Documents -> sequences of a fixed length that hold whole images only.

A document is a dict with `input_ids` (bos ... eos, every image already expanded to its start-of-image token followed by
`num_image_tokens` slots), `images` in the order of their start-of-image tokens, and `id`.
Rules and edge cases: data_and_evaluation.md section 2.3 (packing of the released DEEM data pipeline).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LEVELS = ("image", "sample")


@dataclass(frozen=True)
class Packing:
    """How documents are cut.

    Args:
        length: tokens per sequence.
        num_image_tokens: slots behind each start-of-image token.
        bos_token_id, start_of_image_token_id, image_token_id: ids of the three tokens a cut depends on.
        max_images: most images per sequence, -1 = no cap.
        level: what a cut must keep whole: `"image"` (interleaved documents: a document may go on in the next sequence)
            or `"sample"` (captions: an image and its caption stay together).

    Raises:
        ValueError: for an unknown level, a cap of 0, or a length that cannot hold bos and one image.
    """

    length: int
    num_image_tokens: int
    bos_token_id: int
    start_of_image_token_id: int
    image_token_id: int
    max_images: int = -1
    level: str = "image"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"Unknown packing level {self.level!r}: choose one of {', '.join(LEVELS)}.")
        if self.max_images == 0 or self.max_images < -1:
            raise ValueError(f"max_images is {self.max_images}: give a number >= 1, or -1 for no cap.")
        if self.length < self.num_image_tokens + 2:
            raise ValueError(
                f"A packed sequence of {self.length} tokens cannot hold bos and one image of 1 + {self.num_image_tokens} "
                f"tokens: give a length of at least {self.num_image_tokens + 2}."
            )

    def cut(self, input_ids: list[int]) -> tuple[int, bool]:
        """Find where the first sequence of `input_ids` ends, at the latest behind `length` tokens.

        Returns:
            The number of tokens of the sequence, always >= 1, and whether an image that did not fit was cut off.
        """
        end = min(self.length, len(input_ids))
        starts = [i for i in range(end) if input_ids[i] == self.start_of_image_token_id]
        complete = input_ids[:end].count(self.image_token_id) // self.num_image_tokens
        if 0 < self.max_images < complete:
            end = starts[self.max_images - 1] + self.num_image_tokens + 1
            if self.level == "sample":
                next_start = starts[self.max_images]
                # the last bos between the last image that fits and the first that does not
                end = max((i for i in range(end, next_start) if input_ids[i] == self.bos_token_id), default=next_start)
            starts = starts[: self.max_images]
        if not starts or end - starts[-1] > self.num_image_tokens:
            return end, False
        if self.level == "sample":
            last_bos = max((i for i in range(starts[-1]) if input_ids[i] == self.bos_token_id), default=0)
            # A document longer than a sequence has its bos at 0, or lies behind: cutting there would never get on.
            if last_bos > 0:
                return last_bos, True
        return starts[-1], True

    def document_starts(self, input_ids: list[int]) -> list[int]:
        """Return for each image of `input_ids` the position of the latest bos strictly before it, 0 if there is none."""
        starts, last_bos = [], 0
        for i, token in enumerate(input_ids):
            if token == self.bos_token_id:
                last_bos = i
            elif token == self.start_of_image_token_id:
                starts.append(last_bos)
        return starts


class Packer:
    """Concatenates documents and cuts them into sequences.

    Sequences without an image are dropped. The tail of the stream, which fills no sequence, is given where asked for.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.tokens: list[int] = []
        self.images: list[tuple[Any, str]] = []  # (image, id of its document)
        # (place, tokens, images) of the documents these come from
        self.documents: deque[tuple[Any, int, int]] = deque()

    def add(self, document: dict[str, Any], place: Any = None) -> None:
        """Append a document; `place` is where it can be found again.

        Raises:
            ValueError: if its number of images differs from its start-of-image tokens.
        """
        num_units = document["input_ids"].count(self.packing.start_of_image_token_id)
        if num_units != len(document["images"]):
            raise ValueError(
                f"Document {document['id']!r} has {len(document['images'])} images but {num_units} start-of-image "
                "tokens: every image needs one placeholder in the text."
            )
        self.tokens += document["input_ids"]
        self.images += [(image, document["id"]) for image in document["images"]]
        self.documents.append((place, len(document["input_ids"]), num_units))

    def sequences(self, rest: bool = False) -> Iterator[dict[str, Any]]:
        """Cut off all sequences that are full, and with `rest` the last one, which is not.

        Yields:
            dicts with `input_ids` (at most `packing.length`), `images`, `document_starts` (one per image), `id` (the
            documents the images come from, joined by "+") and `is_truncated` (an image that did not fit was cut off and
            opens the next sequence).
        """
        while len(self.tokens) >= (1 if rest else self.packing.length):
            end, is_truncated = self.packing.cut(self.tokens)
            sequence, self.tokens = self.tokens[:end], self.tokens[end:]
            document_starts = self.packing.document_starts(sequence)
            taken, self.images = self.images[: len(document_starts)], self.images[len(document_starts) :]
            self._forget()
            if taken:
                yield {
                    "input_ids": sequence,
                    "images": [image for image, _ in taken],
                    "document_starts": document_starts,
                    "id": "+".join(dict.fromkeys(name for _, name in taken)),
                    "is_truncated": is_truncated,
                }

    def _forget(self) -> None:
        """Forget the documents of which nothing is left."""
        tokens, images = (sum(document[i] for document in self.documents) for i in (1, 2))
        while self.documents:
            _, own_tokens, own_images = self.documents[0]
            tokens, images = tokens - own_tokens, images - own_images
            if tokens < len(self.tokens) or images < len(self.images):
                break
            self.documents.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Return the places of the documents of the rest, and how many of their last tokens and images are left."""
        places = [place for place, _, _ in self.documents]
        return {"places": places, "tokens": len(self.tokens), "images": len(self.images)}

    def load_state_dict(self, state: dict[str, Any], documents: list[dict[str, Any]]) -> None:
        """Take up a saved position; `documents` are those of `state["places"]`."""
        for place, document in zip(state["places"], documents, strict=True):
            self.add(document, place)
        self.tokens = self.tokens[len(self.tokens) - state["tokens"] :]
        self.images = self.images[len(self.images) - state["images"] :]


def limit_caption(input_ids: list[int], packing: Packing) -> list[int]:
    """Shorten one caption document to `packing.length` tokens, keeping its image whole.

    Image first: the head stays. Text first: the head stays together with the image and eos at the end.
    """
    if len(input_ids) <= packing.length:
        return input_ids
    tail = packing.num_image_tokens + 2
    if packing.start_of_image_token_id in input_ids[-tail:]:
        return input_ids[: packing.length - tail] + input_ids[-tail:]
    return input_ids[: packing.length]


def group_captions(sequence: dict[str, Any], every: int, packing: Packing, eos_token_id: int) -> dict[str, Any]:
    """Make one document of every `every` captions of a packed sequence: other bos, and the eos before them, go.

    Args:
        sequence: as `Packer.sequences` yields them.

    Returns:
        the sequence with `input_ids` and `document_starts` anew.
    """
    kept: list[int] = []
    number = 0  # of the next bos
    for token in sequence["input_ids"]:
        if token == packing.bos_token_id:
            number += 1
            if (number - 1) % every:
                if kept and kept[-1] == eos_token_id:
                    kept.pop()
                continue
        kept.append(token)
    return {**sequence, "input_ids": kept, "document_starts": packing.document_starts(kept)}
