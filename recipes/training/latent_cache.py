# Copyright 2026 The DEEM team. Licensed under the Apache License, Version 2.0.
"""A cache of the latents of images, so that training needs no VAE (recipes/precompute_latents.py fills it).

A cache is a folder of safetensors files. Each holds, by the content of an image, the mean and standard deviation of its
latents (`DeemImageDecoder.encode_posterior`); so sampling stays random, and equals that of training without a cache.
The metadata of each file names the VAE and the transform it was made with.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modeling_deem import DeemForConditionalGeneration
from processing import DeemDataCollator, DeemProcessor
from processing.image_reading_deem import upright
from recipes.whole_files import whole_file

SUFFIX = ".safetensors"


def image_key(image: Image.Image) -> str:
    """Return the name of an image by its content: mode, size and pixels as it is to be seen.

    A mirrored image has another name, and so have the same pixels with another EXIF orientation, which the image
    processor obeys.
    """
    image = upright(image)
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def transform_id(processor: DeemProcessor) -> str:
    """Return what the processor does to an image before the VAE sees it, as JSON."""
    images = processor.image_processor
    settings = {
        name: getattr(images, name) for name in ("do_resize", "do_center_crop", "do_rescale", "rescale_factor")
    }
    size = {side: images.target_size[side] for side in ("height", "width")}
    settings |= {"target_size": size, "resample": int(images.resample), "backend": type(images).__name__}
    return json.dumps(settings, sort_keys=True)


def vae_id(vae: nn.Module) -> str:
    """Return the name of a VAE by its weights and what scales its latents."""
    digest = hashlib.sha256(repr([vae.config.get(name) for name in ("scaling_factor", "shift_factor")]).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return f"{type(vae).__name__} {digest.hexdigest()[:32]}"


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def write_shard(path: Path, tensors: dict[str, torch.Tensor], vae: str, transform: str) -> None:
    """Write one file of a cache, whole or not at all.

    Args:
        tensors: (8, s, s) of each image, by `image_key`.
        vae, transform: what they were made with, from `vae_id` and `transform_id`.

    Raises:
        OSError: see `whole_file`.
    """
    metadata = {"vae": vae, "transform": transform, "checksum": checksum(tensors)}
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata)


class LatentCache:
    """The cache in a folder: `cache[image_key(image)]` is (8, s, s).

    Args:
        folder: made by recipes/precompute_latents.py.
        vae, transform: what it must have been made with, from `vae_id` and `transform_id`.

    Raises:
        ValueError: the folder holds no cache, a file cannot be read, or it was made with another VAE or transform.
    """

    def __init__(self, folder: str | Path, vae: str, transform: str) -> None:
        self.folder = Path(folder)
        self.shard_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        shards = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not shards:
            raise ValueError(
                f"There are no latents in {self.folder}. Make them by recipes/precompute_latents.py with the same options."
            )
        for shard in shards:
            found = self._handle(shard).metadata() or {}
            for what, expected in (("vae", vae), ("transform", transform)):
                if found.get(what) != expected:
                    raise ValueError(
                        f"{shard} was made with another {what}: {found.get(what)}, this run has {expected}. Use a cache "
                        "made with this run's model and processor."
                    )
            self.shard_of.update(dict.fromkeys(self._handle(shard).keys(), shard))
        self._open.clear()  # data workers must not share handles

    def _handle(self, shard: Path) -> Any:
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(shard, framework="pt")
            except Exception as error:  # safetensors raises an exception type of its own
                raise ValueError(f"{shard} cannot be read ({error}). Delete it and compute it again.") from error
        return self._open[shard]

    def __len__(self) -> int:
        return len(self.shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self.shard_of

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._handle(self.shard_of[key]).get_tensor(key)

    def verify(self) -> None:
        """Read every file whole; raise ValueError for one that does not hold what was written to it."""
        for shard in sorted(set(self.shard_of.values())):
            handle = self._handle(shard)
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
            if checksum(tensors) != handle.metadata()["checksum"] or not all(
                t.isfinite().all() for t in tensors.values()
            ):
                raise ValueError(f"{shard} does not hold what was written to it. Delete it and compute it again.")


class LatentCollator(DeemDataCollator):
    """A collator that looks `target_latents` up instead of making `target_pixel_values`.

    Raises:
        ValueError: when called, for an image that is not in the cache.
    """

    def __init__(self, processor: DeemProcessor, cache: LatentCache, **options: Any) -> None:
        super().__init__(processor, return_targets=False, **options)
        self.cache = cache

    def _image_inputs(self, images: list[Any], region_masks: list[Any]) -> dict[str, torch.Tensor]:
        keys = [image_key(image) for image in images]
        if missing := [number for number, key in enumerate(keys) if key not in self.cache]:
            raise ValueError(
                f"{len(missing)} of {len(images)} images of a batch are not among the {len(self.cache)} latents of "
                f"{self.cache.folder}. Compute them by recipes/precompute_latents.py with this run's --data and "
                "--random_flip; images that are cropped at random cannot be cached."
            )
        latents = torch.stack([self.cache[key] for key in keys])
        return {**super()._image_inputs(images, region_masks), "target_latents": latents}


class AbsentVae(nn.Module):
    """Stands in for a VAE that training does not need; its weights stay in main memory, for checkpoints."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.config, self.dtype = vae.config, vae.dtype
        self.weights = {name: tensor.cpu() for name, tensor in vae.state_dict().items()}

    def encode(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "This run reads latents from a cache and holds no VAE: images can be neither encoded nor drawn."
        )

    decode = encode


def remove_vae(model: DeemForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Take the VAE out of a model and return its weights, under their names in a checkpoint."""
    model.image_decoder.vae = AbsentVae(model.image_decoder.vae)
    return {f"image_decoder.vae.{name}": tensor for name, tensor in model.image_decoder.vae.weights.items()}
