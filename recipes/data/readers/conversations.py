# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""LLaVA conversations -> one-round dialogues.

Files: data_and_evaluation.md section 2.5.
"""

import random
from pathlib import Path
from typing import Any

from recipes.data.faults import BadSample, Skip
from recipes.data.readers.chats import SPEAKERS
from recipes.data.readers.files import RowReader, load_json
from recipes.data.readers.questions import question_messages
from recipes.data.samples import content


class LlavaReader(RowReader):
    """`llava_v1_5_mix665k.json`: `[{id, image?, conversations: [{from: human or gpt, value}]}]`.

    `image` may be a list of one, the speakers may be called user and assistant, and a system turn may come first: it
    stands before each round. Rows without an image are left out, the others split into single rounds; `<image>` goes
    with its newline. Paths count from the folder that holds `coco/train2017`, `gqa/images`, `ocr_vqa/images`,
    `textvqa/train_images`, `vg/...`.
    """

    image_folders = ("", "images", "datasets", "data")

    def rows(self, shard: Path) -> list[tuple[Any, Any]]:
        """Return one row `(image, system turn or None, turns)` per round of a conversation about an image."""
        found = []
        for index, row in enumerate(load_json(shard)):
            turns = row.get("conversations") if isinstance(row, dict) else None
            if not isinstance(turns, list) or not turns:
                found.append((index, (row, None, ())))  # `build` refuses it
                continue
            system = turns[0] if isinstance(turns[0], dict) and turns[0].get("from") == "system" else None
            turns = turns if system is None else turns[1:]
            rounds = [turns[i : i + 2] for i in range(0, len(turns), 2)] or [()]
            if not row.get("image"):
                self.leave_out(shard, "round of a conversation without an image", len(rounds))
                continue
            # ids are not unique: some images have several rows
            name = f"{index}:{row.get('id', '')}"
            found += [(f"{name}.{i}", (row["image"], system, pair)) for i, pair in enumerate(rounds)]
        return found

    def build(self, key: str, row: Any, folder: Path, rng: random.Random, skip: Skip) -> dict[str, Any]:
        """Return one dialogue, in the form of a question about the image."""
        name, system, turns = row
        if len(turns) != 2 or [SPEAKERS[turn["from"]] for turn in turns] != ["user", "assistant"]:
            raise ValueError("a round is a turn of human and one of gpt")
        if isinstance(name, list):
            if len(name) != 1:
                raise BadSample("conversation about several images", key)
            (name,) = name
        asked, answered = (turn["value"] for turn in turns)
        question = self.clean(asked.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", ""))
        answer = self.clean(answered)
        if not answer:
            raise BadSample("question without answer", key)
        messages = question_messages(question, answer)
        if system is not None and (said := self.clean(system["value"])):
            messages = [{"role": "system", "content": content(said)}, *messages]
        image = self.image(folder, name)
        return {"messages": messages, "images": [image], "mode": "image_to_text", "id": key}
