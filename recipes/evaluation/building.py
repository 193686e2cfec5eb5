# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Build RobustVQA: labelled images, and what a judge takes them for; those that it gets wrong are kept."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from recipes.data.faults import BadSample
from recipes.data.readers.images import IMAGE_SUFFIXES, open_image
from recipes.evaluation.judges import Judge, plain_name
from recipes.whole_files import write_whole


@dataclass(frozen=True)
class LabelledImage:
    """An image whose class is known.

    Attributes:
        file_name: as the benchmark's file will name it, `<set's folder>/<class>/<file>`.
        label: the name of its class.
        read: gives the bytes of its file.
    """

    file_name: str
    label: str
    read: Callable[[], bytes]


def read_class_names(file: str | Path | None) -> dict[str, str]:
    """Return the names of classes by number and by WordNet id, from `imagenet_class_index.json` as Keras has it
    ({"0": ["n01440764", "tench"], ...}), from {key: name}, or from a text file with a name a line; nothing without a file.
    """
    if file is None:
        return {}
    text = Path(file).read_text(encoding="utf-8")
    if Path(file).suffix != ".json":
        return {str(number): line.strip() for number, line in enumerate(text.splitlines()) if line.strip()}
    names = {}
    for key, value in json.loads(text).items():
        wordnet, name = value if isinstance(value, list) else (key, value)
        names |= {str(key): name, wordnet: name}
    return names


def labelled_images(place: str | Path, names: Mapping[str, str]) -> list[LabelledImage]:
    """Return the images of a folder with a sub-folder per class (WordNet id, class number or name), or of a tar or a
    folder of tars in WebDataset's form (`json` beside each image with `label`, `wnid` or `class_id`), by name.

    Args:
        names: of classes by the keys that the folders or rows have; a key that is not there is a name itself.

    Raises:
        ValueError: nothing is there, or folders are WordNet ids or numbers without names.
    """
    place = Path(place)
    tars = [place] if place.is_file() else sorted(place.glob("*.tar"))
    found = [image for tar in tars for image in _of_tar(tar, names)] if tars else list(_of_folders(place, names))
    if not found:
        raise ValueError(f"No labelled images at {place}: expected a sub-folder per class, or tars with json files.")
    return sorted(found, key=lambda image: image.file_name)


def _of_folders(place: Path, names: Mapping[str, str]) -> Iterator[LabelledImage]:
    for file in place.rglob("*"):
        if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and file.parent != place:
            key = file.parent.name
            if key not in names and (key.isdigit() or (key[0] == "n" and key[1:].isdigit())):
                raise ValueError(
                    f"The class {key} of {file} has no name. Give --class_names imagenet_class_index.json."
                )
            yield LabelledImage(f"{place.name}/{file.relative_to(place)}", names.get(key, key), file.read_bytes)


def _of_tar(tar: Path, names: Mapping[str, str]) -> Iterator[LabelledImage]:
    with tarfile.open(tar, "r:") as archive:
        members = {member.name: member for member in archive.getmembers() if member.isfile()}
        for name in members:
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() not in IMAGE_SUFFIXES or f"{stem}.json" not in members:
                continue
            about = json.loads(archive.extractfile(members[f"{stem}.json"]).read())  # type: ignore[union-attr]
            keys = [str(about[key]) for key in ("wnid", "class_id") if key in about]
            label = next((names[key] for key in keys if key in names), about.get("label"))
            if label is None:
                raise ValueError(
                    f"{tar.name}/{name} has no label: expected `label`, `wnid` or `class_id` in its json."
                )
            yield LabelledImage(f"{tar.stem}/{name}", label, _member(tar, members[name]))


def _member(tar: Path, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with open(tar, "rb") as stream:
            stream.seek(member.offset_data)
            return stream.read(member.size)

    return read


def wrong_items(
    images: Sequence[LabelledImage], judge: Judge, batch_size: int, folder: Path
) -> tuple[list[dict[str, str]], Counter[str]]:
    """Return an item per image that the judge takes for another class, and the counts of what was judged.

    Args:
        folder: of the benchmark's file; kept images that do not lie there under their name are copied.

    Returns:
        items of `file_name`, `gt_caption`, `error_caption`; counts of "right", "wrong" and of each reason why an image
        could not be read.
    """
    items: list[dict[str, str]] = []
    counts: Counter[str] = Counter()
    for start in tqdm(range(0, len(images), batch_size), desc="judged", unit=" batches"):
        batch: list[tuple[LabelledImage, bytes, Image.Image]] = []
        for image in images[start : start + batch_size]:
            data = image.read()
            try:
                batch.append((image, data, open_image(data, image.file_name)))
            except BadSample as error:
                counts[error.reason] += 1
        given = judge([image for _, _, image in batch]) if batch else []
        for (image, data, _), name in zip(batch, given, strict=True):
            if plain_name(name) == plain_name(image.label):
                counts["right"] += 1
                continue
            counts["wrong"] += 1
            items.append({"file_name": image.file_name, "gt_caption": image.label, "error_caption": name})
            if not (folder / image.file_name).is_file():
                (folder / image.file_name).parent.mkdir(parents=True, exist_ok=True)
                (folder / image.file_name).write_bytes(data)
    return items, counts


def images_digest(images: Sequence[LabelledImage]) -> str:
    """Return the SHA-256 over names, labels and files of a set."""
    found = sha256()
    for image in images:
        found.update(f"{image.file_name}\0{image.label}\0{sha256(image.read()).hexdigest()}\n".encode())
    return found.hexdigest()


def write_benchmark(file: Path, header: dict[str, Any], sets: dict[str, list[dict[str, str]]]) -> None:
    """Write `robustvqa_test.json`: the sets, and a header that says how they came about."""
    write_whole(file, json.dumps({"header": header} | sets, indent=1))
