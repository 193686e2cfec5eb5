# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What a harness asks -> what DEEM is asked, under a protocol; and what it said -> what the harness is told."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.data.samples import IMAGE, Piece
from recipes.evaluation.benchmark import ONE_WORD, Request
from recipes.evaluation.scoring.vqa import extract_answer
from recipes.prompts import ANSWER_BEGIN, ONE_WORD_REQUEST, QUESTION_REQUEST

# How the tasks of other suites ask for a short answer; under the protocol "deem" the released words take their place.
SHORT_ENDINGS = (ONE_WORD.strip(), "Answer the question using a single word or phrase", "Please answer Yes or No.")


@dataclass(frozen=True)
class Asked:
    """A request, and whether its answer is cut as the release cuts answers."""

    request: Request
    cut: bool = False


def asked(pieces: Sequence[Piece], protocol: str, doc: Mapping[str, Any]) -> Asked:
    """Return what DEEM is asked.

    Args:
        pieces: texts and images in the order of the harness.
        protocol: "standard" asks that; "deem" in the released form.
        doc: the task's row. One that `tables.py` wrote under the protocol "deem" says itself what is asked, and its task
            cuts the answers.
    """
    if protocol == "standard":
        return Asked(Request(tuple(pieces)))
    if doc.get("protocol") == "deem" and isinstance(doc.get("pieces"), str):
        own = tuple(IMAGE if piece is None else piece for piece in json.loads(doc["pieces"]))
        return Asked(Request(own, doc["answer_begin"]))
    return _released(pieces)


def _released(pieces: Sequence[Piece]) -> Asked:
    """Return the released form of a question that asks for a short answer, with the release's words for that; another
    question as it is."""
    question = " ".join(piece.strip() for piece in pieces if piece is not IMAGE and piece.strip())
    ending = next((one for one in SHORT_ENDINGS if question.endswith(one)), None)
    if ending is None:
        return Asked(Request(tuple(pieces)))
    images = [piece for piece in pieces if piece is IMAGE]
    bare = question.removesuffix(ending).strip()
    return Asked(Request((QUESTION_REQUEST, *images, bare + ONE_WORD_REQUEST), f" {ANSWER_BEGIN}"), cut=True)


def told(raw: str, about: Asked, until: Sequence[str]) -> str:
    """Return the answer that the harness is told: up to the first of the texts at which it ends one, cut if it is to be."""
    for end in until:
        raw = raw.split(end)[0] if end else raw
    return extract_answer(raw) if about.cut else raw.strip()


def pieces_row(request: Request) -> dict[str, str]:
    """Return the columns by which `asked` knows a request again."""
    pieces = [None if piece is IMAGE else piece for piece in request.pieces]
    return {"pieces": json.dumps(pieces), "answer_begin": request.answer_begin}
