# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Writers of the real formats that pretraining, VQA and its evaluation read."""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import COLORS, DETAILS, KINDS, MAX_PICTURES, SYNONYMS, UNSEEN, pick


def jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=95)
    return data.getvalue()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered_scenes(world: World, num: int, start: int, what: str) -> Iterator[Scene]:
    if num < 1:
        raise ValueError(f"num={num} pictures cannot be written. Give at least 1.")
    return (world.scene(start + i) for i in tqdm(range(num), desc=what, unit=" pictures"))


def image_name(scene: Scene) -> str:
    """A name as MMC4 has them: a hash of at least 12 characters and the suffix that the picture had on the web."""
    digest = hashlib.sha1(f"{scene.world.seed}/{scene.world.shifted}/{scene.index}".encode()).hexdigest()
    return f"{digest[:12]}.{'png' if scene.index % 4 == 0 else 'jpg'}"


def write_mmc4(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """MMC4 documents that show `num` pictures from scene `start` on, 1 to 4 each.

    `mmc4_annts/docs_no_face_shard_0_v3.jsonl`, pictures `mmc4_images/<first 12 characters of image_name>.jpg`. As in
    the real data, some pictures (5 %) count as a poor match for their sentence: `matched_sim` below the usual 0.24.
    """
    folder, rows, truth = Path(folder), [], []
    (folder / "mmc4_annts").mkdir(parents=True, exist_ok=True)
    (folder / "mmc4_images").mkdir(exist_ok=True)
    document, left = None, 0
    for scene in numbered_scenes(world, num, start, "mmc4"):
        if not left:
            document = world.document(scene.index, max_pictures=min(MAX_PICTURES, start + num - scene.index))
            left = len(document.scenes)
            rng = world._rng(scene.index, "similarity")
            similarity = rng.uniform(0.08, 0.18, (left, len(document.text_list))).round(4)
            rows.append({"text_list": document.text_list, "image_info": [], "similarity_matrix": []})
            rows[-1] |= {"url": f"https://world.example/{scene.index}.html", "could_have_url_duplicate": 0}
        number, name = len(document.scenes) - left, image_name(scene)
        sentence = document.matched_text_index[number]
        similarity[number, sentence] = round(rng.uniform(*((0.19, 0.23) if rng.random() < 0.05 else (0.27, 0.36))), 4)
        rows[-1]["similarity_matrix"].append(similarity[number].tolist())
        rows[-1]["image_info"].append(
            {
                "image_name": name,
                "raw_url": f"https://world.example/{name}",
                "matched_text_index": sentence,
                "matched_sim": float(similarity[number, sentence]),
                "face_detections": None,
            }
        )
        (folder / "mmc4_images" / f"{name[:12]}.jpg").write_bytes(jpeg(scene.image))
        truth.append(scene.truth(file=f"mmc4_images/{name[:12]}.jpg", document=len(rows) - 1, sentence=sentence))
        left -= 1
    write_lines(folder / "mmc4_annts" / "docs_no_face_shard_0_v3.jsonl", rows)
    write_lines(folder / "truth.jsonl", truth)


def write_caption_tars(
    folder: str | Path, world: World, num: int, start: int = 0, detail: str = "medium", per_tar: int = 1000
) -> None:
    """WebDataset shards `00000.tar`, `00001.tar`, ... of `per_tar` pictures as img2dataset writes them: `{key}.jpg`,
    `{key}.json` (caption, url, key, status, width, height), `{key}.txt`. `detail` as in `Scene.caption`, or "mixed"."""
    folder, truth = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    tar = None
    try:
        for number, scene in enumerate(numbered_scenes(world, num, start, "captions")):
            shard, place = divmod(number, per_tar)
            if place == 0:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{shard:05d}.tar", "w")
            key = f"{shard:05d}{place:04d}"
            caption = scene.caption(pick(world._rng(scene.index, "detail"), DETAILS) if detail == "mixed" else detail)
            side = {"caption": caption, "url": f"https://world.example/{image_name(scene)}", "key": key}
            side |= {"status": "success", "width": world.size, "height": world.size}
            parts = {"jpg": jpeg(scene.image), "json": json.dumps(side).encode(), "txt": caption.encode()}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            truth.append(scene.truth(file=f"{shard:05d}.tar/{key}.jpg", caption=caption))
    finally:
        if tar is not None:
            tar.close()
    write_lines(folder / "truth.jsonl", truth)


def write_coco_images(folder: Path, scenes: Iterator[Scene], split: str) -> Iterator[tuple[int, str, Scene]]:
    """Writes pictures under COCO's names; yields (image_id, file name, scene)."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    truth = []
    for number, scene in enumerate(scenes, start=1):
        name = f"COCO_{split}_{number:012d}.jpg"
        (folder / split / name).write_bytes(jpeg(scene.image))
        truth.append(scene.truth(file=f"{split}/{name}", image_id=number))
        yield number, name, scene
    write_lines(folder / "truth.jsonl", truth)


def write_vqa(folder: str | Path, world: World, num: int, start: int = 0, split: str = "train2014") -> None:
    """VQAv2's files: `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json` and pictures
    `{split}/COCO_{split}_%012d.jpg`. Every question of `Scene.questions` with ten answers, of which two use another
    word where there is one (big for large); the truth is `multiple_choice_answer`. Attributes stand in truth.jsonl, in
    the order of the questions. Raises ValueError for a split other than train2014 and val2014."""
    if split not in ("train2014", "val2014"):
        raise ValueError(f"split={split!r} is not one of VQAv2's. Use train2014 or val2014.")
    folder, questions, annotations = Path(folder), [], []
    for image_id, _, scene in write_coco_images(folder, numbered_scenes(world, num, start, "vqa"), split):
        for number, asked in enumerate(scene.questions()):
            ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
            answer = asked["answer"]
            answers = [answer] * 8 + [SYNONYMS.get(answer, answer)] * 2
            answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
            questions.append(ids | {"question": asked["question"]})
            annotations.append(
                ids
                | {
                    "question_type": " ".join(asked["question"].lower().split()[:2]),
                    "answer_type": answer_type,
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer": given, "answer_confidence": "yes", "answer_id": i}
                        for i, given in enumerate(answers, start=1)
                    ],
                }
            )
    about = {"info": {"description": "synthetic world"}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    asked = about | {"task_type": "Open-Ended", "questions": questions}
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(asked))
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(about | {"annotations": annotations}))


def write_pope(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """POPE's `coco_pope_{random,popular,adversarial}.json` (JSON lines question_id, image, text, label) and pictures
    `val2014/*.jpg`. An object is a color with a kind; per picture up to three that are there and as many that are not:
    any (random), those most frequent in these pictures (popular), those that share the color or kind of an object that
    is there (adversarial)."""
    folder = Path(folder)
    scenes = list(write_coco_images(folder, numbered_scenes(world, num, start, "pope"), "val2014"))
    frequent = Counter((thing.color, thing.kind) for _, _, scene in scenes for thing in scene.objects)
    every = [(color, kind) for color in COLORS for kind in KINDS]
    for sampling in ("random", "popular", "adversarial"):
        rows = []
        for _, name, scene in scenes:
            rng = world._rng(scene.index, f"pope {sampling}")
            there = [(thing.color, thing.kind) for thing in scene.objects]
            absent = [pair for pair in (every[i] for i in rng.permutation(len(every))) if pair not in there]
            if sampling == "popular":
                absent.sort(key=lambda pair: -frequent[pair])
            if sampling == "adversarial":
                absent.sort(key=lambda pair: not any(pair[0] == c or pair[1] == k for c, k in there))
            for yes, no in zip(there[:3], absent, strict=False):
                for (color, kind), label in ((yes, "yes"), (no, "no")):
                    text = f"Is there a {color} {kind} in the image?"
                    rows.append({"question_id": len(rows) + 1, "image": name, "text": text, "label": label})
        write_lines(folder / f"coco_pope_{sampling}.json", rows)


def write_robustvqa(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """RobustVQA's `robustvqa_test.json`, {imagenet_a, imagenet_r, imagenet_v2: [{file_name, gt_caption, error_caption}]},
    and the pictures it names, `num` in all. `imagenet_v2` is new pictures of `world`, the other two are its shifted
    variant, `imagenet_a` with combinations of kind and color that the unshifted world never shows. The error class is
    the kind of another object in the picture where there is one, else any other kind."""
    folder, truth = Path(folder), []
    items: dict[str, list[dict[str, str]]] = {"imagenet_a": [], "imagenet_r": [], "imagenet_v2": []}
    shifted = replace(world, shifted=True)
    for number, plain in enumerate(numbered_scenes(world, num, start, "robustvqa")):
        scene = plain if number % 3 == 0 else shifted.scene(plain.index)
        kind, rng = scene.main.kind, scene.world._rng(scene.index, "error class")
        unseen = (kind, scene.main.color) in UNSEEN
        name = "imagenet_v2" if number % 3 == 0 else "imagenet_a" if unseen else "imagenet_r"
        others = [thing.kind for thing in scene.objects if thing.kind != kind] or [k for k in KINDS if k != kind]
        label = KINDS.index(kind)
        place = f"imagenetv2/{label}" if name == "imagenet_v2" else f"{name.replace('_', '-')}/n{label + 1:08d}"
        file_name = f"{place}/{scene.index:08d}.{'jpeg' if name == 'imagenet_v2' else 'jpg'}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_bytes(jpeg(scene.image))
        items[name].append({"file_name": file_name, "gt_caption": kind, "error_caption": pick(rng, others)})
        truth.append(scene.truth(file=file_name, set=name))
    (folder / "robustvqa_test.json").write_text(json.dumps(items))
    write_lines(folder / "truth.jsonl", truth)
