# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Tars of samples (WebDataset): consecutive members of one name, whatever their endings, form one.

Members are read one by one with `tarfile`: `datasets`' webdataset reader parses JSON members inside its generator, so that
one broken member ends the whole stream instead of being skipped.
"""

import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Container, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from recipes.data.readers.images import IMAGE_SUFFIXES

TEXT_SUFFIXES = ("json", "txt")
SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
ADDED_BY_SYSTEMS = "file that macOS or Windows has added"
MAX_LINKS = 8  # that lead from one to the next
# "txt", or "mask.png": what stands before the last dot is a word. So "v1.0_2.jpg" and "v1.0_3.jpg" are two samples.
_SUFFIX = re.compile(r"([A-Za-z_]+\.)*[^.]*")


class Member(NamedTuple):
    """A file of a tar.

    Attributes:
        offset: of its header.
        suffix: its ending, in lower case; `mask.png` of `0.mask.png` beside `0.jpg`.
        data: its bytes; none are read of a kind that is neither image nor text, None is a link to what is not there.
    """

    offset: int
    suffix: str
    data: bytes | None


class _Group:
    """Consecutive members of one sample."""

    def __init__(self, folder: str, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.members: list[Member] = []

    def add(self, folder: str, name: str, offset: int) -> bool:
        """Take a member in, its data to follow. False if it begins another sample: its name is another, or a member of its kind is there."""
        stem, _, last = name.rpartition(".") if "." in name else (name, "", "")
        if folder != self.folder:
            return False
        rest = name[len(self.stem) + 1 :] if name.startswith(f"{self.stem}.") else last if name == self.stem else None
        if rest is None:  # 0.mask.png came before 0.jpg
            middle = self.stem[len(stem) + 1 :] if self.stem.startswith(f"{stem}.") else ""
            if not middle or self._is_whole() or not _SUFFIX.fullmatch(f"{middle}.{last}"):
                return False
            self.stem, rest = stem, last
            self.members = [one._replace(suffix=f"{middle.lower()}.{one.suffix}") for one in self.members]
        if not _SUFFIX.fullmatch(rest) or any(one.suffix == rest.lower() for one in self.members):
            return False
        self.members.append(Member(offset, rest.lower(), None))
        return True

    def _is_whole(self) -> bool:
        return is_whole({one.suffix for one in self.members})

    def samples(self) -> Iterator[tuple[int, str, dict[str, bytes | None]]]:
        """Yield offset, name and members; what has image and text below a longer name is a sample of its own."""
        longer: dict[str, list[Member]] = {}
        for one in self.members:
            longer.setdefault(one.suffix.rpartition(".")[0], []).append(one)
        apart = {
            middle: [one._replace(suffix=one.suffix.rpartition(".")[2]) for one in some]
            for middle, some in longer.items()
            if middle and is_whole({one.suffix.rpartition(".")[2] for one in some})
        }
        whole = [one for one in self.members if one.suffix.rpartition(".")[0] not in apart]
        for middle, some in [*([("", whole)] if whole else []), *apart.items()]:
            name = posixpath.join(self.folder, ".".join(filter(None, (self.stem, middle))))
            yield some[0].offset, name, {one.suffix: one.data for one in some}


def is_whole(suffixes: set[str]) -> bool:
    """Return whether an image and a text are among these endings."""
    return bool(suffixes & set(IMAGE_SUFFIXES)) and bool(suffixes & set(TEXT_SUFFIXES))


def is_added_by_systems(folders: Container[str], name: str) -> bool:
    """Return whether macOS or Windows has added a file of this name in these folders."""
    return name.startswith("._") or name in SYSTEM_FILES or "__MACOSX" in folders


def count_left_out(path: Path) -> Counter[str]:
    """Count the members of a tar that are no part of a sample, by the rule that leaves them out."""
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        return Counter(reason for member in _members(tar) if (reason := _rule_against(member)))


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members.clear()  # or the list of all members stays in memory
        if not member.isdir():
            yield member


def _rule_against(member: tarfile.TarInfo) -> str | None:
    folder, name = posixpath.split(member.name)
    if is_added_by_systems(folder.split("/"), name):
        return ADDED_BY_SYSTEMS
    return None if member.isfile() or member.issym() or member.islnk() else "member that is no file"


def read_groups(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, dict[str, bytes | None]]]:
    """Read samples from the file's position on, as `(offset of the first header, name, {suffix: bytes})`.

    Raises:
        OSError, EOFError, tarfile.TarError: where the rest cannot be read.
    """
    group = None
    # ignore_zeros: behind a member with a broken header, go on at the next sound one. By default tarfile takes a
    # broken header for the end of the archive, without a word.
    with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
        for member in _members(tar):
            if _rule_against(member):
                continue
            folder, name = posixpath.split(member.name)
            if group is None or not group.add(folder, name, member.offset):
                if group is not None:
                    yield from group.samples()
                group = _Group(folder, name.rpartition(".")[0] if "." in name else name)
                group.add(folder, name, member.offset)
            # read last: where the tar is cut here, the sample before it is whole
            group.members[-1] = group.members[-1]._replace(data=_read(tar, member, path))
        if group is not None:
            yield from group.samples()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes | None:
    if member.name.rpartition(".")[2].lower() not in (*IMAGE_SUFFIXES, *TEXT_SUFFIXES):
        return b""  # arrays, videos, ...: not to be held in memory
    if member.isfile():
        return tar.extractfile(member).read()
    # `extractfile` would look for the target in the list of members, and again in the whole tar for each link
    files = _files(str(path), os.path.getmtime(path))
    target: str | tuple[int, int] | None = _target(member)
    for _ in range(MAX_LINKS):
        target = files.get(target)
        if not isinstance(target, str):
            break
    if not isinstance(target, tuple):
        return None
    with open(path, "rb") as file:
        file.seek(target[0])
        return file.read(target[1])


def _target(link: tarfile.TarInfo) -> str:
    """Return the name that a link leads to: a hard link's counts from the root, a symbolic link's from its folder."""
    folder = "" if link.islnk() else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(folder, link.linkname))


@lru_cache(maxsize=4)
def _files(path: str, changed: float) -> dict[str | None, tuple[int, int] | str]:
    """Return where the data of each member lies, (offset, bytes), or the name that a link leads to."""
    found: dict[str | None, tuple[int, int] | str] = {}
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
        for member in _members(tar):
            name = posixpath.normpath(member.name)
            if member.issym() or member.islnk():
                found.setdefault(name, _target(member))
            elif member.isfile() and not member.issparse():
                found[name] = (member.offset_data, member.size)
    return found
