# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Write interleaved documents: MMC4's files, and rows like those of OBELICS."""

import hashlib
from pathlib import Path
from typing import Any

from recipes.synthetic.scenes import Scene, World
from recipes.synthetic.vocabulary import MAX_IMAGES
from recipes.synthetic.writers.files import jpeg, numbered_scenes, write_lines
from recipes.synthetic.writers.tables import write_parquet


def image_name(scene: Scene) -> str:
    """Return a name as in MMC4: a hash of at least 12 characters and the suffix that the image had on the web."""
    digest = hashlib.sha1(f"{scene.world.seed}/{scene.world.shifted}/{scene.index}".encode()).hexdigest()
    return f"{digest[:12]}.{'png' if scene.index % 4 == 0 else 'jpg'}"


def write_mmc4(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write MMC4 documents that show `num` images from scene `start` on, 1 to 4 each.

    Files: `mmc4_annts/docs_no_face_shard_0_v3.jsonl`, `mmc4_images/<first 12 characters of image_name>.jpg`. As in the
    real data, some images (5 %) are a poor match for their sentence: their `matched_sim` is below the usual 0.24.
    """
    folder, rows, truth = Path(folder), [], []
    (folder / "mmc4_annts").mkdir(parents=True, exist_ok=True)
    (folder / "mmc4_images").mkdir(exist_ok=True)
    document, left = None, 0
    for scene in numbered_scenes(world, num, start, "mmc4"):
        if not left:
            document = world.document(scene.index, max_images=min(MAX_IMAGES, start + num - scene.index))
            left = len(document.scenes)
            rng = world.rng(scene.index, "similarity")
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


def write_obelics(folder: str | Path, world: World, num: int, start: int = 0) -> None:
    """Write interleaved documents as rows of `images` and `texts`, `data/train-00000-of-00002.parquet` and one more."""
    rows, end = [], start
    for scene in numbered_scenes(world, num, start, "obelics"):
        if scene.index < end:
            continue  # part of the document before
        document = world.document(scene.index, max_images=min(4, start + num - scene.index))
        end = scene.index + len(document.scenes)
        images: list[Any] = []
        texts: list[Any] = []
        for index, sentence in enumerate(document.text_list):
            for place, shown in zip(document.matched_text_index, document.scenes, strict=True):
                if place == index:
                    images.append({"bytes": jpeg(shown.image), "path": None})
                    texts.append(None)
            images.append(None)
            texts.append(sentence)
        rows.append({"images": images, "texts": texts})
    write_parquet(Path(folder), rows)
