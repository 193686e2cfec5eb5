# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the writers of all formats share: files of lines, JPEG data, images under the names a format gives them."""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import SYNONYMS


def jpeg(image: Image.Image) -> bytes:
    """Return the image as JPEG data of quality 95."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered_scenes(world: World, num: int, start: int, what: str) -> Iterator[Scene]:
    """Return `num` scenes from scene `start` on, with a progress bar named `what`.

    Raises:
        ValueError: `num` is below 1.
    """
    if num < 1:
        raise ValueError(f"num={num} images cannot be written. Give at least 1.")
    return (world.scene(start + i) for i in tqdm(range(num), desc=what, unit=" images"))


def write_images(
    folder: Path, world: World, num: int, start: int, what: str, name_of: Callable[[int], str]
) -> Iterator[tuple[int, Scene]]:
    """Write images as `folder / name_of(number)` and their truth; yield (number from 1, scene)."""
    truth = []
    for number, scene in enumerate(numbered_scenes(world, num, start, what), start=1):
        file = folder / name_of(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(scene.image))
        truth.append(scene.truth(file=name_of(number), image_id=number))
        yield number, scene
    write_lines(folder / "truth.jsonl", truth)


def write_coco_images(folder: Path, scenes: Iterator[Scene], split: str) -> Iterator[tuple[int, str, Scene]]:
    """Write images under COCO's names and their truth; yield (image_id, file name, scene)."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    truth = []
    for number, scene in enumerate(scenes, start=1):
        name = f"COCO_{split}_{number:012d}.jpg"
        (folder / split / name).write_bytes(jpeg(scene.image))
        truth.append(scene.truth(file=f"{split}/{name}", image_id=number))
        yield number, name, scene
    write_lines(folder / "truth.jsonl", truth)


def ten_answers(answer: str) -> list[str]:
    """Return the answers of ten people: eight give `answer`, two another word for it where there is one."""
    return [answer] * 8 + [SYNONYMS.get(answer, answer)] * 2
