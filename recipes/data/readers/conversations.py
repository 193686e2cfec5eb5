# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LLaVA conversations -> one-round dialogues.

Files: data_and_evaluation.md section 2.5.
"""

import random
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.files import RowReader, load_json
from recipes.data.readers.questions import question_messages


class LlavaReader(RowReader):
    """`llava_v1_5_mix665k.json`: `[{id, image?, conversations: [{from: human or gpt, value}]}]`.

    Rows without an image are left out, the others split into single rounds; `<image>` goes with its newline. Paths
    count from the folder that holds `coco/train2017`, `gqa/images`, `ocr_vqa/images`, `textvqa/train_images`, `vg/...`.
    """

    image_folders = ("", "images", "datasets", "data")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return one row per round of a conversation about an image."""
        found = []
        for index, row in enumerate(load_json(shard)):
            if isinstance(row, dict) and not row.get("image"):
                continue
            turns = row.get("conversations") if isinstance(row, dict) else None
            if not isinstance(turns, list):
                found.append((index, (row, ())))  # `build` refuses it
                continue
            # ids are not unique: some images have several rows
            name = f"{index}:{row.get('id', '')}"
            found += [(f"{name}.{i // 2}", (row["image"], turns[i : i + 2])) for i in range(0, len(turns), 2)]
        return found

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue, in the form of a question about the image."""
        name, (asked, answered) = row
        if (asked["from"], answered["from"]) != ("human", "gpt"):
            raise ValueError("a round is a turn of human and one of gpt")
        question = self.clean(asked["value"].replace("<image>\n", "").replace("\n<image>", "").replace("<image>", ""))
        answer = self.clean(answered["value"])
        if not answer:
            raise BadSample("question without answer", key)
        messages = question_messages(question, answer)
        image = self.image(folder, name)
        return {"messages": messages, "images": [image], "mode": "image_to_text", "id": key}
