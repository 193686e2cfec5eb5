# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Short answers: VQA accuracy (VQAv2, OK-VQA, TextVQA), VizWiz accuracy, GQA's equality, and DEEM's cut of an answer.

Definitions: data_and_evaluation.md sections 3.2, 3.6 and 3.7. Every score is of one question, in 0..1.
"""

import re
import string
from collections.abc import Sequence

# In this order: what one of them replaces, the next one sees.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code deletes no more: it gives `re.UNICODE` where the count belongs
_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))
# The forms of the official table; one that lacks one of its apostrophes is completed. Those that the table has in upper
# case are not here: the text is lower case by then.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {
    form[:index] + form[index + 1 :]: form for form in _CONTRACTED for index, sign in enumerate(form) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table
_MARKERS = ("is ", "are ", "a ", "an ", "the ")


def normalize_answer(answer: str) -> str:
    """Return an answer as the official VQA evaluation compares it: punctuation, case, numbers, articles, contractions."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    number = _DIGIT_COMMA_DIGIT.search(text) is not None
    kept = text
    for sign in _PUNCTUATION:
        kept = kept.replace(sign, "" if number or f"{sign} " in text or f" {sign}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", kept, count=_MOST_PERIODS).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy of an answer against those of the annotators (VQAv2, OK-VQA, TextVQA).

    Where all references are the same string, it is compared as it is, as in the official evaluation: "Yes" is wrong then.
    """
    bare = [_single_line(reference) for reference in references]
    if len(set(bare)) > 1:
        return _agreement(normalize_answer(answer), [normalize_answer(reference) for reference in bare])
    return _agreement(_single_line(answer), bare)


def vizwiz_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy by VizWiz's rule: the answer is always normalized, the references never."""
    return _agreement(normalize_answer(answer), list(references))


def gqa_exact_match(answer: str, reference: str, rule: str = "strict") -> bool:
    """Return whether an answer is GQA's.

    Args:
        rule: `"strict"` compares as it is, as GQA does; `"relaxed"` without case and punctuation, as lmms-eval; `"deem"`
            strictly after `extract_answer`.
    """
    if rule == "strict":
        return answer == reference
    if rule == "deem":
        return extract_answer(answer) == reference
    if rule == "relaxed":
        return _relaxed(answer) == _relaxed(reference)
    raise ValueError(f"Unknown rule {rule!r} of exact match: choose 'strict', 'relaxed' or 'deem'.")


def extract_answer(text: str) -> str:
    """Return the short answer in what a model said, cut as the DEEM release cuts it.

    The cut looks at parts of words, not words: "pasta salad" gives "salad".
    """
    text = text.replace('"', "").strip()
    for end in ("\n", ".", ",", "!"):
        text = text.split(end)[0]
    text = text.lower()
    for marker in _MARKERS:
        if marker in text:
            text = text.split(marker)[1]
    for end in (" of", " or ", " and "):
        text = text.split(end)[0]
    return text.strip()


def _single_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _relaxed(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def _agreement(answer: str, references: list[str]) -> float:
    """Leave each annotator out once: a third for each of the others who says the same, at most 1; the mean of that."""
    if not references:
        raise ValueError("A question without reference answers has no accuracy: give at least one.")
    same = [reference == answer for reference in references]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)
