# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Questions with lettered options: the letter in an answer, and MMVP's pairs.

Definitions: data_and_evaluation.md section 3.5.
"""

import re
from collections.abc import Sequence

from recipes.evaluation.scoring.pairs import all_right, consecutive

RULES = ("lmms_eval", "strict")
# By Index; the published file has these two pairs the wrong way round.
MMVP_CORRECTIONS = {99: "B", 100: "A", 279: "B", 280: "A"}


def parse_letter(text: str, letters: str = "AB", rule: str = "lmms_eval") -> str | None:
    """Return the option that an answer names, in upper case, or None.

    Args:
        letters: of the options.
        rule: `"lmms_eval"` gives what lmms-eval's MMVP does, which finds a letter in most texts: the article "a" is option
            A, and so is the end of "no idea". `"strict"` takes letters that stand as an option, such as "B", "(b)",
            "b.", "Option B", "the answer is b", and gives None for none or several different ones.

    Raises:
        ValueError: for an unknown rule, or letters that are none.
    """
    if not letters.isalpha():
        raise ValueError(f"The letters of the options are a text such as 'AB'; got {letters!r}.")
    if rule == "lmms_eval":
        return _first_letter(text.strip(), letters)
    if rule == "strict":
        return _only_letter(text.strip(), letters)
    raise ValueError(f"Unknown rule {rule!r} for letters: choose one of {', '.join(RULES)}.")


def correct_letter(answer: str, index: int | None = None) -> str:
    """Return the letter of a row's "Correct Answer", such as "(a)", in upper case.

    Args:
        index: the row's Index, where MMVP's four known errors are to be corrected.

    Raises:
        ValueError: for an answer that is not one letter.
    """
    if index in MMVP_CORRECTIONS:
        return MMVP_CORRECTIONS[index]
    match = re.fullmatch(r"\s*\(?([A-Za-z])\)?\s*", answer)
    if match is None:
        raise ValueError(f"The correct answer is one letter, such as '(a)'; got {answer!r}.")
    return match[1].upper()


def mmvp_figures(
    predictions: Sequence[str | None], answers: Sequence[str], indices: Sequence[int], corrected: bool = True
) -> dict[str, float]:
    """Return MMVP's figures.

    Args:
        predictions: letters, or None for an answer without one.
        answers: "Correct Answer" of each row, as in the file.
        indices: "Index" of each row; rows 1 and 2, 3 and 4, ... are pairs.
        corrected: whether the four known errors of the file are corrected.

    Returns:
        `accuracy`, `pair_accuracy` (both of a pair right; chance is 1/4), `unparsed`, all in 0..1, `count`, `pairs`.

    Raises:
        ValueError: for no rows, a pair of which a row is missing, or an answer that is not a letter.
    """
    if not predictions:
        raise ValueError("There are no predictions to score.")
    rows = zip(predictions, answers, indices, strict=True)
    right = [given == correct_letter(answer, index if corrected else None) for given, answer, index in rows]
    pairs = all_right(right, consecutive(indices), size=2)
    return {
        "accuracy": sum(right) / len(right),
        "pair_accuracy": sum(pairs.values()) / len(pairs),
        "unparsed": sum(given is None for given in predictions) / len(predictions),
        "count": len(right),
        "pairs": len(pairs),
    }


def _first_letter(text: str, letters: str) -> str | None:
    one = rf"\(?([{letters}])\)?"
    for pattern in (rf"^{one}\.?$", rf"^{one}[.\s]", rf"answer\s+is\s+{one}", rf"option\s+{one}", rf"{one}(?:\s|$)"):
        if match := re.search(pattern, text, re.IGNORECASE):
            return match[1].upper()
    first = text[:1].upper()
    return first if first and first in letters.upper() else None


def _only_letter(text: str, letters: str) -> str | None:
    upper, any_case = letters.upper(), f"{letters.upper()}{letters.lower()}"
    patterns = (
        rf"^\W*([{any_case}])\W*$",  # nothing else
        rf"^([{any_case}])[.):]",
        rf"\(([{any_case}])\)",
        rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer(?:\s+is)?:?)\s+([{any_case}])\b(?!\s+\w)",
        rf"(?<![\w'])([{upper}])(?![\w'])(?!\s+(?!or\b|and\b)[a-z])",  # alone, and no article or pronoun
    )
    found = {letter.upper() for pattern in patterns for letter in re.findall(pattern, text)}
    return found.pop() if len(found) == 1 else None
