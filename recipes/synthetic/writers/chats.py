# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write chats about images: LLaVA's file, and rows of `messages` and `images` as TRL takes them."""

import json
from pathlib import Path

from recipes.synthetic.scenes import World
from recipes.synthetic.writers.files import jpeg, numbered_scenes, write_images
from recipes.synthetic.writers.tables import write_parquet


def write_llava(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write LLaVA: `llava_v1_5_mix665k.json` and `coco/train2017/%012d.jpg`.

    Ids are text or numbers, every fourth image is followed by an entry without one, and the placeholder stands before or
    behind the first question.
    """
    folder, rows = Path(folder), []
    for image_id, scene in write_images(folder, world, num, start, "llava", "coco/train2017/{:012d}.jpg".format):
        turns = []
        for number, asked in enumerate(scene.questions()[:3]):
            first = f"<image>\n{asked['question']}" if image_id % 2 else f"{asked['question']}\n<image>"
            turns.append({"from": "human", "value": first if number == 0 else asked["question"]})
            turns.append({"from": "gpt", "value": asked["answer"]})
        name = f"{image_id:012d}" if image_id % 2 else image_id
        rows.append({"id": name, "image": f"coco/train2017/{image_id:012d}.jpg", "conversations": turns})
        if image_id % 4 == 0:
            told = [{"from": "human", "value": "Say a color."}, {"from": "gpt", "value": scene.main.color}]
            rows.append({"id": f"text{image_id}", "conversations": told})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))


def write_chats(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write chats as rows of `messages` and `images`, as TRL takes them: content of text and image items, parquet."""
    rows = []
    for scene in numbered_scenes(world, num, start, "chats"):
        turns = []
        for number, asked in enumerate(scene.questions()[:2]):
            words = [{"type": "text", "text": asked["question"]}]
            turns.append(
                {"role": "user", "content": [{"type": "image", "text": None}, *words] if number == 0 else words}
            )
            turns.append({"role": "assistant", "content": [{"type": "text", "text": asked["answer"]}]})
        rows.append({"messages": turns, "images": [{"bytes": jpeg(scene.image), "path": None}]})
    write_parquet(Path(folder), rows)
