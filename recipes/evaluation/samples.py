# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the sample sheet of a run report shows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from recipes.evaluation.scenes import color_question
from recipes.evaluation.subject import Subject
from recipes.generation.prompt import make_prompt
from recipes.synthetic.scenes import Scene
from recipes.synthetic.vocabulary import COLORS, KINDS, UNSEEN, dominant_color
from recipes.whole_files import check_writable, whole_file, write_whole


def describe_scene(scene: Scene) -> dict[str, Any]:
    """Return a scene's image, its true caption, and a question with its answer."""
    asked = color_question(scene)
    texts = {"caption": scene.caption("medium"), "question": asked["question"], "answer": asked["answer"]}
    return {"image": scene.image} | texts


def write_samples(subject: Subject, samples: Sequence[dict[str, Any]], folder: str | Path) -> None:
    """Write each sample's image, its reconstruction, an image drawn from its caption, and texts.

    Args:
        samples: dicts with `image` (PIL), `caption` (its true text) and, optionally, `question` and `answer`.
        folder: gets `<i>_input.png`, `<i>_reconstruction.png`, `<i>_drawn.png` and `samples.json`.
    """
    folder = Path(folder)
    check_writable(folder)
    processor = subject.processor
    images = [sample["image"] for sample in samples]
    asked = [sample for sample in samples if "question" in sample]
    to_draw = [make_prompt(processor, subject.draw_template, sample["caption"]) for sample in samples]
    to_answer = [make_prompt(processor, "question", sample["question"], 1) for sample in asked]
    to_caption = [make_prompt(processor, "caption", num_images=1)] * len(samples)

    redrawn, drawn = subject.redraw(images), subject.draw(to_draw)
    captions = subject.write(to_caption, [[image] for image in images], max_new_tokens=24)
    answers = iter(subject.write(to_answer, [[sample["image"]] for sample in asked], max_new_tokens=6))

    rows = []
    for number, (sample, caption) in enumerate(zip(samples, captions, strict=True)):
        row = {"truth": sample["caption"], "caption": caption}
        for role, image in ("input", images[number]), ("reconstruction", redrawn[number]), ("drawn", drawn[number]):
            row[role] = f"{number}_{role}.png"
            _save(image, folder / row[role])
        if "question" in sample:
            row |= {"question": sample["question"], "right_answer": sample["answer"], "answer": next(answers)}
        rows.append(row)
    write_whole(folder / "samples.json", json.dumps(rows, indent=1))


def write_drawings(subject: Subject, folder: str | Path) -> None:
    """Write a drawing of each kind in each color, asked for as "a red circle".

    Args:
        folder: gets `drawing_<i>.png` and `drawings.json`: per drawing its file, prompt, color, dominant color, and whether
            images of that kind in that color were trained on.
    """
    folder = Path(folder)
    check_writable(folder)
    names = [(kind, color) for color in COLORS for kind in KINDS]
    asked = [f"a {color} {kind}" for kind, color in names]
    drawn = subject.draw([make_prompt(subject.processor, subject.draw_template, text) for text in asked])
    rows = []
    for number, ((kind, color), text, image) in enumerate(zip(names, asked, drawn, strict=True)):
        row = {"file": f"drawing_{number}.png", "prompt": text, "color": color, "dominant": dominant_color(image)}
        _save(image, folder / row["file"])
        rows.append(row | {"trained": (kind, color) not in UNSEEN})
    write_whole(folder / "drawings.json", json.dumps(rows, indent=1))


def _save(image: Image.Image, path: Path) -> None:
    with whole_file(path) as unfinished:
        image.save(unfinished, "PNG")
