# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""Fills a cache of latents: every image that a run can come across, encoded once (recipes/precompute_latents.py)."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from modeling_deem import DeemImageDecoder
from processing import DeemProcessor
from recipes.data.faults import DataReport
from recipes.data.stream.dataset import MixedDataset
from recipes.data.stream.shuffle import ReaderPass
from recipes.data.stream.steps import mirrored
from recipes.training.latent_cache import SUFFIX, LatentCache, image_key, transform_id, vae_id, write_shard
from recipes.whole_files import check_writable


@dataclass
class LatentArguments:
    """Options of `recipes/precompute_latents.py`, besides those of the recipe."""

    latent_batch_size: int = field(default=16, metadata={"help": "Images that the VAE encodes at a time."})
    shard_size: int = field(default=1000, metadata={"help": "Images per file."})
    num_verified: int = field(default=16, metadata={"help": "Images encoded once more at the end, for comparison."})


def read_images(dataset: MixedDataset, report: DataReport, share: tuple[int, int]) -> Iterator[Image.Image]:
    """Yield every image that the sources can give, mirrored too where they are flipped; some come more than once.

    Args:
        report: counts what is read and skipped.
        share: (rank, processes), the portion of the shards to read.
    """
    seen = set()
    for source in dataset.sources:
        reader = source.reader
        # The same files and reader, whatever they are called. Files of the Hub do not tell configurations apart.
        on_disk = all(isinstance(shard, Path) for shard in reader.shards)
        files = (type(reader), *(reader.shards if on_disk else [reader.name]))
        if files in seen:
            continue
        seen.add(files)
        # A reader leaves out images at random; another pass would want those.
        for name, value in {"max_images": sys.maxsize, "single_image_drop": 0.0}.items():
            if hasattr(reader, name):
                setattr(reader, name, value)
        for _, sample in ReaderPass(reader, report, source.seed, share=share, max_skipped=source.max_skipped):
            for image in sample["images"]:
                yield image
                if source.flip:
                    yield mirrored(image)


@torch.no_grad()
def encode(decoder: DeemImageDecoder, processor: DeemProcessor, images: list[Image.Image]) -> torch.Tensor:
    """Encode images to (N, 8, s, s) on the CPU, see `DeemImageDecoder.encode_posterior`."""
    targets = processor.image_processor(images, return_targets=True, return_tensors="pt")["target_pixel_values"]
    return decoder.encode_posterior(targets.to(decoder.device)).cpu()


class LatentWriter:
    """Encodes images by batches and writes them as files of a cache.

    Args:
        folder: of the cache.
        vae, transform: what the cache is made with, from `vae_id` and `transform_id`.
        rank: of this process, which numbers files of its own.
    """

    def __init__(
        self,
        folder: Path,
        decoder: DeemImageDecoder,
        processor: DeemProcessor,
        vae: str,
        transform: str,
        arguments: LatentArguments,
        rank: int,
    ) -> None:
        self.folder, self.decoder, self.processor, self.vae, self.transform = (
            folder,
            decoder,
            processor,
            vae,
            transform,
        )
        self.arguments, self.rank = arguments, rank
        self.waiting: dict[str, Image.Image] = {}
        self.encoded: dict[str, torch.Tensor] = {}
        # The next number is behind the last file's. The count of files would be taken where one in between was deleted.
        numbers = [int(file.stem.split("-")[1]) for file in folder.glob(f"{rank:03d}-*{SUFFIX}")]
        self.number = 1 + max(numbers, default=-1)

    def add(self, key: str, image: Image.Image) -> None:
        """Take one image; encode and write once there are enough."""
        self.waiting[key] = image
        if len(self.waiting) == self.arguments.latent_batch_size:
            self._encode()
        if len(self.encoded) >= self.arguments.shard_size:
            self._write()

    def close(self) -> None:
        """Encode and write what is left."""
        self._encode()
        self._write()

    def _encode(self) -> None:
        if self.waiting:
            latents = encode(self.decoder, self.processor, list(self.waiting.values()))
            for key, one in zip(self.waiting, latents, strict=True):
                self.encoded[key] = one.clone(memory_format=torch.contiguous_format)
            self.waiting = {}

    def _write(self) -> None:
        if self.encoded:
            path = self.folder / f"{self.rank:03d}-{self.number:05d}{SUFFIX}"
            write_shard(path, self.encoded, self.vae, self.transform)
            self.number, self.encoded = self.number + 1, {}


def fill(
    folder: Path,
    decoder: DeemImageDecoder,
    processor: DeemProcessor,
    images: Iterable[Image.Image],
    arguments: LatentArguments,
    rank: int = 0,
) -> tuple[list[Image.Image], set[str]]:
    """Encode the images that the folder does not hold yet.

    Returns:
        Some of all images, for `compare`, and the keys of all, for `check_complete`.

    Raises:
        ValueError: the folder holds latents of another VAE or transform, or a broken file.
        OSError: the folder cannot be written to, or is full; started again, it goes on behind the last whole file.
    """
    vae, transform = vae_id(decoder.vae), transform_id(processor)
    check_writable(folder)
    known = set(LatentCache(folder, vae, transform).shard_of) if any(folder.glob(f"*{SUFFIX}")) else set()
    writer = LatentWriter(folder, decoder, processor, vae, transform, arguments, rank)
    sampled: list[Image.Image] = []
    seen: set[str] = set()
    for index, image in enumerate(tqdm(images, "images")):
        if index % 97 == 0 and len(sampled) < arguments.num_verified:
            sampled.append(image)
        seen.add(key := image_key(image))
        if key not in known:
            known.add(key)
            writer.add(key, image)
    writer.close()
    return sampled, seen


def check_complete(cache: LatentCache, seen: set[str]) -> None:
    """Raise ValueError if the cache lacks one of the images that a run has come across, given by their keys."""
    if missing := [key for key in seen if key not in cache]:
        raise ValueError(
            f"{len(missing)} of {len(seen)} images are not in {cache.folder} although they were encoded: did something "
            "else write there? Start the same command again."
        )


def compare(
    cache: LatentCache, decoder: DeemImageDecoder, processor: DeemProcessor, images: list[Image.Image]
) -> float:
    """Return the largest difference between the cache and images encoded now.

    Raises:
        ValueError: it is above 1e-3.
    """
    worst = 0.0
    for image in images:
        worst = max(worst, float((cache[image_key(image)] - encode(decoder, processor, [image])[0]).abs().max()))
    if worst > 1e-3:
        raise ValueError(f"An image encoded once more differs from {cache.folder} by {worst:.2g}: compute it anew.")
    return worst
