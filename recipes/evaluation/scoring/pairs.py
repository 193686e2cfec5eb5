# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Questions that count together: right only if every question of the group is."""

from collections.abc import Hashable, Sequence


def all_right(right: Sequence[bool], groups: Sequence[Hashable], size: int | None = None) -> dict[Hashable, bool]:
    """Return, for each group in order of appearance, whether all of its questions are right.

    Args:
        right: whether each question is right.
        groups: the group of each question: a pair, an image, an item.
        size: how many questions every group has; None allows any number.

    Raises:
        ValueError: for groups of another size, such as a pair of which one question is missing.
    """
    members: dict[Hashable, list[bool]] = {}
    for one, group in zip(right, groups, strict=True):
        members.setdefault(group, []).append(bool(one))
    wrong = {group: len(of_group) for group, of_group in members.items() if size and len(of_group) != size}
    if wrong:
        group, number = next(iter(wrong.items()))
        raise ValueError(
            f"{len(wrong)} of {len(members)} groups do not have {size} questions: {group!r} has {number}. Score whole "
            "groups only."
        )
    return {group: all(of_group) for group, of_group in members.items()}


def consecutive(indices: Sequence[int], size: int = 2) -> list[int]:
    """Return the group of each row, counted from 1 as benchmark files do: rows 1 and 2 are group 0 for size 2.

    Raises:
        ValueError: for an index below 1.
    """
    if any(index < 1 for index in indices):
        raise ValueError(f"Rows are counted from 1; got index {min(indices)}.")
    return [(index - 1) // size for index in indices]
