# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write the files of benchmarks that rank answers (VisDial) or match images with statements (MMVP-VLM)."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import COLORS, KINDS, article
from recipes.synthetic.writers.files import jpeg, numbered_scenes, write_images, write_lines

ROUNDS, OPTIONS = 4, 100  # of a dialogue, and of a round
JUDGED = (1.0, 0.5)  # relevance of the right option, and of the same answer in a sentence


def write_visdial(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write VisDial: `visdial_1.0_val.json`, `visdial_1.0_val_dense_annotations.json` and `VisualDialog_val2018/`.

    Rounds have 100 options each, among them the right answer and the same in a sentence; one round of each dialogue is
    judged.
    """
    folder = Path(folder)
    questions: dict[str, int] = {}
    answers: dict[str, int] = {}
    for text in _fillers():
        answers.setdefault(text, len(answers))
    fillers = list(answers.values())
    dialogues, judged = [], []
    name_of = "VisualDialog_val2018/VisualDialog_val2018_{:012d}.jpg".format
    for image_id, scene in write_images(folder, world, num, start, "visdial", name_of):
        rng = world.rng(scene.index, "visdial")
        every = scene.questions()
        rounds: list[dict[str, Any]] = []
        for asked in [every[place] for place in rng.permutation(len(every))[:ROUNDS]]:
            right = answers.setdefault(asked["answer"], len(answers))
            said = answers.setdefault(f"it is {asked['answer']}", len(answers))
            others = [one for one in rng.permutation(fillers).tolist() if one not in (right, said)]
            options = [[right, said, *others][number] for number in rng.permutation(OPTIONS)]
            asked_number = questions.setdefault(asked["question"].rstrip("?"), len(questions))
            about = {"question": asked_number, "answer": right, "answer_options": options}
            rounds.append(about | {"gt_index": options.index(right)})
        dialogues.append({"image_id": image_id, "caption": scene.caption("medium"), "dialog": rounds})
        place = int(rng.integers(ROUNDS))
        right, options = rounds[place]["answer"], rounds[place]["answer_options"]
        texts = list(answers)
        worth = {right: JUDGED[0], answers[f"it is {texts[right]}"]: JUDGED[1]}
        judged.append(
            {"image_id": image_id, "round_id": place + 1, "gt_relevance": [worth.get(one, 0.0) for one in options]}
        )
    data = {"dialogs": dialogues, "questions": list(questions), "answers": list(answers)}
    (folder / "visdial_1.0_val.json").write_text(json.dumps({"version": "1.0", "split": "val", "data": data}))
    (folder / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(judged))


def _fillers() -> list[str]:
    """Return more answers than a round has options."""
    pairs = [f"{color} {kind}" for color in COLORS for kind in KINDS]
    forms = ("{}", "a {}", "two {}s", "no {}", "a small {}")
    return ["yes", "no", *KINDS, *COLORS, *(form.format(pair) for form in forms for pair in pairs)]


def write_mmvp_vlm(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write MMVP-VLM: `Questions.csv` and `MLLM_VLM Images/<Type>/<id>.jpg`, statements that fit one image of a pair each.

    Types are color and appearance, and quantity and count; images of which none fits to make a pair are left out.
    """
    folder, rows, truth = Path(folder), [], []
    for kind, first, second, statements in _pairs(list(numbered_scenes(world, num, start, "mmvp_vlm"))):
        place = folder / "MLLM_VLM Images" / kind
        place.mkdir(parents=True, exist_ok=True)
        for scene, statement in zip((first, second), statements, strict=True):
            index = len(rows) + 1
            (place / f"{index}.jpg").write_bytes(jpeg(scene.image))
            truth.append(scene.truth(file=f"MLLM_VLM Images/{kind}/{index}.jpg", image_id=index))
            rows.append((index, kind, statement))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Question ID", "Type", "Statement"), *rows])
    write_lines(folder / "truth.jsonl", truth)


def _pairs(scenes: list[Scene]) -> Iterator[tuple[str, Scene, Scene, tuple[str, str]]]:
    """Yield type, two scenes and their statements, each scene once."""
    left = scenes
    while len(left) > 1:
        first, *rest = left
        for second in rest:
            if first.main.color != second.main.color:
                said = tuple(f"{article(one.main.color)} {one.main.kind}" for one in (first, second))
                yield "Color and Appearance", first, second, (said[0], said[1])
                break
            if len(first.objects) != len(second.objects):
                yield "Quantity and Count", first, second, (_count(first), _count(second))
                break
        else:
            left = rest
            continue
        left = [scene for scene in rest if scene is not second]


def _count(scene: Scene) -> str:
    number = len(scene.objects)
    return f"{number} object{'s' if number > 1 else ''}"
