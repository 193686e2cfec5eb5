# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""What the data costs, as ratios measured in one run.

    python tests/bench/data.py [--pictures 200] [--side 512] [--batch 8]

1. The pipeline (reader, processor, collator; one process) against plain PIL decoding and resizing to both sizes of the
   same JPEG files: pictures per second, and their ratio. Aim: at least 0.85.
2. A training step with the VAE against one that reads cached latents: seconds, and their ratio.

Medians of 5 alternating runs. Run it on an idle machine.
"""

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for conftest

import numpy as np
import torch
from conftest import build_tokenizer
from PIL import Image
from step import build
from transformers import ConvNextImageProcessorPil

from processing import DeemDataCollator, DeemProcessor
from recipes.data.sources import DataArguments, build_dataset


def write_tar(path: Path, pictures: int, side: int) -> None:
    """Captioned JPEG pictures of smooth noise, `side` by 4/3 `side` pixels."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(pictures):
            small = Image.fromarray(rng.integers(0, 256, (side // 16, side // 12, 3), dtype=np.uint8))
            data = io.BytesIO()
            small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            for suffix, content in (("jpg", data.getvalue()), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{index:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def plain(path: Path, sizes: tuple[int, int]) -> float:
    """Seconds to decode every JPEG and resize it to both sizes, as float arrays."""
    start = time.perf_counter()
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith("jpg"):
                image = Image.open(tar.extractfile(member)).convert("RGB")
                for size in sizes:
                    resized = image.resize((size, size), Image.Resampling.BICUBIC)
                    torch.from_numpy(np.asarray(resized, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
    return time.perf_counter() - start


def pipeline(path: Path, processor: DeemProcessor, pictures: int, batch: int) -> float:
    """Seconds for the same pictures as batches that the model takes."""
    arguments = DataArguments(data=[str(path)], shuffle_buffer=0, pack_length=0)
    dataset, _ = build_dataset(arguments, processor, batch, seed=0)
    collator = DeemDataCollator(processor, return_targets=True)
    start = time.perf_counter()
    stream = iter(dataset)
    for _ in range(pictures // batch):
        collator([next(stream) for _ in range(batch)])
    return (time.perf_counter() - start) * pictures / (pictures // batch * batch)


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of forward and backward."""
    start = time.perf_counter()
    model(**batch).loss.backward()
    model.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    sizes = (256, 512)
    processor = DeemProcessor.from_parts(
        ConvNextImageProcessorPil(size={"shortest_edge": sizes[0]}),
        build_tokenizer(),
        num_image_tokens=4,
        target_size=sizes[1],
    )
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "0.tar")
        write_tar(tar, args.pictures, args.side)
        times = [(plain(tar, sizes), pipeline(tar, processor, args.pictures, args.batch)) for _ in range(args.runs)]
    bare, ours = (args.pictures / statistics.median(column) for column in zip(*times, strict=True))
    print(f"PIL decode + resize   {bare:8.1f} pictures/s")
    print(f"pipeline              {ours:8.1f} pictures/s   ratio {ours / bare:.2f}")

    model, batch = build(args.batch, 96)
    cached = {key: value for key, value in batch.items() if key != "target_pixel_values"}
    cached["target_latents"] = model.image_decoder.encode_posterior(batch["target_pixel_values"])
    step(model, batch), step(model, cached)
    times = [(step(model, batch), step(model, cached)) for _ in range(args.runs)]
    with_vae, without = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"step with the VAE     {with_vae:8.3f} s")
    print(f"step with the cache   {without:8.3f} s            ratio {without / with_vae:.2f}")


if __name__ == "__main__":
    main()
