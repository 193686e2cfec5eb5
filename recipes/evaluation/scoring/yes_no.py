# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Yes/no questions: POPE, RobustVQA and all that are asked like them.

Definitions: data_and_evaluation.md sections 3.3 and 3.4.
"""

import re
from collections.abc import Sequence

from recipes.evaluation.scoring.vqa import extract_answer

RULES = ("official", "deem", "word")


def parse_yes_no(text: str, rule: str = "official") -> str | None:
    """Return `"yes"`, `"no"`, or None for an answer that is neither.

    Args:
        text: what the model said.
        rule: `"official"` is POPE's: no if the first sentence has the word "No", "no" or "not", else yes, whatever was
            said; `"deem"` takes the answer that is yes or no after `extract_answer`; `"word"` the one of the words yes
            and no that the text has, if it has not both.

    Raises:
        ValueError: for an unknown rule.
    """
    if rule == "official":
        words = text.split(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "not", "no"} & set(words) else "yes"
    if rule == "deem":
        answer = re.sub(r"[:\[\]]", " ", extract_answer(text)).strip()
        return answer if answer in ("yes", "no") else None
    if rule == "word":
        found = set(re.findall(r"\w+", text.lower())) & {"yes", "no"}
        return found.pop() if len(found) == 1 else None
    raise ValueError(f"Unknown rule {rule!r} for yes and no: choose one of {', '.join(RULES)}.")


def yes_no_counts(predictions: Sequence[str | None], labels: Sequence[str]) -> list[list[int]]:
    """Return (N, 6) counts, of which every figure is made: is the label yes, the prediction yes, both yes, both no; is
    the prediction neither; and 1.

    Raises:
        ValueError: for a label other than yes and no, a prediction other than yes, no and None, or unequal lengths.
    """
    if wrong := set(labels) - {"yes", "no"}:
        raise ValueError(f"Labels are 'yes' or 'no'; got {min(wrong, key=repr)!r}.")
    if unparsed := set(predictions) - {"yes", "no", None}:
        raise ValueError(
            f"Predictions are 'yes', 'no' or None; got {min(unparsed, key=repr)!r}. Parse answers with `parse_yes_no`."
        )
    return [
        [
            label == "yes",
            given == "yes",
            label == given == "yes",
            label == given == "no",
            given is None,
            1,
        ]
        for given, label in zip(predictions, labels, strict=True)
    ]


def yes_no_figures(predictions: Sequence[str | None], labels: Sequence[str]) -> dict[str, float]:
    """Return all figures of a yes/no set; a prediction None is wrong and is not a yes.

    Returns:
        `accuracy`, `precision`, `recall`, `f1` (of yes; 0 where they divide by zero), `yes_ratio` (of the predictions),
        `unparsed` (share of None), `accuracy_yes` and `accuracy_no` (of the questions with that label; absent if there
        are none), all in 0..1, and `count`.

    Raises:
        ValueError: for no questions at all, and as `yes_no_counts`.
    """
    counts = yes_no_counts(predictions, labels)
    if not counts:
        raise ValueError("There are no predictions to score.")
    label_yes, given_yes, both_yes, both_no, unparsed, count = (sum(column) for column in zip(*counts, strict=True))
    figures = {
        "accuracy": (both_yes + both_no) / count,
        "precision": both_yes / given_yes if given_yes else 0.0,
        "recall": both_yes / label_yes if label_yes else 0.0,
        "f1": 2 * both_yes / (given_yes + label_yes) if given_yes + label_yes else 0.0,
        "yes_ratio": given_yes / count,
        "unparsed": unparsed / count,
        "count": count,
    }
    if label_yes:
        figures["accuracy_yes"] = both_yes / label_yes
    if count > label_yes:
        figures["accuracy_no"] = both_no / (count - label_yes)
    return figures
